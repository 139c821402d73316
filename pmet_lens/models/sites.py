"""The places in a model under fixed names: streams that are read, sites whose weight is written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

Stream = Literal["attn_in", "attn_out", "mlp_in", "mlp_out", "resid_pre", "resid_mid", "resid_post"]
"""What can be read at a layer, all `[batch, token, d_model]`. `attn_in` and `mlp_in` are what the
component itself reads, after its norm; `attn_out` and `mlp_out` what its output projection writes
(before a post-norm, where there is one); `resid_pre`, `resid_mid` and `resid_post` the residual
stream before, between and after the two. Parallel blocks have no `resid_mid`."""
Projection = Literal["attn", "mlp"]

# `hook_attn_out` and `hook_mlp_out` are avoided: with post-norms (Gemma-2) they come after them.
STREAM_HOOKS = {
    "attn_in": "attn.hook_in",
    "attn_out": "attn.o.hook_out",
    "mlp_in": "mlp.hook_in",
    "mlp_out": "mlp.out.hook_out",
    "resid_pre": "hook_in",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_out",
}
"""TransformerLens's hook of each stream, inside a block."""
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


def check_name(kind: str, given: str, valid: tuple[str, ...]) -> None:
    """Raises `ModelError` unless `given` is one of the `valid` names of its kind."""
    if given not in valid:
        raise ModelError(f"unknown {kind} {given!r}; choose from {', '.join(valid)}")


def layer_of(hook_name: str) -> int | None:
    """The layer number in a hook name; None for one outside the blocks."""
    match = re.match(r"blocks\.(\d+)\.", hook_name)
    return None if match is None else int(match[1])
