"""Keys and values at the edited token, read layer by layer while the weights change.

Nothing behind the edited token can change what is there, so every prompt is cut behind it; and
nothing below a layer depends on its weights, so the residual stream entering the layer last read is
kept on the way and the next pass starts from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pmet_lens.data.facts import Fact
from pmet_lens.models import tokens
from pmet_lens.models.activations import check_finite
from pmet_lens.models.bridge import Hook
from pmet_lens.models.memory import halving
from pmet_lens.models.model import Model, ModelError, Site, Stream
from pmet_lens.models.tokens import Position

TOKENS_ON_CPU, TOKENS_ELSEWHERE = 4096, 65536
"""Tokens of one pass, padding included."""
FEW_TOKENS = 512
"""Up to so many, another pass costs more than the rows it would leave out."""


@dataclass
class _Part:
    """Rows that run together: those of some facts, with the stream as far as it has been run."""

    facts: list[int]
    rows: tokens.Batch
    place: Tensor
    residual: Tensor | None = None
    """On the host: the streams of thousands of facts do not fit beside a large model."""


class Reader:
    """Reads the keys and values of some facts' prompts, one layer after the other.

    Layers can be asked for in any order; ascending ones, as in an edit, cost least. The weights
    below the layer asked for last must not change in between (an edit writes a layer after reading
    it), else make a new reader. `fast=False` runs the model from its first layer each time.
    """

    def __init__(
        self,
        model: Model,
        facts: Sequence[Fact],
        contexts: Sequence[str] = (),
        position: Position = "last_subject",
        *,
        fast: bool = True,
    ) -> None:
        self.model, self.n = model, len(facts)
        self._layer, self._fast = 0, fast
        per_fact = [tokens.prompts_of(f, contexts) for f in facts]
        self._per_fact = len(per_fact[0])
        rows = tokens.encode(model, [p for prompts in per_fact for p in prompts])
        rows = rows.up_to(position)
        limit = TOKENS_ON_CPU if model.device.type == "cpu" else TOKENS_ELSEWHERE
        longest = rows.mask.sum(1).view(self.n, -1).amax(1).tolist()
        self._parts: list[_Part] = []
        for chunk in tokens.chunks(longest, limit // self._per_fact):
            numbers = [i * self._per_fact + k for i in chunk for k in range(self._per_fact)]
            own = rows[torch.tensor(numbers, device=model.device)]
            self._parts.append(_Part(chunk, own, own.at(position)))

    def keys(self, site: Site) -> Float[Tensor, "fact d_in"]:
        """½ · key on the plain prompt + ½ · mean of the keys behind the context prefixes; without
        prefixes the plain key alone. Source: released `compute_ks.py` (mean per context type, then
        over types)."""
        (found,) = self._read([self.model.key_hook(site)], site.layer, site.layer)
        return _averaged(found)

    def values(self, layer: int, stream: Stream) -> Float[Tensor, "fact d_model"]:
        """The stream's value now, on the plain prompts."""
        (found,) = self._read([self.model.stream_hook(layer, stream)], layer, layer, plain=True)
        return found[:, 0]

    def both(
        self, site: Site, layer: int, stream: Stream
    ) -> tuple[Float[Tensor, "fact d_in"], Float[Tensor, "fact d_model"]]:
        """`keys(site)` and `values(layer, stream)` of a layer not below the site's, with the
        weights as they are; of few tokens in one pass."""
        if max(part.rows.ids.numel() for part in self._parts) > FEW_TOKENS:
            return self.keys(site), self.values(layer, stream)
        names = [self.model.key_hook(site), self.model.stream_hook(layer, stream)]
        found, now = self._read(names, site.layer, layer)
        return _averaged(found), now[:, 0]

    def _read(
        self, names: Sequence[str], layer: int, last: int, plain: bool = False
    ) -> list[Float[Tensor, "fact row d"]]:
        """What these hooks of the layers up to `last` see at the edited token. The stream entering
        `layer` is kept on the way, and the next pass starts there; `plain`: only the plain prompts
        run, and nothing is kept."""
        self._prepare(layer)
        keep = None if plain or not self._fast or layer == self._layer else layer
        parts: list[_Part] = []
        found: list[list[Tensor]] = []
        for part in self._parts:

            def run(rows: Sequence[int], part: _Part = part) -> tuple[_Part, list[Tensor]]:
                some = part if len(rows) == len(part.facts) else self._some(part, rows)
                return some, self._run(some, names, keep, last + 1, plain)

            for some, values in halving(range(len(part.facts)), run, "facts"):
                parts.append(some)
                found.append(values)
        self._parts = parts
        if keep is not None:
            self._layer = layer
        order = torch.tensor([i for part in self._parts for i in part.facts])
        together = [torch.cat(values) for values in zip(*found, strict=True)]
        for name, values in zip(names, together, strict=True):
            check_finite(values, name)
        return [values[torch.argsort(order).to(values.device)] for values in together]

    def _some(self, part: _Part, facts: Sequence[int]) -> _Part:
        """Some facts of a part, as a part of their own."""
        numbers = [i * self._per_fact + k for i in facts for k in range(self._per_fact)]
        chosen = torch.tensor(numbers)
        rows = part.rows[chosen.to(part.place.device)]
        residual = None
        if part.residual is not None:
            residual = part.residual[chosen, : rows.ids.shape[1]]
        where = part.place[chosen.to(part.place.device)]
        return _Part([part.facts[i] for i in facts], rows, where, residual)

    def _prepare(self, layer: int) -> None:
        """Start from the first layer again where what is kept lies above `layer`, or where this
        family's blocks cannot run alone."""
        if self._fast and layer > self._layer:
            try:
                self.model.from_layer(layer)
            except ModelError:
                self._fast = False
        if not self._fast or layer < self._layer:
            self._layer = 0
            for part in self._parts:
                part.residual = None

    def _run(
        self, part: _Part, names: Sequence[str], keep: int | None, stop: int, plain: bool
    ) -> list[Float[Tensor, "fact row d"]]:
        """One part's pass, from where it has been run to, up to block `stop`."""
        rows, place = part.rows, part.place
        chosen = torch.arange(0, len(rows), self._per_fact if plain else 1, device=place.device)
        if plain:
            rows, place = rows[chosen], place[chosen]
        number = torch.arange(len(place), device=place.device)
        found: list[Tensor] = []
        hooks: list[tuple[str, Hook]] = [
            (
                name,
                lambda value: found.append(value[number.to(value.device), place.to(value.device)]),
            )
            for name in names
        ]
        entering: list[Tensor] = []
        if keep is not None:
            hooks.append((self.model.stream_hook(keep, "resid_pre"), entering.append))
        with torch.no_grad():
            if part.residual is None:
                self.model.forward(rows.ids, rows.mask, hooks=hooks, stop_at_layer=stop)
            else:
                residual = part.residual[chosen.cpu(), : rows.ids.shape[1]].to(self.model.device)
                tail = self.model.from_layer(self._layer)
                tail.forward(residual, rows.mask, hooks=hooks, stop_at_layer=stop)
        if entering:
            part.residual = entering[0].cpu()
        return [value.view(len(part.facts), -1, value.shape[-1]) for value in found]


def _averaged(found: Float[Tensor, "fact row d_in"]) -> Float[Tensor, "fact d_in"]:
    """Half the first row's key, half the mean of the others."""
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    plain, prefixed = found[:, 0], found[:, 1:]
    return (plain + prefixed.mean(1)) / 2 if prefixed.shape[1] else plain


def averaged_keys(
    model: Model,
    facts: Sequence[Fact],
    contexts: Sequence[str],
    site: Site,
    position: Position = "last_subject",
) -> Float[Tensor, "fact d_in"]:
    """`Reader.keys` of one site, with the weights as they are now."""
    return Reader(model, facts, contexts, position, fast=False).keys(site)


def current_values(
    model: Model,
    facts: Sequence[Fact],
    layer: int,
    stream: Stream,
    position: Position = "last_subject",
) -> Float[Tensor, "fact d_model"]:
    """`Reader.values` of one stream, with the weights as they are now."""
    return Reader(model, facts, (), position, fast=False).values(layer, stream)
