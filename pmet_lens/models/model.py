"""The one file that knows the model: streams, keys and weights under fixed names.

A `Model` holds the user's Hugging Face model and a twin of it (see `bridge.py`) wrapped in
TransformerLens's bridge. Hooks live on the twin; weights live once. So an in-place edit of
`Model.weight(site)` is at once an edit of the user's model, which itself is never wrapped, hooked
or switched to another mode.

Shapes follow TransformerLens: activations `[batch, token, d_model]`, weights in the row
convention `value = key @ W + b` with `W` as `[d_in, d_model]`. Nothing else imports
`transformer_lens`, and it is imported inside a function because that alone takes seconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pmet_lens.models.bridge import Bare, Hook, Tail, drop_blocks, layer_of, run, twin
from pmet_lens.models.chat import Messages, frame
from pmet_lens.models.loading import DTYPES, ModelError, moved, name_of, read
from pmet_lens.models.weights import LiveEdits, restored

Stream = Literal["attn_in", "attn_out", "mlp_in", "mlp_out", "resid_pre", "resid_mid", "resid_post"]
"""What can be read at a layer, all `[batch, token, d_model]`. `attn_in` and `mlp_in` are what the
component itself reads, behind its norm; `attn_out` and `mlp_out` what its output projection writes
(in front of a post-norm, where there is one); `resid_pre`, `resid_mid` and `resid_post` the
residual stream before, between and behind the two. Parallel blocks have no `resid_mid`."""
Projection = Literal["attn", "mlp"]

# `hook_attn_out` and `hook_mlp_out` are avoided: with post-norms (Gemma-2) they sit behind them.
_STREAM_HOOKS = {
    "attn_in": "attn.hook_in",
    "attn_out": "attn.o.hook_out",
    "mlp_in": "mlp.hook_in",
    "mlp_out": "mlp.out.hook_out",
    "resid_pre": "hook_in",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_out",
}
_MODULES = {"attn": "attn.o", "mlp": "mlp.out"}


@dataclass(frozen=True, order=True)
class Site:
    """A weight that can be written: the output projection of one component of one layer.

    `layer` counts from 0; `projection` is "attn" (`W_O`) or "mlp" (`W_out`). Prints as `5.mlp`.
    Raises `ModelError` for another projection or a negative layer.
    """

    layer: int
    projection: Projection

    def __post_init__(self) -> None:
        _check_name("projection", self.projection, get_args(Projection))
        if self.layer < 0:
            raise ModelError(f"layers count from 0, so there is no layer {self.layer}")

    def __str__(self) -> str:
        return f"{self.layer}.{self.projection}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """The inverse of `str(site)`."""
        match = re.fullmatch(r"(\d+)\.(\w+)", text)
        if match is None:
            raise ModelError(f"{text!r} is not a site; write it as '5.mlp' or '5.attn'")
        return cls(int(match[1]), match[2])  # type: ignore[arg-type]


class Model:
    """A causal language model whose streams can be read and changed and whose weights edited.

    `hf`, `tokenizer`: the user's own objects, untouched. `bridge`: the wrapped twin, in eval mode
    whatever the mode of `hf`. `name`: what hyper-parameters are looked up by. `frame`: what stands
    around every prompt (`chat.Frame`). `load` makes one; load again after moving `hf` or changing
    weights that belong to no `Site` (some are copied).

    Raises `ModelError` for quantised weights, for a tokenizer without a pad token, and for an
    architecture without one output projection per component (a mixture of experts).
    """

    def __init__(
        self, hf: nn.Module, tokenizer: Any, name: str, template: str | Messages | None = None
    ) -> None:
        _check_weights(hf, name)
        _check_tokenizer(tokenizer)
        self.hf, self.tokenizer, self.name = hf, tokenizer, name
        self.frame = frame(tokenizer, template)
        self.bridge = _wrap(twin(hf), name)
        self._hooks = frozenset(self.bridge.hook_dict)
        self._names = {id(p): n for n, p in hf.named_parameters()}
        self._check_sites()
        self.live_edits = LiveEdits(self.weight)
        self._tails: dict[int, Tail] = {}
        self._enters: dict[str, bool] = {}

    @property
    def n_layers(self) -> int:
        return len(self.bridge.blocks)

    @property
    def d_model(self) -> int:
        return self.bridge.cfg.d_model

    @property
    def n_positions(self) -> int:
        """The longest text the model reads, in tokens."""
        return int(self.bridge.cfg.n_ctx)

    @property
    def embedding(self) -> Float[Tensor, "vocab d_model"]:
        """The token embeddings, cut from autograd; a live view."""
        hf: Any = self.hf
        return hf.get_input_embeddings().weight.detach()

    @property
    def device(self) -> torch.device:
        """Where token ids go and logits come back: that of the embeddings. Under a `device_map`
        other layers lie elsewhere, and what a hook sees lies where its layer does."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.parameter(Site(0, "mlp")).dtype

    @cached_property
    def parallel_blocks(self) -> bool:
        """Whether attention and MLP of a layer read the same input and enter the same sum.

        Found by trying: a change of `attn_out` reaches the MLP of its own layer or it does not.
        Configurations do not tell it under one name.
        """
        return torch.equal(*self._try_change("attn_out", self.key_hook(Site(0, "mlp")))[:2])

    def enters_output(self, stream: Stream) -> bool:
        """Whether a change of the stream enters its layer's output as it is and does nothing else
        there, as in parallel blocks without a norm behind. Found by trying, in the first layer."""
        if stream not in self._enters:
            before, after, push = self._try_change(stream, self.stream_hook(0, "resid_post"))
            size = max(float(after.abs().max()), 1.0)
            off = float((after - before - push).abs().max())
            self._enters[stream] = off <= 100 * torch.finfo(after.dtype).eps * size
        return self._enters[stream]

    def _try_change(self, stream: Stream, read: str) -> tuple[Tensor, Tensor, Tensor]:
        """What the hook `read` of the first layer sees before and after a push of `stream` there,
        and the push."""
        ids = torch.arange(3, device=self.device)[None]
        # Not a constant vector: a layer norm would take that away again.
        push = torch.linspace(-1, 1, self.d_model, device=self.device, dtype=self.dtype)
        seen: list[Tensor] = []
        changes = [(self.stream_hook(0, stream), lambda value: value + push.to(value))]
        with torch.no_grad():
            for extra in ([], changes):
                hooks = [*extra, (read, lambda value: seen.append(value.to(push.device)))]
                self.forward(ids, torch.ones_like(ids), hooks=hooks, stop_at_layer=1)
        return seen[0], seen[1], push

    def check_layer(self, layer: int) -> int:
        """`layer` itself; raises `ModelError` unless it is one of this model's."""
        if not 0 <= layer < self.n_layers:
            raise ModelError(
                f"layer {layer} does not exist: {self.name!r} has layers 0 to {self.n_layers - 1}"
            )
        return layer

    def stream_hook(self, layer: int, stream: Stream) -> str:
        """The hook name at which `stream` of `layer` is `[batch, token, d_model]`.

        Raises `ModelError` for an unknown stream or layer, and for `resid_mid` of parallel blocks.
        """
        _check_name("stream", stream, get_args(Stream))
        name = f"blocks.{self.check_layer(layer)}.{_STREAM_HOOKS[stream]}"
        if name not in self._hooks:
            raise ModelError(
                f"the blocks of {self.name!r} are parallel, so nothing lies between attention and "
                f"MLP: there is no {stream}; choose from resid_pre, resid_post"
            )
        return name

    def pattern_hook(self, layer: int) -> str:
        """The hook name at which the attention weights of `layer` are `[batch, head, query, key]`.

        Some architectures compute weights nobody can see unless the model was loaded with
        `attn_implementation="eager"`; the hook then never runs.
        """
        return f"blocks.{self.check_layer(layer)}.attn.hook_pattern"

    def key_hook(self, site: Site) -> str:
        """The hook name at which the input of the projection is `[batch, token, d_in]`."""
        return f"blocks.{self.check_layer(site.layer)}.{_MODULES[site.projection]}.hook_in"

    def parameter(self, site: Site) -> nn.Parameter:
        """The raw Hugging Face parameter, in whatever orientation the architecture stores."""
        return self._module(site).weight

    def parameter_name(self, site: Site) -> str:
        """The name of `parameter(site)` in `hf.named_parameters()`."""
        return self._names[id(self.parameter(site))]

    def weight(self, site: Site) -> Float[Tensor, "d_in d_model"]:
        """A live view of the weight, cut from autograd: writing into it in place edits `hf`."""
        stored = self.parameter(site).detach()
        # A Linear stores [out, in], the Conv1D of GPT-2 the rows we want.
        return stored.T if isinstance(self._module(site), nn.Linear) else stored

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the weights are stored `[d_in, d_model]` (Conv1D, as in GPT-2), else `[d_model,
        d_in]` (Linear)."""
        return not isinstance(self._module(Site(0, "mlp")), nn.Linear)

    def restored(self, sites: Sequence[Site]) -> AbstractContextManager[None]:
        """A block in which these weights may be written; afterwards they are the old bits."""
        return restored([self.weight(site) for site in sites])

    def d_in(self, site: Site) -> int:
        """The length of a key at this site."""
        return self.weight(site).shape[0]

    def forward(
        self,
        input_ids: Int[Tensor, "batch token"],
        attention_mask: Int[Tensor, "batch token"],
        *,
        hooks: Sequence[tuple[str, Hook]] = (),
        stop_at_layer: int | None = None,
        at: Int[Tensor, "n 2"] | None = None,
    ) -> Float[Tensor, "batch token vocab"] | Float[Tensor, "n vocab"]:
        """Logits of a right-padded batch, with hooks that are gone afterwards, also on errors.

        `hooks` pairs a name from `stream_hook` or `key_hook` with a function of the activation;
        those of one name run in the order given. `at`: (row, token) pairs; only there are logits
        computed and returned, which saves most of the time and memory of a large vocabulary.
        With `stop_at_layer=l` blocks from `l` on do not run and the residual entering block `l`
        is returned instead (the logits where `l` is the number of layers).

        Gradients flow to whatever the hooks bring in, never to the model's weights.
        """
        if stop_at_layer is not None:
            self._check_stop(stop_at_layer, hooks, at)
        return run(
            self.bridge, input_ids, attention_mask, hooks,
            at=at, stop_at_layer=stop_at_layer, known=self._hooks,
        )  # fmt: skip

    def logits_at(
        self,
        input_ids: Int[Tensor, "batch token"],
        attention_mask: Int[Tensor, "batch token"],
        at: Int[Tensor, "n 2"],
    ) -> Float[Tensor, "n vocab"]:
        """`forward(…, at=at)` without hooks and without gradients, by the cheapest way there is."""
        try:
            bare = self.from_layer(0).bare
        except ModelError:  # a family that `from_layer` refuses
            bare = None
        with torch.no_grad():
            if bare is None:
                return self.forward(input_ids, attention_mask, at=at)
            return bare.run(input_ids, attention_mask, at)

    def from_layer(self, first: int) -> Tail:
        """This model from block `first` on, sharing all weights: what changes there costs less.

        Made once and kept: it sees every later change of the weights. Raises `ModelError` where the
        shortened model does not give the logits of the whole one (tried on a small batch); use
        `forward` then.
        """
        if self.check_layer(first) not in self._tails:
            names = self.bridge.adapter.component_mapping
            path, head = names["blocks"].name, names["unembed"].name
            shortened, plain = twin(self.hf), twin(self.hf)
            for model in (shortened, plain):
                drop_blocks(model, path, first)
            mlp = names["blocks"].submodules["mlp"].name
            last = None if mlp is None else f"{path}.{self.n_layers - 1 - first}.{mlp}"
            inner: dict[str, str] = {}
            for site in (Site(first, p) for p in get_args(Projection)):
                own = self.parameter_name(site).removeprefix(f"{path}.{first}.").rpartition(".")[0]
                inner[f"blocks.0.{_MODULES[site.projection]}.hook_out"] = f"{path}.0.{own}"
            bare = Bare(plain, f"{path}.0", head, last, inner)
            bridge = _wrap(shortened, self.name)
            known = frozenset(bridge.hook_dict)
            tail = Tail(bridge, first, bare, window=self._window(), known=known)
            self._tails[first] = self._check_tail(tail)
        return self._tails[first]

    def _window(self) -> int | None:
        config: Any = self.hf.config
        found = [getattr(config, name, None) for name in ("sliding_window", "window_size")]
        return min((n for n in found if isinstance(n, int)), default=None)

    def _check_tail(self, tail: Tail) -> Tail:
        """Compare the tail with the whole model on a small batch. Kept as it is found to give the
        same: without its wrapper (some wrapped norms compute in float64 what transformers does in
        float32), and behind a past (sliding windows do not, with a plain cache)."""
        ids = torch.arange(18, device=self.device).reshape(3, 6)
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0
        kept: list[Tensor] = []
        start = torch.tensor([3, 1, 0], device=self.device)
        entry = self.stream_hook(tail.first, "resid_pre")
        wrapped: list[tuple[str, Hook]] = [
            (self.stream_hook(tail.first, "resid_post"), lambda _: None)
        ]
        with torch.no_grad():
            whole = self.forward(
                ids, mask, hooks=[(entry, lambda v: kept.append(v.to(ids.device)))]
            )
            at = torch.tensor([[0, 2], [1, 3]], device=self.device)
            some = tail.forward(kept[0], mask, at=at)
            both = [tail.forward(kept[0], mask, hooks=hooks) for hooks in ((), wrapped)]
            past = tail.past(kept[0], start)
            # Every row has three tokens behind its past; the last has none.
            rest = torch.stack([kept[0][i, n : n + 3] for i, n in enumerate(start.tolist())])
            ones = torch.ones_like(ids[:, :3])
            behind = [tail.forward(rest, ones, past=past, hooks=hooks) for hooks in ((), wrapped)]
        largest = whole[mask.bool()].abs().max()
        # The same operations on the same numbers: 1000 roundings are generous. Behind a past the
        # sums are ordered otherwise, and some attention is computed in float32 in any dtype.
        exact = min(1e3 * torch.finfo(whole.dtype).eps, 1e-2) * largest
        close = max(1e2 * torch.finfo(whole.dtype).eps, 1e-5) * largest
        bare, short = [bool((whole - got)[mask.bool()].abs().max() <= exact) for got in both]
        bare = bare and bool((some - whole[at[:, 0], at[:, 1]]).abs().max() <= exact)
        if not short:
            raise ModelError(
                f"{self.name!r} does not give the same logits when started at block {tail.first}: "
                "run the whole model with Model.forward"
            )
        wanted = torch.stack([whole[i, n : n + 3] for i, n in enumerate(start.tolist())])
        resumes = all(bool((wanted - got).abs().max() <= close) for got in behind)
        if tail.bare is not None and bare:
            self._check_inner(tail, kept[0], mask, exact)
        return replace(tail, bare=tail.bare if bare else None, has_past=resumes)

    def _check_inner(self, tail: Tail, residual: Tensor, mask: Tensor, exact: Tensor) -> None:
        """Let the unwrapped tail take hooks at the projections only if they do there what they do
        in the wrapped one (some families flatten the tokens around their MLP)."""
        bare: Any = tail.bare
        inner, bare.hooks = bare.hooks, {}
        push = torch.linspace(-1, 1, self.d_model, device=self.device, dtype=self.dtype)
        seen: list[torch.Size] = []

        def change(value: Tensor) -> Tensor:
            seen.append(value.shape)
            return value + push.to(value)

        streams: tuple[Stream, ...] = ("attn_out", "mlp_out")
        hooks = [(self.stream_hook(tail.first, stream), change) for stream in streams]
        with torch.no_grad():
            wanted = tail.forward(residual, mask, hooks=hooks)
            bare.hooks = inner
            got = tail.forward(residual, mask, hooks=hooks)
        same = (wanted - got)[mask.bool()].abs().max() <= exact
        if not (same and set(seen) == {residual.shape}):
            bare.hooks = {}

    def _check_stop(self, stop: int, hooks: Sequence[tuple[str, Hook]], at: Tensor | None) -> None:
        if not 0 < stop <= self.n_layers or at is not None:
            raise ModelError(f"stop_at_layer must lie in 1 to {self.n_layers}, and excludes `at`")
        for name, _ in hooks:
            layer = layer_of(name)
            if layer is None or layer >= stop:
                raise ModelError(f"hook {name!r} would never run: the pass stops at layer {stop}")

    def _module(self, site: Site) -> Any:
        block = self.bridge.blocks[self.check_layer(site.layer)]
        return block.get_submodule(_MODULES[site.projection]).original_component

    def _check_sites(self) -> None:
        """Every site must be one plain matrix that twin and `hf` share; hooks must exist."""
        if not hasattr(self.bridge, "blocks"):
            raise ModelError(f"{self.name!r} is not a stack of decoder blocks; it cannot be edited")
        for site in (Site(n, p) for n in range(self.n_layers) for p in get_args(Projection)):
            what = {"attn": "attention", "mlp": "MLP"}[site.projection]
            if self.key_hook(site) not in self._hooks or not _is_projection(self._module(site)):
                raise ModelError(
                    f"layer {site.layer} of {self.name!r} has no single {what} output projection "
                    "(as in a mixture of experts or a recurrent layer), so it cannot be edited"
                )
            if id(self.parameter(site)) not in self._names:
                raise ModelError(
                    f"the wrapped copy of {self.name!r} does not share the weight at {site} with "
                    "the model, so an edit would be lost: this architecture is not supported"
                )


def load(
    source: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    name: str | None = None,
    template: str | Messages | None = None,
) -> Model:
    """A `Model` from a bundled name, a directory, a hub id or a model in memory.

    `source`: "world", "world-sequential" or "world-unmasked" (bundled, checked against their
    checksums; the last without an imposed recall site, for study and not for editing); a directory
    as `save_pretrained` writes it; a hub id; or an instantiated Hugging Face causal LM, which
    stays yours and needs `tokenizer`. A tokenizer read here without a pad token pads with its
    end-of-text token; one you pass is never changed, but refused.
    `device`: where to put what is read here; "auto": the accelerator there is, else the CPU; None:
    the CPU.
    `device_map`: for a model larger than one accelerator, as `from_pretrained` takes it ("auto",
    "balanced", or module names to devices). Every delta and solve happens where its weight lies;
    weights that had to be offloaded to the host or the disk cannot be edited.
    `dtype`: a torch dtype or its name such as "float64"; None: float32 for the bundled models
    (stored in half precision), else the checkpoint's own.
    `name`: what hyper-parameters are looked up by; None: the bundled name, the end of the path or
    the model type.
    `template`: for chat models, what the user says, with one `{}` for the prompt ("{}", or
    "Complete the sentence: {}"), or a list of messages with one; every prompt is then phrased
    through the tokenizer's chat template, and the answer is the assistant's (`chat.frame`).

    Raises `ModelError`, in words, for whatever cannot be loaded or edited.
    """
    if not isinstance(source, nn.Module):
        if device is not None and device_map is not None:
            raise ModelError("give device or device_map, not both")
        hf, tokenizer, found = read(source, tokenizer, dtype, device_map)
        hf = hf if device is None else moved(hf, device)
        return Model(hf, tokenizer, name or found, template)
    if tokenizer is None:
        raise ModelError("a model in memory needs its tokenizer: load(hf, tokenizer=…)")
    if (device, dtype, device_map) != (None, None, None):
        raise ModelError("your model is left as it is: call hf.to(device, dtype) before load")
    return Model(source, tokenizer, name or name_of(source), template)


def _check_name(kind: str, given: str, valid: tuple[str, ...]) -> None:
    if given not in valid:
        raise ModelError(f"unknown {kind} {given!r}; choose from {', '.join(valid)}")


def _check_weights(hf: nn.Module, name: str) -> None:
    plain = all(p.dtype in DTYPES.values() for p in hf.parameters())
    if not plain or getattr(hf, "is_quantized", False):
        raise ModelError(f"the weights of {name!r} are quantised: load it in a floating dtype")
    away = [n for n, p in hf.named_parameters() if p.is_meta]
    if 0 < len(away) < len(list(hf.parameters())):  # a whole model without numbers can be counted
        raise ModelError(
            f"the weight {away[0]!r} of {name!r} is not in memory (offloaded by its device_map, or "
            "never loaded), so it cannot be edited: spread the model over more devices, or load it "
            "in a smaller dtype (bfloat16)"
        )


def _check_tokenizer(tokenizer: Any) -> None:
    if tokenizer.pad_token_id is None:
        raise ModelError(
            "the tokenizer has no pad token: set tokenizer.pad_token = tokenizer.eos_token first"
        )


def _is_projection(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def _wrap(model: nn.Module, name: str) -> Any:
    """The TransformerLens bridge around a twin, in eval mode like the twin itself."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    architecture = type(model).__name__
    try:
        return build_bridge_from_module(model, architecture, hf_config=model.config).eval()
    except (ValueError, NotImplementedError) as error:
        raise ModelError(f"TransformerLens cannot wrap {name!r} ({architecture})") from error
