"""The tail of a model: its blocks from one layer on, run alone on a recorded residual stream.

What changes at a layer cannot change the layers below, so they need not run again. `make_tail`
builds a tail and tests it on a small batch against the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pmet_lens.models.bridge import (
    Hooks,
    Past,
    Unwrapped,
    Wrapped,
    copy_sharing_weights,
    drop_blocks,
)
from pmet_lens.models.sites import PROJECTION_MODULES, STREAM_HOOKS, ModelError, layer_of

_ENTRY = "blocks.0.hook_in"


@dataclass(frozen=True)
class Tail:
    """The blocks of a model from `first` on, fed the residual stream that enters them.

    `wrapped`: a copy whose block list starts there; hook names keep the layer numbers of the whole
    model. `unwrapped`: the same without the wrapper, which runs where hooks lie only at the entry
    and at the projections of block `first`. `Model.from_layer` makes one.
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
        shifted = [(self._shifted(name), hook) for name, hook in hooks]
        names = () if self.unwrapped is None else (_ENTRY, *self.unwrapped.hooks)
        if self.unwrapped and stop_at_layer is None and all(n in names for n, _ in shifted):
            for name, hook in shifted:
                changed = hook(residual) if name == _ENTRY else None
                residual = residual if changed is None else changed
            inner = [(name, hook) for name, hook in shifted if name != _ENTRY]
            return self.unwrapped.run(residual, attention_mask, at, past, inner)
        hooks = [(_ENTRY, lambda _: residual), *shifted]
        stop = None if stop_at_layer is None else stop_at_layer - self.first
        ids = _no_ids(residual)
        return self.wrapped.run(ids, attention_mask, hooks, at=at, past=past, stop_at_layer=stop)

    def past(
        self, residual: Float[Tensor, "batch token d_model"], length: Int[Tensor, " batch"]
    ) -> Past:
        """Keys and values of the first `length` tokens of each row, so that only the tokens after
        them need to run again; of at least one row at least one token."""
        residual = residual[:, : int(length.max())]
        place = torch.arange(residual.shape[1], device=residual.device)
        # A row without a past runs one token, for attention to have something, which is not kept.
        mask = (place < length.clamp(min=1)[:, None]).long()
        layers = self.wrapped.read_past(_no_ids(residual), mask, [(_ENTRY, lambda _: residual)])
        return Past(layers, (place < length[:, None]).long())

    def resumes(self, start: Int[Tensor, " batch"], mask: Int[Tensor, "batch token"]) -> bool:
        """Whether these rows can run from token `start` on, after a past."""
        past, rest = int(start.max()), int((mask.sum(1) - start).max())
        reaches = self.window is None or past + rest <= self.window
        return self.has_past and past > 0 and reaches

    def _shifted(self, name: str) -> str:
        """The hook name in the shortened copy."""
        layer = layer_of(name)
        if layer is None or layer < self.first:
            raise ModelError(f"hook {name!r} lies below block {self.first}, where this tail starts")
        return name.replace(f".{layer}.", f".{layer - self.first}.", 1)


def _no_ids(residual: Tensor) -> Int[Tensor, "batch token"]:
    """Ids that only give the batch its shape: what they embed to is replaced."""
    return torch.zeros(residual.shape[:2], dtype=torch.long, device=residual.device)


def make_tail(hf: Any, whole: Wrapped, first: int) -> Tail:
    """The blocks of `hf` from `first` on, sharing its weights.

    Raises `ModelError` where it does not give the logits of `whole`, the wrapped model.
    """
    components = whole.bridge.adapter.component_mapping
    path, head = components["blocks"].name, components["unembed"].name
    shortened, plain = copy_sharing_weights(hf), copy_sharing_weights(hf)
    for model in (shortened, plain):
        drop_blocks(model, path, first)
    mlp = components["blocks"].submodules["mlp"].name
    last_mlp = None if mlp is None else f"{path}.{len(whole.bridge.blocks) - 1 - first}.{mlp}"
    names = {id(p): n for n, p in hf.named_parameters()}
    projections: dict[str, str] = {}
    for module in PROJECTION_MODULES.values():
        weight = whole.bridge.blocks[first].get_submodule(module).original_component.weight
        inside = names[id(weight)].removeprefix(f"{path}.{first}.").rpartition(".")[0]
        projections[f"blocks.0.{module}.hook_out"] = f"{path}.0.{inside}"
    unwrapped = Unwrapped(plain, f"{path}.0", head, last_mlp, projections)
    reach = [getattr(hf.config, name, None) for name in ("sliding_window", "window_size")]
    window = min((n for n in reach if isinstance(n, int)), default=None)
    tail = Tail(Wrapped(shortened, whole.name), first, unwrapped, window=window)
    return _tested(tail, unwrapped, whole, hf.get_input_embeddings().weight.device)


def _tested(tail: Tail, unwrapped: Unwrapped, whole: Wrapped, device: torch.device) -> Tail:
    """Compare the tail with the whole model on a small batch. What does not give the same is not
    used: the unwrapped copy (some wrapped norms compute in float64 what transformers does in
    float32), hooks at its projections (some families flatten the tokens around their MLP), and a
    past (with a plain cache, sliding windows differ)."""
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
        wrapped = (hook_name("resid_post"), lambda _: None)
        return [tail.forward(residual, mask, hooks=h, **more) for h in (hooks, [*hooks, wrapped])]

    def hook_name(stream: str) -> str:
        return f"blocks.{tail.first}.{STREAM_HOOKS[stream]}"

    def after_start(value: Tensor) -> Tensor:
        """Every row's three tokens from `start` on; the last row has no past."""
        return torch.stack([value[i, n : n + 3] for i, n in enumerate(start.tolist())])

    def error(one: Tensor, other: Tensor) -> Tensor:
        return (one - other)[mask.bool()].abs().max()

    with torch.no_grad():
        keep = (hook_name("resid_pre"), lambda value: recorded.append(value.to(device)))
        wanted = whole.run(ids, mask, [keep])
        residual = recorded[0]
        plain, wrapped = both_ways(residual, mask)
        picked = tail.forward(residual, mask, at=at)
        pushed = both_ways(residual, mask, [(hook_name(s), push) for s in ("attn_out", "mlp_out")])
        past = tail.past(residual, start)
        resumed = both_ways(after_start(residual), torch.ones_like(ids[:, :3]), past=past)
    eps, largest = torch.finfo(wanted.dtype).eps, wanted[mask.bool()].abs().max()
    # The same operations on the same numbers: 1000 roundings are generous. After a past the sums
    # are ordered otherwise, and some attention is computed in float32 in any dtype.
    exact, close = min(1e3 * eps, 1e-2) * largest, max(1e2 * eps, 1e-5) * largest
    if not error(wanted, wrapped) <= exact:
        raise ModelError(
            f"{whole.name!r} does not give the same logits when started at block {tail.first}: "
            "run the whole model with Model.forward"
        )
    if not (error(*pushed) <= exact and shapes == {residual.shape}):
        unwrapped.hooks = {}
    same = error(wanted, plain) <= exact
    same = same and (picked - wanted[at[:, 0], at[:, 1]]).abs().max() <= exact
    has_past = all(bool((after_start(wanted) - r).abs().max() <= close) for r in resumed)
    return replace(tail, unwrapped=unwrapped if same else None, has_past=has_past)
