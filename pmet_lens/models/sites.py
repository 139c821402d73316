"""The places in a model under fixed names: streams that are read, sites whose weight is written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Stream = Literal[
    "attn_in", "attn_out", "mlp_in", "mlp_out", "resid_pre", "resid_mid", "resid_post",
    "attn_added", "mlp_added",
]  # fmt: skip
"""What can be read at a layer, all `[batch, token, d_model]`. `attn_in` and `mlp_in` are what the
component itself reads, after its norm; `attn_out` and `mlp_out` what its output projection writes;
`attn_added` and `mlp_added` what of it is added to the residual stream: the same, or behind a
post-norm (Gemma 2 and 3, OLMo 2) or a scale (Granite) what these make of it; `resid_pre`,
`resid_mid` and `resid_post` the residual stream before, between and after the two. `resid_pre` of
layer 0 and all that is added make the last `resid_post`. Parallel blocks have no `resid_mid`."""
Projection = Literal["attn", "mlp"]

STREAM_HOOKS = {
    "attn_in": "attn.hook_in",
    "attn_out": "attn.o.hook_out",
    "mlp_in": "mlp.hook_in",
    "mlp_out": "mlp.out.hook_out",
    "resid_pre": "hook_in",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_out",
    "attn_added": "hook_attn_out",
    "mlp_added": "hook_mlp_out",
}
"""TransformerLens's hook of each stream, inside a block."""
_SMALL_GAIN = 0.05
"""Of a norm's root mean square gain: channels below it are left alone rather than blown up."""
_SHORTEST = 0.1
"""Of its length: a vector that a norm undoes anyway is not shortened below it."""
PROJECTION_MODULES = {"attn": "attn.o", "mlp": "mlp.out"}
"""TransformerLens's module of each output projection, inside a block."""


class ModelError(ValueError):
    """A model, layer, stream or batch that cannot be used; the message says what to do."""


@dataclass(frozen=True, order=True)
class Site:
    """A weight that can be written: the output projection of one component of one layer.

    `layer` counts from 0; `projection` is "attn" (`W_O`) or "mlp" (`W_out`). Prints as `5.mlp`.
    Raises `ModelError` for another projection or a negative layer.
    """

    layer: int
    projection: Projection

    def __post_init__(self) -> None:
        check_name("projection", self.projection, get_args(Projection))
        if not isinstance(self.layer, Integral) or self.layer < 0:
            raise ModelError(f"layers count from 0, so there is no layer {self.layer!r}")

    def __str__(self) -> str:
        return f"{self.layer}.{self.projection}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """The inverse of `str(site)`."""
        match = re.fullmatch(r"(\d+)\.(\w+)", text)
        if match is None:
            raise ModelError(f"{text!r} is not a site; write it as '5.mlp' or '5.attn'")
        return cls(int(match[1]), match[2])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Road:
    """How what a projection writes reaches the residual stream: `gain` times it and, behind a
    post-norm (Gemma 2 and 3, OLMo 2), divided by its root mean square. `activations.road` tries it
    out.
    """

    gain: Float[Tensor, " d_model"]
    normed: bool

    @classmethod
    def tell(
        cls, site: Site, tried: Float[Tensor, "3 d_model"], seen: Float[Tensor, "3 d_model"]
    ) -> Road | None:
        """From what came of nothing, of a vector of signs and of another; None: as it is."""
        close = 16 * torch.finfo(seen.dtype).eps
        nothing, signs, other = seen.double().cpu()
        gain, wanted = (signs - nothing) * tried[1], other - nothing
        for found in (cls(gain, normed=False), cls(gain, normed=True)):
            missed = found.reached(tried[2:])[0] - wanted
            if bool(missed.norm() <= max(close, 1e-4) * other.norm()):
                plain = not found.normed and bool(((gain - 1).abs() <= close).all())
                return None if plain else found
        raise ModelError(
            f"what {site} writes reaches the stream through a norm that is not known here (neither "
            "a scale nor an RMS norm), so the stream cannot be edited there"
        )

    def reached(self, written: Float[Tensor, "fact d_model"]) -> Float[Tensor, "fact d_model"]:
        """What enters the stream where the projection writes this (float64)."""
        return self.gain.to(written.device) * written.double() / self._size(written)

    def pushed(
        self, written: Float[Tensor, "fact d_model"], wanted: Float[Tensor, "fact d_model"]
    ) -> Float[Tensor, "fact d_model"]:
        """The change of `written` that changed `reached` by `wanted`, if what the norm divides by
        stayed what it is. Channels of hardly any gain are pushed less."""
        gain = self.gain.to(written.device)
        floor = _SMALL_GAIN * gain.square().mean().sqrt()
        damped = gain.square() + (floor * (gain.abs() < floor)).square()
        return wanted.double() * gain / damped * self._size(written)

    def change(
        self, written: Float[Tensor, "fact d_model"], wanted: Float[Tensor, "fact d_model"]
    ) -> Float[Tensor, "fact d_model"]:
        """The change of `written` after which `reached` has changed by `wanted`.

        Of the vectors that a norm takes there the nearest; where it takes none there (only one
        length can come out), the nearest of those that it takes in this direction.
        """
        moved = written.double() + self.pushed(written, wanted)
        if not self.normed:
            return moved - written
        length = (moved * written).sum(-1, keepdim=True) / moved.square().sum(-1, keepdim=True)
        # A turn by more than a right angle has no nearest vector: it keeps the length.
        same = self._size(written) / self._size(moved)
        return length.where(length > _SHORTEST * same, same) * moved - written

    def _size(self, written: Float[Tensor, "fact d_model"]) -> Tensor:
        """What is divided by: per fact the root mean square, or 1."""
        one = written.new_ones(len(written), 1, dtype=torch.float64)
        return written.double().square().mean(-1, keepdim=True).sqrt() if self.normed else one


def turned(
    start: Float[Tensor, "fact d"], end: Float[Tensor, "fact d"], part: float
) -> Float[Tensor, "fact d"]:
    """The unit vector at this part of the turn from one direction to another."""
    a, b = (v / v.norm(dim=-1, keepdim=True) for v in (start, end))
    angle = (a * b).sum(-1, keepdim=True).clamp(-1, 1).acos()
    found = (((1 - part) * angle).sin() * a + (part * angle).sin() * b) / angle.sin()
    return found.where(angle > 0, a)


def several(given: Any) -> list[Any]:
    """What is given as a list: a single name, number or site is a list of one."""
    return [given] if isinstance(given, (str, Integral, Site)) else list(given)


def check_name(kind: str, given: str, valid: tuple[str, ...]) -> None:
    """Raises `ModelError` unless `given` is one of the `valid` names of its kind."""
    if given not in valid:
        raise ModelError(f"unknown {kind} {given!r}; choose from {', '.join(valid)}")


def layer_of(hook_name: str) -> int | None:
    """The layer number in a hook name; None for one outside the blocks."""
    match = re.match(r"blocks\.(\d+)\.", hook_name)
    return None if match is None else int(match[1])


def ending(hooks: Sequence[str], n_layers: int) -> dict[str, Any]:
    """What ends a pass of `Model.forward` for these hooks alone: after the highest layer of theirs,
    or with the logits of one token, because nobody reads them."""
    stop = 1 + max((layer_of(name) or 0 for name in hooks), default=0)
    one = torch.zeros(1, 2, dtype=torch.long)
    return {"stop_at_layer": stop} if stop < n_layers else {"at": one}
