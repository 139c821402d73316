"""The tail of a model: its blocks from one layer on, run alone on a recorded residual stream.

What changes at a layer cannot change the layers below, so they need not run again. `Tails` makes
them and tests them on a small batch against the whole model. Where hooks allow it, a tail runs
without TransformerLens's wrapper, which is cheaper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pmet_lens.models.bridge import (
    Blocks,
    Hook,
    Hooks,
    Past,
    Wrapped,
    arguments,
    frozen,
    picked,
)
from pmet_lens.models.sites import PROJECTION_MODULES, STREAM_HOOKS, ModelError, layer_of

_ROUNDINGS = 30
"""A pass after a past may differ by what so many roundings of its input do."""


class Unwrapped:
    """A copy of a model without a wrapper, fed at block `first`: cheaper than a bridge.

    `blocks` are those of the copy; `head` and `mlp` the names of the unembedding and of the last
    block's MLP; `hooks` the modules whose output a hook of a bridge sees, by the name of that hook.
    Where logits are wanted at some tokens only, that MLP runs on these alone: nothing reads what it
    would write elsewhere.
    """

    def __init__(
        self, blocks: Blocks, first: int, head: str, mlp: str | None, hooks: Mapping[str, str]
    ) -> None:
        self.blocks, self.first, model = blocks, first, blocks.model
        self._names = head, mlp
        self.hooks = {name: model.get_submodule(path) for name, path in hooks.items()}
        self._entry, self._head = blocks.all[first], model.get_submodule(head)
        self._mlp = None if mlp is None else model.get_submodule(mlp)
        self._parameters = list(model.parameters())

    def later(self, first: int) -> Unwrapped:
        """The same copy, fed at a later block."""
        return Unwrapped(self.blocks, first, *self._names, {})

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
        passed = arguments(ids, mask, past)

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (entering, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": entering}

        def pick(_: nn.Module, args: tuple[Any, ...]) -> Any:
            return args if at is None else (picked(args[0], at)[None],)

        def spread(_: nn.Module, __: Any, out: Tensor) -> Tensor:
            where = at.to(out.device).unbind(1)  # type: ignore[union-attr]
            return out.new_zeros(*ids.shape, out.shape[-1]).index_put(where, out[0])

        def on_output(hook: Hook) -> Any:
            return lambda _, __, out: hook(out)

        handles = [self._head.register_forward_pre_hook(pick)]
        handles += [self.hooks[n].register_forward_hook(on_output(hook)) for n, hook in hooks]
        if entering.ndim == 3:
            handles.append(self._entry.register_forward_pre_hook(enter, with_kwargs=True))
        watched = bool(hooks) and self.first == len(self.blocks.all) - 1  # a hook sees every token
        if at is not None and self._mlp is not None and not watched:
            handles.append(self._mlp.register_forward_pre_hook(pick))
            handles.append(self._mlp.register_forward_hook(spread))
        try:
            with frozen(self._parameters), self.blocks.starting_at(self.first):
                logits = self.blocks.model(ids, **passed).logits
        finally:
            for handle in handles:
                handle.remove()
        return (logits if at is None else logits[0]).to(mask.device)


@dataclass(frozen=True)
class Tail:
    """The blocks of a model from `first` on, fed the residual stream that enters them.

    `wrapped`: the whole model, of which only these blocks run. `unwrapped`: the same without the
    wrapper, which runs where hooks lie only at the entry and at the projections of block `first`.
    `Model.from_layer` makes one.
    """

    wrapped: Wrapped
    first: int
    unwrapped: Unwrapped | None = None
    has_past: bool = False
    """Whether `past` can be used."""
    window: int | None = None
    """How far back the shortest sliding window reaches, in tokens. It counts what is padding
    between a past and what runs after it, too: together they must not be longer."""

    def forward(
        self,
        residual: Float[Tensor, "batch token d_model"],
        attention_mask: Int[Tensor, "batch token"],
        *,
        hooks: Hooks = (),
        at: Int[Tensor, "n 2"] | None = None,
        past: Past | None = None,
        stop_at_layer: int | None = None,
    ) -> Float[Tensor, "batch token vocab"] | Float[Tensor, "n vocab"]:
        """Logits from the recorded `resid_pre` of block `first`; the rest as `Model.forward`, with
        the layer numbers of the whole model.

        With `past` (from `Tail.past`) residual, mask, hooks and `at` are those of the tokens
        after it.
        """
        for name, _ in hooks:
            self._check(name)
        names = () if self.unwrapped is None else (self._entry, *self.unwrapped.hooks)
        if self.unwrapped and stop_at_layer is None and all(n in names for n, _ in hooks):
            for name, hook in hooks:
                changed = hook(residual) if name == self._entry else None
                residual = residual if changed is None else changed
            inner = [(name, hook) for name, hook in hooks if name != self._entry]
            return self.unwrapped.run(residual, attention_mask, at, past, inner)
        return self.wrapped.run(
            _no_ids(residual),
            attention_mask,
            [(self._entry, lambda _: residual), *hooks],
            at=at,
            past=past,
            stop_at_layer=stop_at_layer,
            first=self.first,
        )

    def past(
        self, residual: Float[Tensor, "batch token d_model"], length: Int[Tensor, " batch"]
    ) -> Past:
        """Keys and values of the first `length` tokens of each row, so that only the tokens after
        them need to run again; of at least one row at least one token."""
        residual = residual[:, : int(length.max())]
        place = torch.arange(residual.shape[1], device=residual.device)
        # A row without a past runs one token, for attention to have something, which is not kept.
        mask = (place < length.clamp(min=1)[:, None]).long()
        entry = [(self._entry, lambda _: residual)]
        layers = self.wrapped.read_past(_no_ids(residual), mask, entry, self.first)
        return Past(layers, (place < length[:, None]).long(), self.first)

    def later(self, first: int) -> Tail:
        """From a later block on. What was tested of this tail is taken to hold for it."""
        unwrapped = None if self.unwrapped is None else self.unwrapped.later(first)
        return replace(self, first=first, unwrapped=unwrapped)

    def resumes(self, start: Int[Tensor, " batch"], mask: Int[Tensor, "batch token"]) -> bool:
        """Whether these rows can run from token `start` on, after a past."""
        past, rest = int(start.max()), int((mask.sum(1) - start).max())
        reaches = self.window is None or past + rest <= self.window
        return self.has_past and past > 0 and reaches

    @property
    def _entry(self) -> str:
        return f"blocks.{self.first}.hook_in"

    def _check(self, name: str) -> None:
        layer = layer_of(name)
        if layer is None or layer < self.first:
            raise ModelError(f"hook {name!r} lies below block {self.first}, where this tail starts")


def _no_ids(residual: Tensor) -> Int[Tensor, "batch token"]:
    """Ids that only give the batch its shape: what they embed to is replaced."""
    return torch.zeros(residual.shape[:2], dtype=torch.long, device=residual.device)


class Tails:
    """The tails of a model, made when asked for: of `whole`, and of `plain`, a copy without a
    wrapper. What can be used is tested once, in the middle of the model, since its blocks are
    alike; that the logits are those of the whole model again for a tail that begins below."""

    def __init__(self, hf: Any, whole: Wrapped, plain: Blocks) -> None:
        self._hf, self._whole, self._plain = hf, whole, plain
        self._middle, self._made = len(plain.all) // 2, dict[int, Tail]()

    def __getitem__(self, first: int) -> Tail:
        """The blocks from `first` on. Raises `ModelError` where they do not give the logits of the
        whole model."""
        if first not in self._made:
            known = None if first == self._middle else self[self._middle]
            tail, unwrapped = self._begun(first)
            if known is None or (first and not any(0 < n < first for n in self._made)):
                device = self._hf.get_input_embeddings().weight.device
                known = _tested(tail, unwrapped, self._whole, device, known)
            if not (known.unwrapped and known.unwrapped.hooks):
                unwrapped.hooks = {}
            usable = None if known.unwrapped is None else unwrapped
            self._made[first] = replace(tail, unwrapped=usable, has_past=known.has_past)
        return self._made[first]

    def _begun(self, first: int) -> tuple[Tail, Unwrapped]:
        whole, plain = self._whole, self._plain
        components = whole.bridge.adapter.component_mapping
        path, head = components["blocks"].name, components["unembed"].name
        mlp = components["blocks"].submodules["mlp"].name
        last_mlp = None if mlp is None else f"{path}.{len(plain.all) - 1}.{mlp}"
        names = {id(p): n for n, p in self._hf.named_parameters()}
        projections: dict[str, str] = {}
        for module in PROJECTION_MODULES.values():
            weight = whole.bridge.blocks[first].get_submodule(module).original_component.weight
            inside = names[id(weight)].rpartition(".")[0]
            projections[f"blocks.{first}.{module}.hook_out"] = inside
        unwrapped = Unwrapped(plain, first, head, last_mlp, projections)
        reach = [getattr(self._hf.config, name, None) for name in ("sliding_window", "window_size")]
        window = min((n for n in reach if isinstance(n, int)), default=None)
        return Tail(whole, first, unwrapped, window=window), unwrapped


def _tested(
    tail: Tail, unwrapped: Unwrapped, whole: Wrapped, device: torch.device, known: Tail | None
) -> Tail:
    """Compare the tail with the whole model on a small batch. What does not give the same is not
    used: the unwrapped copy (some wrapped norms compute in float64 what transformers does in
    float32), hooks at its projections (some families flatten the tokens around their MLP), and a
    past (with a plain cache, sliding windows differ). Where that is `known`, of another tail of the
    model, only the logits are compared."""
    ids = torch.arange(18, device=device).reshape(3, 6)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    start = torch.tensor([3, 1, 0], device=device)
    at = torch.tensor([[0, 2], [1, 3]], device=device)
    recorded: list[Tensor] = []
    shapes: set[torch.Size] = set()

    def push(value: Tensor) -> Tensor:
        shapes.add(value.shape)
        return value + torch.linspace(-1, 1, value.shape[-1]).to(value)

    def both_ways(residual: Tensor, mask: Tensor, hooks: Hooks = (), **more: Any) -> list[Tensor]:
        """Logits of the tail as it runs, and wrapped, as a hook at the block's output makes it."""
        return [tail.forward(residual, mask, hooks=h, **more) for h in (hooks, [*hooks, watched])]

    def hook_name(stream: str) -> str:
        return f"blocks.{tail.first}.{STREAM_HOOKS[stream]}"

    def after_start(value: Tensor) -> Tensor:
        """Every row's three tokens from `start` on; the last row has no past."""
        return torch.stack([value[i, n : n + 3] for i, n in enumerate(start.tolist())])

    def error(one: Tensor, other: Tensor) -> Tensor:
        return (one - other)[mask.bool()].abs().max()

    watched = (hook_name("resid_post"), lambda _: None)
    with torch.no_grad():
        keep = (hook_name("resid_pre"), lambda value: recorded.append(value.to(device)))
        wanted = whole.run(ids, mask, [keep])
        wrapped = tail.forward(residual := recorded[0], mask, hooks=[watched])
        # The same operations on the same numbers: 1000 roundings are generous.
        eps, largest = torch.finfo(wanted.dtype).eps, wanted[mask.bool()].abs().max()
        exact = min(1e3 * eps, 1e-2) * largest
        if not error(wanted, wrapped) <= exact:
            raise ModelError(
                f"{whole.name!r} does not give the same logits when started at block "
                f"{tail.first}: run the whole model with Model.forward"
            )
        if known is not None:
            return known
        plain, picked = tail.forward(residual, mask), tail.forward(residual, mask, at=at)
        pushed = both_ways(residual, mask, [(hook_name(s), push) for s in ("attn_out", "mlp_out")])
        nudge = torch.linspace(-1, 1, residual.shape[-1]).to(residual).cos()
        nudged = tail.forward(residual * (1 + eps * nudge), mask)
        past = tail.past(residual, start)
        resumed = both_ways(after_start(residual), torch.ones_like(ids[:, :3]), past=past)
    # After a past the sums are ordered otherwise, and some attention is computed in float32 in any
    # dtype; a model may make much of a rounding (SmolLM2's first token has a state far larger than
    # the others).
    close = max(min(1e2 * eps, 0.05), 1e-5) * largest
    close = max(close, min(_ROUNDINGS * error(plain, nudged), 1e-3 * largest))
    if not (error(*pushed) <= exact and shapes == {residual.shape}):
        unwrapped.hooks = {}
    same = error(wanted, plain) <= exact
    same = same and (picked - wanted[at[:, 0], at[:, 1]]).abs().max() <= exact
    has_past = all(bool((after_start(wanted) - r).abs().max() <= close) for r in resumed)
    return replace(tail, unwrapped=unwrapped if same else None, has_past=has_past)
