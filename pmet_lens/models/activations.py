"""Reading activations, at chosen positions only; nothing stays hooked.

`probe` is the start of every study here: the streams of many facts, read in batches, kept as
`[fact, layer, d_model]` per stream and position in the model's dtype. `read_streams` reads one
batch, `add_at` changes it. A pass stops at the highest layer needed. Positions count from 0 at the
left; a position on padding is an error, because its value means nothing and looks like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pmet_lens.data import file_format
from pmet_lens.data.facts import Fact, FactError, listed
from pmet_lens.data.progress import Tell, shown
from pmet_lens.models import tokens
from pmet_lens.models.bridge import Hook
from pmet_lens.models.model import Model
from pmet_lens.models.sites import ModelError, Road, Site, Stream, check_name, ending, several
from pmet_lens.models.tokens import Position

Place = TypeVar("Place", bound=tuple[int, Stream] | Site)
FORMAT = "pmet_lens activations 1"


@dataclass(frozen=True)
class Activations:
    """What `probe` read: `activations["mlp_out", "last"]` is `[fact, layer, d_model]`, on the CPU,
    with the facts and layers in the order of `facts` and `layers`."""

    values: Mapping[tuple[Stream, Position], Float[Tensor, "fact layer d_model"]]
    facts: tuple[Fact, ...]
    layers: tuple[int, ...]
    model: str

    def __getitem__(self, key: tuple[Stream, Position]) -> Float[Tensor, "fact layer d_model"]:
        if key not in self.values:
            raise ModelError(f"{key} was not probed; there are {', '.join(map(str, self.values))}")
        return self.values[key]

    def __len__(self) -> int:
        return len(self.facts)

    @property
    def nbytes(self) -> int:
        """Host memory of the values, in bytes."""
        return sum(v.element_size() * v.nelement() for v in self.values.values())

    def to_frame(
        self, stream: Stream | None = None, position: Position | None = None
    ) -> pd.DataFrame:
        """One row per fact, stream, position and layer (None: all): columns fact (number), subject,
        relation, stream, position, layer, then the activation (float32) in columns 0, 1, 2 …"""
        frames = []
        for (s, p), value in self.values.items():
            if stream in (None, s) and position in (None, p):
                n, layers, width = value.shape
                rows = pd.DataFrame(value.reshape(n * layers, width).float().numpy())
                head = {
                    "fact": np.repeat(np.arange(n), layers),
                    "subject": np.repeat([f.subject for f in self.facts], layers),
                    "relation": np.repeat(np.array([f.relation for f in self.facts]), layers),
                    "stream": s,
                    "position": p,
                    "layer": np.tile(self.layers, n),
                }
                frames.append(pd.concat([pd.DataFrame(head), rows], axis=1))
        if not frames:
            raise ModelError(f"stream {stream!r} at position {position!r} was not probed")
        return pd.concat(frames, ignore_index=True)

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file. Raises `ModelError` where that fails."""
        head = {
            "format": FORMAT,
            "facts": [f.record() for f in self.facts],
            "layers": self.layers,
            "model": self.model,
        }
        values = {f"{s}@{p}": v.contiguous() for (s, p), v in self.values.items()}
        file_format.write(path, values, head, "activations", ModelError)

    @classmethod
    def load(cls, path: str | Path) -> Activations:
        """The inverse of `save`. Raises `ModelError` for a file that is missing or something
        else."""
        head, tensors = file_format.read(path, FORMAT, "activations", ModelError)
        values = {tuple(key.split("@")): value for key, value in tensors.items()}
        facts = tuple(Fact.from_record(f) for f in head["facts"])
        return cls(values, facts, tuple(head["layers"]), head["model"])  # type: ignore[arg-type]


@shown("reading activations", "fact", "on_facts")
def probe(
    model: Model,
    facts: Fact | Sequence[Fact],
    streams: Stream | Sequence[Stream] = ("attn_out", "mlp_out", "resid_post"),
    layers: int | Sequence[int] | None = None,
    positions: Position | Sequence[Position] = ("last_subject", "last"),
    *,
    batch_tokens: int = 4096,
    on_facts: Tell | None = None,
) -> Activations:
    """Read `streams` at `layers` (None: all) and `positions` while the model reads every fact's
    prompt.

    Host memory: facts × layers × d_model × streams × positions values in the model's dtype; the
    default for 1,209 statements on GPT-J-6B (28 layers of 4,096, 2 bytes) is 1.7 GB. `batch_tokens`
    bounds the tokens of one pass, padding included; the result does not depend on it.

    Raises:
        FactError: for an empty list, a subject that is not found in the tokens, or a prompt (and
            with it its subject or answer) beyond the model's context.
        ModelError: for an unknown stream, layer or position, naming the valid ones.
    """
    facts, streams, positions = listed(facts), several(streams), several(positions)
    if not facts:
        raise FactError("There are no facts to probe; pass at least one Fact.")
    for position in positions:
        check_name("position", position, get_args(Position))
    layers = tuple(range(model.n_layers) if layers is None else several(layers))
    if not (streams and layers and positions):
        raise ModelError("probe needs at least one stream, one layer and one position")
    for stream in streams:
        for layer in layers:
            model.stream_hook(layer, stream)
    prompts = [tokens.Prompt(f.prompt, f.subject) for f in facts]
    values = read(model, prompts, streams, layers, positions, batch_tokens, on_facts)
    return Activations(values, tuple(facts), layers, model.name)


def read(
    model: Model,
    prompts: Sequence[tokens.Prompt],
    streams: Sequence[Stream],
    layers: Sequence[int],
    positions: Sequence[Position],
    batch_tokens: int = 4096,
    on_facts: Tell | None = None,
) -> dict[tuple[Stream, Position], Float[Tensor, "prompt layer d_model"]]:
    """The values of the streams for prompts of any kind, as `probe` keeps them.

    Where no subject is marked, "last_subject" is the last token.
    """
    shape = (len(prompts), len(layers), model.d_model)
    values: dict[tuple[Stream, Position], Tensor] = {
        (s, p): torch.empty(shape, dtype=model.dtype) for s in streams for p in positions
    }
    done = 0
    for chosen, batch in batches(model, prompts, batch_tokens):
        at = torch.stack([batch.at(p) for p in positions], dim=1)
        wanted: dict[tuple[int, Stream], Tensor] = {(n, s): at for n in layers for s in streams}
        streams_read = read_streams(model, batch.ids, batch.mask, wanted)
        for k, position in enumerate(positions):
            for i, layer in enumerate(layers):
                for stream in streams:
                    values[stream, position][chosen, i] = streams_read[layer, stream][:, k].cpu()
        done += len(chosen)
        if on_facts is not None:
            on_facts(done, len(prompts))
    return values


def batches(
    model: Model, prompts: Sequence[tokens.Prompt], batch_tokens: int
) -> Iterator[tuple[Int[Tensor, " row"], tokens.Batch]]:
    """Prompts in batches of similar length, at most `batch_tokens` tokens with padding (or one
    prompt), with the numbers of the prompts in each."""
    # What a chat template adds is the same everywhere.
    lengths = [len(ids) for ids in model.tokenizer([p.text for p in prompts])["input_ids"]]
    for chunk in tokens.chunks(lengths, batch_tokens):
        yield torch.tensor(chunk), tokens.encode(model, [prompts[j] for j in chunk])


def read_streams(
    model: Model,
    ids: Int[Tensor, "batch token"],
    mask: Int[Tensor, "batch token"],
    wanted: Mapping[Place, Int[Tensor, "batch ..."]],
) -> dict[Place, Float[Tensor, "batch ... d"]]:
    """The values of streams and keys, at one position per row (or at several), in one pass.

    `wanted` maps (layer, stream), or a site for the keys that its projection reads, to positions.
    Raises `ModelError` for a layer or stream that does not exist, or a position outside the row's
    text.
    """
    values: dict[Place, Tensor] = {}

    def keep(place: Place, positions: Tensor) -> tuple[str, Hook]:
        def hook(value: Tensor) -> None:
            values[place] = value[_rows_and(positions, value)].to(ids.device)

        _check_positions(positions, mask)
        if isinstance(place, Site):
            return model.key_hook(place), hook
        return model.stream_hook(*place), hook

    hooks = [keep(place, positions) for place, positions in wanted.items()]
    with torch.no_grad():
        model.forward(ids, mask, hooks=hooks, **ending([n for n, _ in hooks], model.n_layers))
    return {place: values[place] for place in wanted}


def add_at(delta: Float[Tensor, "batch d_model"], positions: Int[Tensor, " batch"]) -> Hook:
    """A hook for `Model.forward` that adds `delta[row]` at `positions[row]` of each row.

    Differentiable in `delta`; the activation itself is left alone and a changed copy returned.
    One row of `delta` per row of the batch: where prompts share a delta, index it by prompt
    before (`delta[fact_of_prompt]`) and autograd sums their gradients.

    Raises `ModelError` for a negative position or one beyond the batch's last token.
    """
    first, last = int(positions.min()), int(positions.max())

    def hook(value: Tensor) -> Tensor:
        if first < 0 or last >= value.shape[1] or len(value) != len(positions):
            raise ModelError(
                f"positions {first} to {last} of {len(positions)} rows do not fit a batch of "
                f"{len(value)} rows and {value.shape[1]} tokens"
            )
        where = _rows_and(positions, value)
        return value.index_put(where, value[where] + delta.to(value))

    return hook


def road(model: Model, site: Site) -> Road | None:
    """How what the projection at `site` writes reaches the residual stream; None: as it is.

    Tried out, because configurations name it differently: alone in an empty stream, two vectors
    tell the gains, and whether a norm stands there. Raises `ModelError` where it is anything else.
    """
    return roads(model, [site])[site]


def roads(model: Model, sites: Sequence[Site]) -> dict[Site, Road | None]:
    """`road` of every site (one per layer), in one pass."""
    signs = 1.0 - 2.0 * (torch.arange(model.d_model) % 3 == 0)
    tried = torch.stack([torch.zeros_like(signs), signs, torch.linspace(1, 3, len(signs))])
    seen: dict[Site, Tensor] = {}
    hooks: list[tuple[str, Hook]] = []
    for site in sites:
        mlp = site.projection == "mlp"
        written: Stream = "mlp_out" if mlp else "attn_out"
        output: Stream = "resid_post" if mlp or model.parallel_blocks else "resid_mid"
        streams: tuple[Stream, ...] = ("resid_pre", "attn_out", "mlp_out")
        for stream in streams:
            put = tried if stream == written else torch.zeros_like(tried)
            hooks.append((model.stream_hook(site.layer, stream), put[None].to(model.dtype).to))
        hooks.append((model.stream_hook(site.layer, output), partial(seen.__setitem__, site)))
    ids = torch.arange(len(tried), device=model.device)[None]
    stop = 1 + max(site.layer for site in sites)
    with torch.no_grad():
        model.forward(ids, torch.ones_like(ids), hooks=hooks, stop_at_layer=stop)
    return {site: Road.tell(site, tried, seen[site][0]) for site in sites}


def _rows_and(positions: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of `positions[row]` or `positions[row, k]` in `value[row, token]`."""
    rows = torch.arange(len(positions), device=value.device)
    return rows.view(-1, *[1] * (positions.ndim - 1)), positions.to(value.device)


def _check_positions(positions: Tensor, mask: Tensor) -> None:
    lengths = mask.sum(dim=1)
    if len(positions) != len(mask):
        raise ModelError(f"{len(positions)} positions do not fit a batch of {len(mask)} rows")
    outside = (positions < 0) | (positions >= lengths.view(-1, *[1] * (positions.ndim - 1)))
    for row, *k in outside.nonzero().tolist():
        position = int(positions[(row, *k)])
        raise ModelError(
            f"row {row} has {int(lengths[row])} tokens, so there is no position {position}"
        )


def check_finite(value: Tensor, what: str) -> None:
    """Raises `ModelError` where a number a model computed is NaN or infinite."""
    if not bool(torch.isfinite(value).all()):
        raise ModelError(
            f"{what} is not finite at some fact: look for NaN in the model's weights, or load it "
            "in a dtype with a wider range (bfloat16 or float32 instead of float16)"
        )
