"""Component activations of many facts: read in batches, only at the positions asked for.

`probe` is the start of every study here. What is kept is `[fact, layer, d_model]` per stream and
position, in the model's own dtype, and nothing else: the passes run over a bounded number of tokens
at a time and stop behind the highest layer asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pmet_lens.data import file_format
from pmet_lens.data.facts import Fact, FactError
from pmet_lens.models import probes, tokens
from pmet_lens.models.model import Model, ModelError, Stream
from pmet_lens.models.tokens import Position

OnFacts = Callable[[int, int], object]
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
            "facts": [asdict(f) for f in self.facts],
            "layers": self.layers,
            "model": self.model,
        }
        values = {f"{s}@{p}": v.contiguous() for (s, p), v in self.values.items()}
        file_format.write(path, values, head, "activations", ModelError)

    @classmethod
    def load(cls, path: str | Path) -> Activations:
        """The inverse of `save`. Raises `ModelError` for a file that is missing or something
        else."""
        head, found = file_format.read(path, FORMAT, "activations", ModelError)
        values = {tuple(key.split("@")): value for key, value in found.items()}
        facts = tuple(Fact.from_record(f) for f in head["facts"])
        return cls(values, facts, tuple(head["layers"]), head["model"])  # type: ignore[arg-type]


def probe(
    model: Model,
    facts: Sequence[Fact],
    streams: Sequence[Stream] = ("attn_out", "mlp_out", "resid_post"),
    layers: Sequence[int] | None = None,
    positions: Sequence[Position] = ("last_subject", "last"),
    *,
    batch_tokens: int = 4096,
    on_facts: OnFacts | None = None,
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
    if not facts:
        raise FactError("There are no facts to probe; pass at least one Fact.")
    for position in positions:
        if position not in get_args(Position):
            raise ModelError(
                f"unknown position {position!r}; choose from {', '.join(get_args(Position))}"
            )
    layers = tuple(range(model.n_layers) if layers is None else layers)
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
    on_facts: OnFacts | None = None,
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
        found = probes.read_streams(model, batch.ids, batch.mask, wanted)
        for (layer, stream), value in found.items():
            for k, position in enumerate(positions):
                for at_layer in (i for i, n in enumerate(layers) if n == layer):
                    values[stream, position][chosen, at_layer] = value[:, k].cpu()
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
