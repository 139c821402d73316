"""Read a stream or a key at chosen positions, or add a vector there; nothing stays hooked.

Reading keeps only the wanted positions (one token per row) and stops at the highest layer needed.
Positions count from 0 at the left; a position on padding is an error, because its value means
nothing and looks like any other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pmet_lens.models.bridge import Hook
from pmet_lens.models.model import Model
from pmet_lens.models.sites import ModelError, Site, Stream, layer_of


def read_streams(
    model: Model,
    ids: Int[Tensor, "batch token"],
    mask: Int[Tensor, "batch token"],
    wanted: Mapping[tuple[int, Stream], Int[Tensor, "batch ..."]],
) -> dict[tuple[int, Stream], Float[Tensor, "batch ... d_model"]]:
    """The values of streams, each at one position per row (or at several of them), in one pass.

    `wanted` maps (layer, stream) to the positions. Raises `ModelError` for a layer or stream that
    does not exist, or a position outside the row's text.
    """
    places = {model.stream_hook(*key): positions for key, positions in wanted.items()}
    found = _read(model, ids, mask, places)
    return {key: found[model.stream_hook(*key)] for key in wanted}


def read_keys(
    model: Model,
    ids: Int[Tensor, "batch token"],
    mask: Int[Tensor, "batch token"],
    site: Site,
    positions: Int[Tensor, " batch"],
) -> Float[Tensor, "batch d_in"]:
    """The keys of a site: the input of its projection at one position per row.

    Raises `ModelError` as `read_streams` does.
    """
    name = model.key_hook(site)
    return _read(model, ids, mask, {name: positions})[name]


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


def _read(
    model: Model, ids: Tensor, mask: Tensor, places: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def keep(name: str, positions: Tensor) -> Hook:
        def hook(value: Tensor) -> None:
            found[name] = value[_rows_and(positions, value)].to(ids.device)

        return hook

    for positions in places.values():
        _check_positions(positions, mask)
    stop = 1 + max((layer_of(name) or 0 for name in places), default=0)
    hooks = [(name, keep(name, positions)) for name, positions in places.items()]
    with torch.no_grad():
        model.forward(ids, mask, hooks=hooks, stop_at_layer=stop)
    return found


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
