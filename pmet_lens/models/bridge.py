"""A copy of a model that shares its weights, and two ways to run it with hooks that never stay.

TransformerLens wraps a model in place, and a wrapped model can no longer be saved. So a copy is
wrapped: copied modules, the very same parameters and buffers, no extra memory. `Wrapped` runs such
a copy through TransformerLens's bridge, `Unwrapped` runs one without it, which is cheaper. Only
this file imports `transformer_lens`, inside a function because that alone takes seconds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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


def drop_blocks(model: Any, path: str, first: int) -> None:
    """Let the block list at `path` begin at block `first`, in the modules and in the config.

    Changes `model` in place: a copy, never a user's model.
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


@dataclass(frozen=True)
class Past:
    """Keys and values of the first tokens of each row, which nothing later can change."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    """Per block the keys and values, `[row, head, token, d_head]`."""
    mask: Int[Tensor, "row token"]
    """1 for the tokens a row has, then 0."""

    def of(self, blocks: slice) -> Past:
        """That of some of the blocks."""
        return Past(self.layers[blocks], self.mask)

    def __getitem__(self, rows: Tensor) -> Past:
        """The chosen rows."""
        layers = [(k[rows.to(k.device)], v[rows.to(v.device)]) for k, v in self.layers]
        return Past(tuple(layers), self.mask[rows])

    def arguments(self, mask: Int[Tensor, "row token"]) -> dict[str, Any]:
        """What a forward pass over the tokens after it, which `mask` is of, takes."""
        from transformers import DynamicCache

        cache = DynamicCache()  # a fresh one: the pass lengthens it
        for number, (keys, values) in enumerate(self.layers):
            cache.update(keys, values, number)
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
    ) -> Tensor:
        """One forward pass; see `Model.forward`. The hooks are gone afterwards, also on errors.

        With `past`, `ids` and `mask` are those of the tokens after it.
        """
        arguments = _arguments(ids, mask, past)
        for name, _ in hooks:
            if name not in self.hooks:
                raise ModelError(
                    f"there is no hook {name!r}; see Model.stream_hook, Model.key_hook"
                )
        if at is not None:
            # Here and not before the final norm: GPT-2 reshapes to [batch, token] in between.
            hooks = [*hooks, (_HEAD, lambda value: _picked(value, at)[None])]
        with _frozen(self._parameters), self.bridge.hooks(fwd_hooks=_as_bridge_hooks(hooks)):
            out = self.bridge(ids, stop_at_layer=stop_at_layer, **arguments)
        return (out if at is None else out[0]).to(ids.device)

    def read_past(
        self,
        ids: Int[Tensor, "batch token"],
        mask: Int[Tensor, "batch token"],
        hooks: Hooks,
    ) -> tuple[tuple[Tensor, Tensor], ...]:
        """The keys and values of every block, as `Past.layers`, without gradients."""
        # Nobody reads the logits.
        hooks = [*hooks, (_HEAD, lambda value: value[:1, :1])]
        with torch.no_grad(), self.bridge.hooks(fwd_hooks=_as_bridge_hooks(hooks)):
            _, cache = self.bridge(
                ids, attention_mask=mask, use_cache=True, return_type="logits_and_cache"
            )
        return tuple((layer.keys, layer.values) for layer in cache.layers)


class Unwrapped:
    """A copy of a model without a wrapper, fed at its first block: cheaper than a bridge.

    `entry`, `head` and `mlp` are the names of the first block, of the unembedding and of the last
    block's MLP in `model`; `hooks` the modules whose output a hook of a bridge sees, by the name of
    that hook. Where logits are wanted at some tokens only, that MLP runs on these alone: nothing
    reads what it would write elsewhere.
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
        hooks: Hooks = (),
    ) -> Float[Tensor, "batch token vocab"] | Float[Tensor, "n vocab"]:
        """As `Tail.forward`; of token ids, where no block was left out."""
        ids = entering if entering.ndim == 2 else torch.zeros_like(mask)
        arguments = _arguments(ids, mask, past)

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (entering, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": entering}

        def pick(_: nn.Module, args: tuple[Any, ...]) -> Any:
            return args if at is None else (_picked(args[0], at)[None],)

        def spread(_: nn.Module, __: Any, out: Tensor) -> Tensor:
            where = at.to(out.device).unbind(1)  # type: ignore[union-attr]
            return out.new_zeros(*ids.shape, out.shape[-1]).index_put(where, out[0])

        def on_output(hook: Hook) -> Any:
            return lambda _, __, out: hook(out)

        handles = [self._head.register_forward_pre_hook(pick)]
        handles += [self.hooks[n].register_forward_hook(on_output(hook)) for n, hook in hooks]
        if entering.ndim == 3:
            handles.append(self._entry.register_forward_pre_hook(enter, with_kwargs=True))
        if at is not None and self._mlp is not None:
            handles.append(self._mlp.register_forward_pre_hook(pick))
            handles.append(self._mlp.register_forward_hook(spread))
        try:
            with _frozen(self._parameters):
                logits = self.model(ids, **arguments).logits
        finally:
            for handle in handles:
                handle.remove()
        return (logits if at is None else logits[0]).to(mask.device)


def _arguments(ids: Tensor, mask: Tensor, past: Past | None) -> dict[str, Any]:
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
