"""A second body for a model's weights, and how to run it with hooks that never stay.

TransformerLens wraps a model in place, and a wrapped model can no longer be saved. So what gets
wrapped is a *twin*: copied modules, the very same parameters and buffers, no extra memory.
`run` takes a wrapped twin (a bridge); wrapping itself is done in `model.py`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pmet_lens.models.loading import ModelError

Hook = Callable[[Tensor], Tensor | None]
"""Gets an activation; returns its replacement (a changed clone), or None to leave it."""


def twin(hf: nn.Module) -> nn.Module:
    """A copy of the modules, in eval mode, that holds the same parameters and buffers."""
    tensors = [*hf.parameters(), *hf.buffers()]
    return copy.deepcopy(hf, {id(tensor): tensor for tensor in tensors}).eval()


def drop_blocks(model: Any, path: str, first: int) -> None:
    """Let the block list at `path` begin at block `first`, in the modules and in the config.

    Changes `model` in place: a twin, never a user's model.
    """
    parent, _, attribute = path.rpartition(".")
    blocks = getattr(model.get_submodule(parent), attribute)
    kept = nn.ModuleList(list(blocks)[first:])
    setattr(model.get_submodule(parent), attribute, kept)
    modules: list[Any] = list(kept.modules())
    for module in modules:
        for name in ("layer_idx", "layer_id"):  # where its keys and values lie in a cache
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, getattr(module, name) - first)
    model.config.num_hidden_layers = len(blocks) - first
    # Gemma-2 and GPT-Neo choose the mask (sliding window or not) by position in these lists.
    for name in ("layer_types", "attention_layers"):
        if getattr(model.config, name, None) is not None:
            setattr(model.config, name, getattr(model.config, name)[first:])


def run(
    bridge: Any,
    ids: Int[Tensor, "batch token"],
    mask: Int[Tensor, "batch token"],
    hooks: Sequence[tuple[str, Hook]] = (),
    *,
    at: Int[Tensor, "n 2"] | None = None,
    stop_at_layer: int | None = None,
    past: Past | None = None,
    known: Container[str],
) -> Tensor:
    """One forward pass; see `Model.forward`. The hooks are gone afterwards, also on errors.

    `known`: the names of the bridge's hooks (it collects them anew whenever it is asked). With
    `past`, `ids` and `mask` are those of the tokens behind it.
    """
    _check_batch(ids, mask)
    for name, _ in hooks:
        if name not in known:
            raise ModelError(f"there is no hook {name!r}; see Model.stream_hook, Model.key_hook")
    if at is not None:
        # Here and not before the final norm: GPT-2 reshapes to [batch, token] in between.
        hooks = [*hooks, ("unembed.hook_in", lambda value: _picked(value, at)[None])]
    forward_hooks = _as_bridge_hooks(hooks)
    # Ids and mask only: GPT-J embeds token_type_ids, when given, into every position.
    more: dict[str, Any] = {"use_cache": False, "stop_at_layer": stop_at_layer}
    if past is not None:
        more.update(past_key_values=past.cache(), use_cache=True)
        more["position_ids"] = past.positions(mask)
        mask = torch.cat([past.mask, mask], dim=1)
    parameters = list(bridge.parameters()) if torch.is_grad_enabled() else []
    with _frozen(parameters), bridge.hooks(fwd_hooks=forward_hooks):
        out = bridge(ids, attention_mask=mask, **more)
    return (out if at is None else out[0]).to(ids.device)


_ENTRY = "blocks.0.hook_in"


@dataclass(frozen=True)
class Past:
    """Keys and values of the first tokens of each row, which nothing later can change."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    """Per block the keys and values, `[row, head, token, d_head]`."""
    mask: Int[Tensor, "row token"]
    """1 for the tokens a row has, 0 behind them."""

    def of(self, blocks: slice) -> Past:
        """That of some of the blocks."""
        return Past(self.layers[blocks], self.mask)

    def positions(self, mask: Int[Tensor, "row token"]) -> Int[Tensor, "row token"]:
        """Where the tokens behind it, which `mask` is of, stand in their texts."""
        behind = torch.arange(mask.shape[1], device=mask.device)
        return (self.mask.sum(1, keepdim=True) + behind).masked_fill(mask == 0, 0)

    def __getitem__(self, rows: Tensor) -> Past:
        """The chosen rows."""
        layers = [(k[rows.to(k.device)], v[rows.to(v.device)]) for k, v in self.layers]
        return Past(tuple(layers), self.mask[rows])

    def cache(self) -> Any:
        """A fresh cache as transformers wants it; a forward pass lengthens it."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for number, (keys, values) in enumerate(self.layers):
            cache.update(keys, values, number)
        return cache


class Bare:
    """A twin without a wrapper, fed at its first block: cheaper than a bridge.

    `entry`, `head` and `mlp` are the names of the first block, of the unembedding and of the last
    block's MLP in `model`; `hooks` the modules whose output a hook of a bridge sees, by the name of
    that hook. Where logits are wanted at some tokens only, that MLP runs on these
    alone: nothing reads what it would write elsewhere.
    """

    def __init__(
        self, model: nn.Module, entry: str, head: str, mlp: str | None, hooks: Mapping[str, str]
    ) -> None:
        self.model = model
        self.hooks = {name: model.get_submodule(path) for name, path in hooks.items()}
        self._entry, self._head = model.get_submodule(entry), model.get_submodule(head)
        self._mlp = None if mlp is None else model.get_submodule(mlp)
        self._parameters = list(model.parameters())

    def run(
        self,
        entering: Float[Tensor, "batch token d_model"] | Int[Tensor, "batch token"],
        mask: Int[Tensor, "batch token"],
        at: Int[Tensor, "n 2"] | None = None,
        past: Past | None = None,
        hooks: Sequence[tuple[str, Hook]] = (),
    ) -> Float[Tensor, "batch token vocab"] | Float[Tensor, "n vocab"]:
        """As `Tail.forward`; of token ids, where no block was left out."""
        ids = entering if entering.ndim == 2 else torch.zeros_like(mask)
        _check_batch(ids, mask)
        more: dict[str, Any] = {"use_cache": False}
        if past is not None:
            more = {"past_key_values": past.cache(), "use_cache": True}
            more["position_ids"] = past.positions(mask)
            mask = torch.cat([past.mask, mask], dim=1)

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (entering, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": entering}

        def pick(_: nn.Module, args: tuple[Any, ...]) -> Any:
            return args if at is None else (_picked(args[0], at)[None],)

        def spread(_: nn.Module, __: Any, out: Tensor) -> Tensor:
            where = at.to(out.device).unbind(1)  # type: ignore[union-attr]
            return out.new_zeros(*ids.shape, out.shape[-1]).index_put(where, out[0])

        def outside(hook: Hook) -> Any:
            return lambda _, __, out: hook(out)

        handles = [self._head.register_forward_pre_hook(pick)]
        handles += [self.hooks[n].register_forward_hook(outside(hook)) for n, hook in hooks]
        if entering.ndim == 3:
            handles.append(self._entry.register_forward_pre_hook(enter, with_kwargs=True))
        if at is not None and self._mlp is not None:
            handles.append(self._mlp.register_forward_pre_hook(pick))
            handles.append(self._mlp.register_forward_hook(spread))
        try:
            with _frozen(self._parameters):
                logits = self.model(ids, attention_mask=mask, **more).logits
        finally:
            for handle in handles:
                handle.remove()
        return (logits if at is None else logits[0]).to(mask.device)


@dataclass(frozen=True)
class Tail:
    """The blocks of a model from `first` on, fed the residual stream that enters them.

    `bridge`: a wrapped twin whose block list starts there; hook names keep the layer numbers of
    the whole model. `bare`: the same without the wrapper, which runs where hooks lie only at the
    entry and at the projections of block `first`. `Model.from_layer` makes one and tests it against
    the whole model.
    """

    bridge: Any
    first: int
    bare: Bare | None = None
    has_past: bool = False
    """Whether `past` can be used."""
    window: int | None = None
    """How far back the shortest sliding window reaches, in tokens. It counts what is padding
    between a past and what runs behind it, too: together they must not be longer."""
    known: frozenset[str] = frozenset()
    """The names of the hooks of `bridge`."""

    def forward(
        self,
        residual: Float[Tensor, "batch token d_model"],
        attention_mask: Int[Tensor, "batch token"],
        *,
        hooks: Sequence[tuple[str, Hook]] = (),
        at: Int[Tensor, "n 2"] | None = None,
        past: Past | None = None,
        stop_at_layer: int | None = None,
    ) -> Float[Tensor, "batch token vocab"] | Float[Tensor, "n vocab"]:
        """Logits from the recorded `resid_pre` of block `first`; the rest as `Model.forward`, with
        the layer numbers of the whole model.

        With `past` (from `Tail.past`) residual, mask, hooks and `at` are those of the tokens
        behind it.
        """
        shifted = [(self._own_name(name), hook) for name, hook in hooks]
        known = () if self.bare is None else (_ENTRY, *self.bare.hooks)
        if self.bare is not None and stop_at_layer is None and all(n in known for n, _ in shifted):
            for name, hook in shifted:
                changed = hook(residual) if name == _ENTRY else None
                residual = residual if changed is None else changed
            inner = [(name, hook) for name, hook in shifted if name != _ENTRY]
            return self.bare.run(residual, attention_mask, at, past, inner)
        # The ids only give the batch its shape: what they embed to is replaced.
        ids = torch.zeros(residual.shape[:2], dtype=torch.long, device=residual.device)
        injected = [(_ENTRY, lambda _: residual), *shifted]
        stop = None if stop_at_layer is None else stop_at_layer - self.first
        return run(
            self.bridge, ids, attention_mask, injected,
            at=at, past=past, stop_at_layer=stop, known=self.known,
        )  # fmt: skip

    def past(
        self,
        residual: Float[Tensor, "batch token d_model"],
        length: Int[Tensor, " batch"],
    ) -> Past:
        """Keys and values of the first `length` tokens of each row, so that only the tokens behind
        them need to run again; of at least one row at least one token."""
        width = int(length.max())
        residual = residual[:, :width]
        ids = torch.zeros(residual.shape[:2], dtype=torch.long, device=residual.device)
        place = torch.arange(width, device=residual.device)
        # A row without a past runs one token, for attention to have something, which is not kept.
        mask = (place < length.clamp(min=1)[:, None]).long()
        hooks = {
            _ENTRY: lambda _: residual,
            "unembed.hook_in": lambda value: value[:1, :1],  # nobody reads the logits
        }
        with torch.no_grad(), self.bridge.hooks(fwd_hooks=_as_bridge_hooks(hooks.items())):
            _, cache = self.bridge(
                ids, attention_mask=mask, use_cache=True, return_type="logits_and_cache"
            )
        mask = (place < length[:, None]).long()
        return Past(tuple((c.keys, c.values) for c in cache.layers), mask)

    def resumes(self, start: Int[Tensor, " batch"], mask: Int[Tensor, "batch token"]) -> bool:
        """Whether these rows can run from token `start` on, behind a past."""
        past, behind = int(start.max()), int((mask.sum(1) - start).max())
        reaches = self.window is None or past + behind <= self.window
        return self.has_past and past > 0 and reaches

    def _own_name(self, name: str) -> str:
        layer = layer_of(name)
        if layer is None or layer < self.first:
            raise ModelError(f"hook {name!r} lies below block {self.first}, where this tail starts")
        return name.replace(f".{layer}.", f".{layer - self.first}.", 1)


def layer_of(hook_name: str) -> int | None:
    """The layer number in a hook name; None for one outside the blocks."""
    match = re.match(r"blocks\.(\d+)\.", hook_name)
    return None if match is None else int(match[1])


def _as_bridge_hooks(hooks: Iterable[tuple[str, Hook]]) -> list[tuple[str, Any]]:
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


def _picked(value: Tensor, at: Int[Tensor, "n 2"]) -> Float[Tensor, "n d"]:
    """The (row, token) pairs `at` of an activation."""
    return value[at.to(value.device).unbind(1)]


@contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
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


def _check_batch(ids: Tensor, mask: Tensor) -> None:
    if ids.shape != mask.shape:
        raise ModelError(f"ids {list(ids.shape)} and mask {list(mask.shape)} differ in shape")
    if not bool((mask[:, 0] == 1).all() and (mask[:, 1:] <= mask[:, :-1]).all()):
        raise ModelError("pad on the right: every row of the mask must be ones, then zeros")
