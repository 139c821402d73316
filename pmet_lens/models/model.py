"""A model as the package sees it: streams, keys and weights under fixed names.

A `Model` holds the user's Hugging Face model and a copy that shares its weights (`bridge.py`).
Hooks live on the copy; weights live once. So an in-place edit of `Model.weight(site)` is at once an
edit of the user's model, which itself is never wrapped, hooked or switched to another mode.

Shapes follow TransformerLens: activations `[batch, token, d_model]`, weights in the row
convention `value = key @ W + b` with `W` as `[d_in, d_model]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pmet_lens.models import weights
from pmet_lens.models.bridge import Blocks, Hooks, Wrapped, copy_sharing_weights, speaking
from pmet_lens.models.chat import Messages, frame
from pmet_lens.models.sites import (
    PROJECTION_MODULES,
    STREAM_HOOKS,
    ModelError,
    Projection,
    Site,
    Stream,
    check_name,
    layer_of,
)
from pmet_lens.models.tail import Tail, Tails


class Model:
    """A causal language model whose streams can be read and changed and whose weights edited.

    `hf`, `tokenizer`: the user's objects, untouched. `bridge`: the wrapped copy, in eval mode
    whatever the mode of `hf`. `name`: what hyper-parameters are looked up by. `frame`: what stands
    around every prompt (`chat.Frame`). `kind`: how the weights were quantised in the file they come
    from ("Q4_1"); empty where they were not. `load` makes one; load again after moving `hf` or
    changing weights that belong to no `Site` (some are copied).

    Raises `ModelError` for quantised weights, for a tokenizer without a pad token or one that does
    not say where its tokens stand, and for an architecture without one output projection per
    component (a mixture of experts).
    """

    def __init__(
        self,
        hf: nn.Module,
        tokenizer: Any,
        name: str,
        template: str | Messages | None = None,
        kind: str = "",
    ) -> None:
        weights.check_floats(hf, name)
        weights.check_tokenizer(tokenizer)
        self.hf, self.tokenizer, self.name, self.kind = hf, tokenizer, name, kind
        self.frame = frame(tokenizer, template)
        self._wrapped = Wrapped(copy_sharing_weights(hf), name)
        self.bridge = self._wrapped.bridge
        self._names = {id(p): n for n, p in hf.named_parameters()}
        self._check_sites()
        self.live_edits = weights.LiveEdits(self.weight)
        self._enters: dict[str, bool] = {}
        weights.check_runs(self.forward, hf, name)

    def __repr__(self) -> str:
        file = f", weights from a {weights.file_of(self.kind)}" if self.kind else ""
        what = f"{type(self.hf).__name__}, {self.n_layers} layers, d_model {self.d_model}"
        return f"Model({self.name!r}: {what}, {str(self.dtype).removeprefix('torch.')}{file})"

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
        """That of the embeddings: where token ids go and logits come back. Under a `device_map`
        what a hook sees lies where its layer does."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.parameter(Site(0, "mlp")).dtype

    @cached_property
    def speaker(self) -> Any:
        """A copy that shares the weights, for transformers' own `generate`; yours is left alone."""
        return speaking(self.hf)

    @cached_property
    def parallel_blocks(self) -> bool:
        """Whether attention and MLP of a layer read the same input and enter the same sum.

        Tried out, because configurations name it differently: a change of `attn_out` reaches the
        MLP of its layer or it does not.
        """
        return torch.equal(*self._try_change("attn_out", self.key_hook(Site(0, "mlp")))[:2])

    def enters_output(self, stream: Stream) -> bool:
        """Whether a change of the stream enters its layer's output as it is and does nothing else
        there, as in parallel blocks without post-norms. Tried out in the first layer."""
        if stream not in self._enters:
            before, after, push = self._try_change(stream, self.stream_hook(0, "resid_post"))
            eps = torch.finfo(after.dtype).eps
            error = (after - before - push).abs().max() / after.abs().max()
            # In half precision a small answer of the MLP might pass for rounding.
            alone = stream != "attn_out" or self.parallel_blocks
            self._enters[stream] = alone and bool(error <= (100 if eps < 1e-4 else 8) * eps)
        return self._enters[stream]

    def _try_change(self, stream: Stream, read: str) -> tuple[Tensor, Tensor, Tensor]:
        """What the hook `read` of the first layer sees before and after a push of `stream` there,
        and the push, which is as large as what is read."""
        ids, where = torch.arange(3, device=self.device)[None], self.stream_hook(0, stream)
        # Not a constant vector: a layer norm would take that away again.
        push = torch.linspace(-1, 1, self.d_model, device=self.device, dtype=self.dtype)
        seen: list[Tensor] = []
        look = (read, lambda value: seen.append(value.to(self.device)))
        with torch.no_grad():
            self.forward(ids, torch.ones_like(ids), hooks=[look], stop_at_layer=1)
            push = push * seen[0].abs().max().clamp(min=1)
            change = (where, lambda value: value + push.to(value))
            self.forward(ids, torch.ones_like(ids), hooks=[change, look], stop_at_layer=1)
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
        check_name("stream", stream, get_args(Stream))
        name = f"blocks.{self.check_layer(layer)}.{STREAM_HOOKS[stream]}"
        if name not in self._wrapped.hooks:
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
        module = PROJECTION_MODULES[site.projection]
        return f"blocks.{self.check_layer(site.layer)}.{module}.hook_in"

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
        return weights.restored([self.weight(site) for site in sites])

    def d_in(self, site: Site) -> int:
        """The length of a key at this site."""
        return self.weight(site).shape[0]

    def forward(
        self,
        input_ids: Int[Tensor, "batch token"],
        attention_mask: Int[Tensor, "batch token"],
        *,
        hooks: Hooks = (),
        stop_at_layer: int | None = None,
        at: Int[Tensor, "n 2"] | None = None,
    ) -> Float[Tensor, "batch token vocab"] | Float[Tensor, "n vocab"]:
        """Logits of a right-padded batch, with hooks that are gone afterwards, also on errors.

        `hooks` pairs a name from `stream_hook` or `key_hook` with a function of the activation;
        those of one name run in the order given. `at`: (row, token) pairs; only there are logits
        computed and returned, which saves most of the time and memory of a large vocabulary.
        With `stop_at_layer=l` blocks from `l` on do not run and the residual entering block `l`
        is returned instead (where `l` is the number of layers that leaving the last one).

        Gradients flow to whatever the hooks bring in, never to the model's weights.
        """
        if stop_at_layer is not None:
            self._check_stop(stop_at_layer, hooks, at)
        return self._wrapped.run(
            input_ids, attention_mask, hooks, at=at, stop_at_layer=stop_at_layer
        )

    def logits_at(
        self,
        input_ids: Int[Tensor, "batch token"],
        attention_mask: Int[Tensor, "batch token"],
        at: Int[Tensor, "n 2"],
    ) -> Float[Tensor, "n vocab"]:
        """`forward(…, at=at)` without hooks and without gradients, by the cheapest way there is."""
        try:
            unwrapped = self.from_layer(0).unwrapped
        except ModelError:  # a family that `from_layer` refuses
            unwrapped = None
        with torch.no_grad():
            return (unwrapped or self._wrapped).run(input_ids, attention_mask, at=at)

    @torch.inference_mode(False)
    def from_layer(self, first: int) -> Tail:
        """This model from block `first` on, sharing all weights: what changes there costs less.

        Made once and kept: it sees every later change of the weights. Raises `ModelError` where the
        shortened model does not give the logits of the whole one; use `forward` then.
        """
        return self._tails[self.check_layer(first)]

    @cached_property
    def _tails(self) -> Tails:
        return Tails(self.hf, self._wrapped, self._plain)

    @cached_property
    def _plain(self) -> Blocks:
        """The blocks of a copy without a wrapper, for tails."""
        assert self._wrapped.blocks is not None
        return Blocks(copy_sharing_weights(self.hf), self._wrapped.blocks.path)

    def _check_stop(self, stop: int, hooks: Hooks, at: Tensor | None) -> None:
        if not 0 < stop <= self.n_layers or at is not None:
            raise ModelError(f"stop_at_layer must lie in 1 to {self.n_layers}, and excludes `at`")
        for name, _ in hooks:
            layer = layer_of(name)
            if layer is None or layer >= stop:
                raise ModelError(f"hook {name!r} would never run: the pass stops at layer {stop}")

    def _module(self, site: Site) -> Any:
        block = self.bridge.blocks[self.check_layer(site.layer)]
        return block.get_submodule(PROJECTION_MODULES[site.projection]).original_component

    def _check_sites(self) -> None:
        """Every site must be one plain matrix that the copy and `hf` share; hooks must exist."""
        if not hasattr(self.bridge, "blocks"):
            raise ModelError(f"{self.name!r} is not a stack of decoder blocks; it cannot be edited")
        from transformers.pytorch_utils import Conv1D

        hooks, linear = self._wrapped.hooks, (nn.Linear, Conv1D)
        for site in (Site(n, p) for n in range(self.n_layers) for p in get_args(Projection)):
            what = {"attn": "attention", "mlp": "MLP"}[site.projection]
            if self.key_hook(site) not in hooks or not isinstance(self._module(site), linear):
                raise ModelError(
                    f"layer {site.layer} of {self.name!r} has no single {what} output projection "
                    "(as in a mixture of experts or a recurrent layer), so it cannot be edited"
                )
            if id(self.parameter(site)) not in self._names:
                raise ModelError(
                    f"the wrapped copy of {self.name!r} does not share the weight at {site} with "
                    "the model, so an edit would be lost: this architecture is not supported"
                )
