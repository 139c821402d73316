"""Keys and values at the edited token, read layer by layer while the weights change.

Nothing behind the edited token can change what is there, so every prompt is cut behind it; and
nothing below a layer depends on its weights, so the residual stream entering the layer last read is
kept and the next one starts from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pmet_lens import tokens
from pmet_lens.adapter import Model, ModelError, Site, Stream
from pmet_lens.facts import Fact
from pmet_lens.tokens import Position
from pmet_lens.twin import Hook

TOKENS_ON_CPU, TOKENS_ELSEWHERE = 4096, 65536
"""Tokens of one pass, padding included."""


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
        rows = rows.cut_behind(position)
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

        def averaged(part: _Part) -> Tensor:
            found = self._read(part, self.model.key_hook(site), site.layer)
            found = found.reshape(len(part.facts), self._per_fact, -1)
            found = found.to(torch.promote_types(found.dtype, torch.float32))
            plain, prefixed = found[:, 0], found[:, 1:]
            return (plain + prefixed.mean(1)) / 2 if prefixed.shape[1] else plain

        self._enter(site.layer)
        return self._gather(averaged)

    def values(self, layer: int, stream: Stream) -> Float[Tensor, "fact d_model"]:
        """The stream's value now, on the plain prompts."""

        def plain(part: _Part) -> Tensor:
            rows = torch.arange(len(part.facts), device=self.model.device) * self._per_fact
            return self._read(part, self.model.stream_hook(layer, stream), layer, rows)

        if layer < self._layer:
            self._enter(layer)
        return self._gather(plain)

    def _gather(self, of: Callable[[_Part], Tensor]) -> Tensor:
        """The results of all parts, in the order of the facts."""
        order = torch.tensor([i for part in self._parts for i in part.facts])
        found = torch.cat([of(part) for part in self._parts])
        return found[torch.argsort(order).to(found.device)]

    def _enter(self, layer: int) -> None:
        """Keep the residual stream that enters `layer`, with the weights below as they are."""
        if layer < self._layer:
            self._layer = 0
            for part in self._parts:
                part.residual = None
        if not self._fast or layer == self._layer:
            return
        try:
            self.model.from_layer(layer)
        except ModelError:  # a family whose blocks cannot run alone
            self._fast = False
            return self._enter(0)
        for part in self._parts:
            part.residual = self._run(part, (), layer).cpu()
        self._layer = layer

    def _read(
        self, part: _Part, name: str, layer: int, chosen: Tensor | None = None
    ) -> Float[Tensor, "row d"]:
        """What the hook `name` of `layer` sees at the edited token of the chosen rows."""
        found: list[Tensor] = []
        place = part.place if chosen is None else part.place[chosen]
        number = torch.arange(len(place), device=place.device)
        self._run(
            part, [(name, lambda value: found.append(value[number, place]))], layer + 1, chosen
        )
        return found[0]

    def _run(
        self,
        part: _Part,
        hooks: Sequence[tuple[str, Hook]],
        stop: int,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """The residual stream entering block `stop`, from where the part has been run to."""
        rows = part.rows if chosen is None else part.rows[chosen]
        with torch.no_grad():
            if part.residual is None:
                return self.model.forward(rows.ids, rows.mask, hooks=hooks, stop_at_layer=stop)
            residual = part.residual if chosen is None else part.residual[chosen.cpu()]
            residual = residual[:, : rows.ids.shape[1]].to(self.model.device)
            tail = self.model.from_layer(self._layer)
            return tail.forward(residual, rows.mask, hooks=hooks, stop_at_layer=stop)


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
