"""Keys and values at the edited token, read layer by layer while the weights change.

No token after the edited one can change what is there, so every prompt ends at it. Nothing below a
layer depends on its weights, so the residual stream that enters the layer read last is kept, and
the next pass starts from it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pmet_lens.data.facts import Fact
from pmet_lens.editing.method import STREAM_OF, Method, optimised
from pmet_lens.editing.objective import rows_of
from pmet_lens.editing.targets import Targets
from pmet_lens.models import activations, tokens
from pmet_lens.models.activations import check_finite
from pmet_lens.models.bridge import Hook
from pmet_lens.models.likelihood import at_least_float32
from pmet_lens.models.memory import halving
from pmet_lens.models.model import Model, ModelError, Site, Stream
from pmet_lens.models.sites import Road, turned
from pmet_lens.models.tokens import Position

TOKENS_ON_CPU, TOKENS_ELSEWHERE = 4096, 65536
"""Tokens of one pass, padding included."""
KEPT_BYTES = 2**30
"""Of streams that are kept for the next layer; what is more runs from the first layer again, so
that thousands of facts take no more memory than their keys and targets."""
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

    def of(self, facts: Sequence[int]) -> _Part:
        """Some of its facts, by their number in it."""
        if len(facts) == len(self.facts):
            return self
        chosen = rows_of(facts, len(self.rows) // len(self.facts))
        here = chosen.to(self.place.device)
        rows, residual = self.rows[here], self.residual
        if residual is not None:
            residual = residual[chosen, : rows.ids.shape[1]]
        return _Part([self.facts[i] for i in facts], rows, self.place[here], residual)


class Reader:
    """Reads the keys and values of some facts' prompts, one layer after the other; ascending
    layers, as in an edit, cost least. The weights below the layer asked for last must not change in
    between (an edit writes a layer after reading it), else make a new reader. `fast=False` runs the
    model from its first layer each time."""

    def __init__(
        self,
        model: Model,
        facts: Sequence[Fact],
        contexts: Sequence[str] = (),
        position: Position = "last_subject",
        *,
        fast: bool = True,
    ) -> None:
        self.model = model
        self._layer, self._fast = 0, fast
        self._roads: dict[Site, Road | None] = {}
        prompts = [tokens.prompts_of(fact, contexts) for fact in facts]
        self._per_fact = len(prompts[0])
        rows = tokens.encode(model, list(itertools.chain.from_iterable(prompts)))
        rows = rows.up_to(position)
        limit = TOKENS_ON_CPU if model.device.type == "cpu" else TOKENS_ELSEWHERE
        longest = rows.mask.sum(1).view(len(facts), -1).amax(1).tolist()
        self._parts: list[_Part] = []
        for some in tokens.chunks(longest, limit // self._per_fact):
            chosen = rows[rows_of(some, self._per_fact).to(model.device)]
            self._parts.append(_Part(some, chosen, chosen.at(position)))

    def keys(self, site: Site) -> Float[Tensor, "fact d_in"]:
        """½ · key on the plain prompt + ½ · mean of the keys after the context prefixes; without
        prefixes the plain key alone. Source: released `compute_ks.py` (mean per context type, then
        over types)."""
        (keys,) = self._read([self.model.key_hook(site)], site.layer, site.layer)
        return _averaged(keys)

    def values(self, layer: int, stream: Stream) -> Float[Tensor, "fact d_model"]:
        """The stream's value now, on the plain prompts."""
        (now,) = self._read([self.model.stream_hook(layer, stream)], layer, layer, plain=True)
        return now[:, 0]

    def both(
        self, site: Site, layer: int, stream: Stream
    ) -> tuple[Float[Tensor, "fact d_in"], Float[Tensor, "fact d_model"]]:
        """`keys(site)` and `values(layer, stream)` of a layer not below the site's, with the
        weights as they are; of few tokens in one pass."""
        if max(part.rows.ids.numel() for part in self._parts) > FEW_TOKENS:
            return self.keys(site), self.values(layer, stream)
        names = [self.model.key_hook(site), self.model.stream_hook(layer, stream)]
        keys, now = self._read(names, site.layer, layer)
        return _averaged(keys), now[:, 0]

    def road(self, site: Site) -> Road | None:
        """`activations.road`, tried out once, for the layers below as well."""
        if site not in self._roads:
            sites = [Site(layer, site.projection) for layer in range(site.layer + 1)]
            self._roads |= activations.roads(self.model, sites)
        return self._roads[site]

    def _read(
        self, names: Sequence[str], layer: int, last: int, plain: bool = False
    ) -> list[Float[Tensor, "fact row d"]]:
        """What these hooks of the layers up to `last` see at the edited token. The stream that
        enters `layer` is kept, and the next pass starts there; `plain`: only the plain prompts run,
        and nothing is kept."""
        self._prepare(layer)
        keep = None if plain or not self._fast or layer == self._layer else layer
        parts, seen, room = list[_Part](), list[list[Tensor]](), KEPT_BYTES
        for part in self._parts:

            def run(
                facts: Sequence[int], part: _Part = part, room: int = room
            ) -> tuple[_Part, list[Tensor]]:
                some = part.of(facts)
                size = some.rows.ids.numel() * self.model.d_model * self.model.dtype.itemsize
                fits = None if size > room else keep
                if keep is not None and fits is None:
                    some.residual = None
                return some, self._run(some, names, fits, last + 1, plain)

            for some, values in halving(range(len(part.facts)), run, "facts"):
                room -= 0 if some.residual is None else some.residual.nbytes
                parts.append(some)
                seen.append(values)
        self._parts = parts
        if keep is not None:
            self._layer = layer
        back = torch.tensor([i for part in parts for i in part.facts]).argsort()
        together = [torch.cat(values) for values in zip(*seen, strict=True)]
        for name, values in zip(names, together, strict=True):
            check_finite(values, name)
        return [values[back.to(values.device)] for values in together]

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
        row = torch.arange(len(place), device=place.device)
        seen, entering = list[Tensor](), list[Tensor]()

        def read(value: Tensor) -> None:
            seen.append(value[row.to(value.device), place.to(value.device)])

        hooks: list[tuple[str, Hook]] = [(name, read) for name in names]
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
        return [value.view(len(part.facts), -1, value.shape[-1]) for value in seen]


def wanted(
    reader: Reader, targets: Targets, method: Method
) -> dict[Stream, Float[Tensor, "fact d_model"]]:
    """Per stream that the method's projections follow the value it should have at `targets.layer`.

    Where the delta of the layer output lay before a norm (`method.optimised`): the clean output
    and what the norm makes of the delta. Where the method gathers: the value now and all deltas.
    """
    values: dict[Stream, Tensor] = {}
    streams: set[Stream] = {method.follows(projection) for projection in method.write}
    for stream in streams:
        lies: Stream = optimised(reader.model, stream)
        gathers = stream == method.gather
        if gathers or lies != stream:
            now = reader.values(targets.layer, stream)
            how, what = (_gathered, stream) if gathers else (_reached, lies)
            values[stream] = now + how(reader, targets, what).to(now)
        else:
            values[stream] = targets.values[stream]
    return values


def _gathered(reader: Reader, targets: Targets, stream: Stream) -> Float[Tensor, "fact d_model"]:
    """The change of `stream` with which the MLP brings all deltas, or the nearest its norm can."""
    whole = torch.stack([_reached(reader, targets, s).double() for s in targets.values]).sum(0)
    road, now = reader.road(Site(targets.layer, "mlp")), reader.values(targets.layer, "mlp_out")
    if road is None:
        return whole
    change = road.change(now, whole)
    return change if stream == "mlp_out" else road.reached(now + change) - road.reached(now)


def _reached(reader: Reader, targets: Targets, stream: Stream) -> Float[Tensor, "fact d_model"]:
    """What the delta of a stream changes in the residual stream."""
    road = reader.road(Site(targets.layer, "attn" if stream == "attn_out" else "mlp"))
    if road is None:
        return targets.delta(stream)
    return road.reached(targets.values[stream]) - road.reached(targets.clean[stream])


def to_write(
    reader: Reader,
    site: Site,
    stream: Stream,
    layer: int,
    rest: Float[Tensor, "fact d_model"],
    share: float,
) -> Float[Tensor, "fact d_model"]:
    """What the projection at `site` is to write more, so that it takes its share (1 / `share`) of
    the `rest` missing in `stream` at the last critical `layer`: rest / share, where what it writes
    enters the residual stream as it is. Behind a norm lengths mean nothing: a rest of what is
    written itself (PMET) is shared as a turn, its size relative to what the site writes; one of the
    layer output (MEMIT) is shared in the stream, and the site writes what its norm needs for it."""
    last = reader.road(Site(layer, site.projection))
    road = reader.road(site)
    written = STREAM_OF[site.projection]
    if road is None and last is None:
        return rest / share
    here = reader.values(site.layer, written).double()
    if stream == written:
        there = reader.values(layer, written).double()
        return rest / share * (here.norm(dim=-1) / there.norm(dim=-1))[:, None].to(rest)
    missed = rest.double() / share
    if last is not None and last.normed:
        # What is left for `layer` must be what its norm can bring: a part of the turn, not of the
        # chord.
        now = reader.values(layer, written).double()
        goal = now + last.change(now, rest)
        missed = last.reached(now) + rest - last.reached(turned(now, goal, 1 - 1 / share))
    if road is None:
        return missed
    # Below `layer` what is missed is left for it, and its own norm has the last word.
    return road.change(here, missed) if site.layer == layer else road.pushed(here, missed)


def _averaged(keys: Float[Tensor, "fact row d_in"]) -> Float[Tensor, "fact d_in"]:
    """½ · the first row's key + ½ · the mean of the others."""
    keys = at_least_float32(keys)
    plain, prefixed = keys[:, 0], keys[:, 1:]
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
