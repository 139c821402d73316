"""A copy of a model that shares its weights, run with hooks that never stay.

TransformerLens wraps a model in place, and a wrapped model can no longer be saved. So a copy is
wrapped: copied modules, the very same parameters and buffers, no extra memory. `Wrapped` runs such
a copy through TransformerLens's bridge, from any block on. Only this file imports
`transformer_lens`, inside a function because that alone takes seconds.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pmet_lens.models.sites import ModelError

Hook = Callable[[Tensor], Tensor | None]
"""Gets an activation; returns its replacement (a changed clone), or None to leave it."""
Hooks = Sequence[tuple[str, Hook]]
"""Hook names, each with its function."""
_HEAD = "unembed.hook_in"
_UNREAD = (_HEAD, lambda value: value[:1, :1])
"""Where nobody reads the logits: those of one token."""


def copy_sharing_weights(hf: nn.Module) -> nn.Module:
    """A copy of the modules, in eval mode, that holds the same parameters and buffers."""
    tensors = [*hf.parameters(), *hf.buffers()]
    return copy.deepcopy(hf, {id(tensor): tensor for tensor in tensors}).eval()


def speaking(hf: nn.Module) -> Any:
    """A copy that shares the weights, for `generate`: nothing of the model's own generation
    settings (sampling, penalties, more end tokens) is left in it."""
    from transformers import GenerationConfig

    model: Any = copy_sharing_weights(hf)
    model.generation_config = GenerationConfig()
    return model


class Blocks:
    """The block list of a model (a copy, never a user's model), which may begin later for a pass.

    `path`: where it lies in `model`.
    """

    def __init__(self, model: Any, path: str) -> None:
        self.model, self.path, parent = model, path, path.rpartition(".")[0]
        self.parent, self.attribute = model.get_submodule(parent), path.rpartition(".")[2]
        self._list: nn.ModuleList = getattr(self.parent, self.attribute)
        self.all = list(self._list)
        # Gemma-2 and GPT-Neo choose the mask (sliding window or not) by position in these lists.
        lists = {n: getattr(model.config, n, None) for n in ("layer_types", "attention_layers")}
        self._lists = {name: value for name, value in lists.items() if value is not None}
        self._lock = threading.RLock()

    @contextmanager
    def starting_at(self, first: int) -> Iterator[None]:
        """A block in which the list begins at block `first`. One thread at a time is in it."""
        with self._lock:
            try:
                self._begin(first)
                yield
            finally:
                self._begin(0)

    def _begin(self, first: int) -> None:
        if len(getattr(self.parent, self.attribute)) == len(self.all) - first:
            return
        kept = nn.ModuleList(self.all[first:]) if first else self._list
        kept.training = self._list.training
        setattr(self.parent, self.attribute, kept)
        for name, value in self._lists.items():
            setattr(self.model.config, name, value[first:])


@dataclass(frozen=True)
class Past:
    """Keys and values of the first tokens of each row, which nothing later can change."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    """Per block the keys and values, `[row, head, token, d_head]`."""
    mask: Int[Tensor, "row token"]
    """1 for the tokens a row has, then 0."""
    first: int
    """The number of the first of these blocks."""

    def of(self, start: int, stop: int | None = None) -> Past:
        """That of some of the blocks, counted from `first`."""
        return Past(self.layers[start:stop], self.mask, self.first + start)

    def __getitem__(self, rows: Tensor) -> Past:
        """The chosen rows."""
        layers = [(k[rows.to(k.device)], v[rows.to(v.device)]) for k, v in self.layers]
        return Past(tuple(layers), self.mask[rows], self.first)

    def arguments(self, mask: Int[Tensor, "row token"]) -> dict[str, Any]:
        """What a forward pass over the tokens after it, which `mask` is of, takes."""
        from transformers import DynamicCache

        cache: Any = DynamicCache()  # a fresh one: the pass lengthens it
        for number, (keys, values) in enumerate(self.layers):
            cache.update(keys, values, number)
        # Blocks keep their numbers; those below do not run, but the first is asked for its length.
        cache.layers = self.first * [cache.layers[0]] + cache.layers
        place = self.mask.sum(1, keepdim=True) + torch.arange(mask.shape[1], device=mask.device)
        return {
            "past_key_values": cache,
            "use_cache": True,
            "position_ids": place.masked_fill(mask == 0, 0),
            "attention_mask": torch.cat([self.mask, mask], dim=1),
        }


class Wrapped:
    """A copy of a model in TransformerLens's bridge, in eval mode like the copy itself.

    Raises `ModelError` for an architecture that TransformerLens cannot wrap; `name` is what the
    message calls it.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        architecture = type(model).__name__
        config: Any = model.config
        try:
            bridge = build_bridge_from_module(model, architecture, hf_config=config)
        except (ValueError, NotImplementedError) as error:
            raise ModelError(f"TransformerLens cannot wrap {name!r} ({architecture})") from error
        self.bridge: Any = bridge.eval()
        self.name = name
        self.blocks: Blocks | None = None
        """None for a model that is no stack of blocks."""
        if "blocks" in self.bridge.adapter.component_mapping:
            self.blocks = Blocks(model, self.bridge.adapter.component_mapping["blocks"].name)
        # Kept here: the bridge collects them anew whenever it is asked.
        self.hooks = frozenset(self.bridge.hook_dict)
        self._parameters = list(self.bridge.parameters())

    def run(
        self,
        ids: Int[Tensor, "batch token"],
        mask: Int[Tensor, "batch token"],
        hooks: Hooks = (),
        *,
        at: Int[Tensor, "n 2"] | None = None,
        stop_at_layer: int | None = None,
        past: Past | None = None,
        first: int = 0,
    ) -> Tensor:
        """One forward pass; see `Model.forward`. The hooks are gone afterwards, also on errors.

        With `past`, `ids` and `mask` are those of the tokens after it. Blocks below `first` do not
        run; a hook has to replace what enters that one.
        """
        passed = arguments(ids, mask, past)
        for name, _ in hooks:
            if name not in self.hooks:
                raise ModelError(
                    f"there is no hook {name!r}; see Model.stream_hook, Model.key_hook"
                )
        if at is not None:
            # Here and not before the final norm: GPT-2 reshapes to [batch, token] in between.
            hooks = [*hooks, (_HEAD, lambda value: picked(value, at)[None])]
        end: list[Tensor] = []
        n_blocks = None if self.blocks is None else len(self.blocks.all)
        if stop_at_layer is not None and stop_at_layer == n_blocks:
            # Told to stop there, the bridge would go on to the logits of every token.
            hooks = [*hooks, (f"blocks.{stop_at_layer - 1}.hook_out", end.append), _UNREAD]
            stop_at_layer = None
        with (
            frozen(self._parameters),
            self.bridge.hooks(fwd_hooks=_as_bridge_hooks(hooks)),
            self._starting_at(first),
        ):
            out = self.bridge(ids, stop_at_layer=stop_at_layer, **passed)
        out = end[0] if end else out
        return (out if at is None else out[0]).to(ids.device)

    def read_past(
        self,
        ids: Int[Tensor, "batch token"],
        mask: Int[Tensor, "batch token"],
        hooks: Hooks,
        first: int,
    ) -> tuple[tuple[Tensor, Tensor], ...]:
        """The keys and values of every block from `first` on, as `Past.layers`, without
        gradients."""
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        hooks = [*hooks, _UNREAD]
        with (
            torch.no_grad(),
            self.bridge.hooks(fwd_hooks=_as_bridge_hooks(hooks)),
            self._starting_at(first),
        ):
            self.bridge(ids, attention_mask=mask, use_cache=True, past_key_values=cache)
        return tuple((layer.keys, layer.values) for layer in cache.layers[first:])

    def _starting_at(self, first: int) -> AbstractContextManager[None]:
        return nullcontext() if self.blocks is None else self.blocks.starting_at(first)


def arguments(ids: Tensor, mask: Tensor, past: Past | None) -> dict[str, Any]:
    """What a pass takes beside the ids. Raises `ModelError` for rows not padded on the right."""
    if ids.shape != mask.shape:
        raise ModelError(f"ids {list(ids.shape)} and mask {list(mask.shape)} differ in shape")
    if not bool((mask[:, 0] == 1).all() and (mask[:, 1:] <= mask[:, :-1]).all()):
        raise ModelError("pad on the right: every row of the mask must be ones, then zeros")
    # Ids and mask only: GPT-J embeds token_type_ids, when given, into every position.
    alone = {"attention_mask": mask, "use_cache": False}
    return alone if past is None else past.arguments(mask)


def _as_bridge_hooks(hooks: Hooks) -> list[tuple[str, Any]]:
    return [(name, _as_bridge_hook(hook, name)) for name, hook in hooks]


def _as_bridge_hook(function: Hook, name: str) -> Callable[..., Tensor | None]:
    def bridge_hook(value: Tensor, hook: Any) -> Tensor | None:
        if value.ndim < 4 or name.endswith("hook_pattern"):
            return function(value)
        # The key of W_O comes as [batch, token, head, d_head].
        changed = function(value.flatten(2))
        return None if changed is None else changed.reshape(value.shape)

    return bridge_hook


@contextmanager
def head_together(bridge: Any) -> Iterator[None]:
    """A block in which the final norm takes and gives tensors on the unembedding's device: under a
    `device_map` it may lie on another, and run alone nothing moves them."""
    norm, home = bridge.ln_final, bridge.W_U.device
    on = next((p.device for p in norm.parameters()), home)
    handles = [
        norm.register_forward_pre_hook(lambda _, args: (args[0].to(on),)),
        norm.register_forward_hook(lambda _, __, out: out.to(home)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def unembedded(bridge: Any, states: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocab"]:
    """The logits of residual streams after the last block: final norm, unembedding, soft cap."""
    with torch.no_grad(), head_together(bridge):
        normed = bridge.ln_final(states.to(bridge.W_U)[None])[0]
        logits = (normed @ bridge.W_U).add_(bridge.b_U)
        return bridge.adapter.apply_output_logits_transform(logits)


def picked(value: Tensor, at: Int[Tensor, "n 2"]) -> Float[Tensor, "n d"]:
    """The (row, token) pairs `at` of an activation."""
    return value[at.to(value.device).unbind(1)]


@contextmanager
def frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Keep autograd from recording for weight gradients that nobody asks for.

    Without this, activations of every block are kept, also below the change. The flags are the
    user's (the parameters are shared), so they are put back as soon as the pass is over.
    """
    learning: list[nn.Parameter] = []
    if torch.is_grad_enabled():
        learning = [p for p in parameters if p.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
