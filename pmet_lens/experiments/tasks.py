"""How the work of a grid is cut: shards with a file each, and what each needs.

The cut follows from the runs alone. Who makes a shard, when, and how many others are at work does
not change a bit of it, so that a grid can be cut off, gone on with, and shared out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pmet_lens.data.file_format import hash_of, to_plain
from pmet_lens.editing.method import Method
from pmet_lens.experiments import target_files
from pmet_lens.experiments.grid import Run
from pmet_lens.models.model import Site

OWN = ("edit", "answers", "generation", "others", "ability")
"""Kinds of shards that belong to one run; the other kinds serve every run that needs the same."""


@dataclass(frozen=True)
class Task:
    """One shard: a file, and what is done to make it."""

    kind: str
    """"contexts", "part" (of the text of second moments), "moments" (of one site), "targets",
    "steps" (of an edit that is made in steps), or one of `OWN`."""
    file: str
    run: str
    """The digest of a run it is made for."""
    start: int = 0
    """Where the shard begins: a fact, or the number of the part."""
    stop: int = 0
    needs: tuple[str, ...] = ()
    """The files it is made from."""
    sites: tuple[str, ...] = ()
    """Of moments."""
    first: int = 0
    """The first fact of the edit it belongs to."""


def tasks_of(grid: Sequence[Run], weights: str) -> dict[str, list[Task]]:
    """Digest of a run → its shards, those it shares with others among them, in an order in which
    they can be made. The runs are of one model, whose weights have this hash.

    It has to be the whole grid: the second moments of all sites any run needs are of one pass."""
    passes: dict[str, list[str]] = {}
    for run in grid:
        for site in sites_of(run):
            sites = passes.setdefault(_moments_key(run, weights), [])
            sites += [] if site in sites else [site]
    for sites in passes.values():
        sites.sort(key=Site.parse)
    return {run.digest: list(_tasks(run, weights, passes)) for run in grid}


def sites_of(run: Run) -> list[str]:
    """The sites whose second moments a run needs."""
    if not isinstance(run.method, Method):
        return []
    return [str(Site(layer, p)) for layer in run.hparams.layers for p in run.method.write]


def moment_files(run: Run, weights: str) -> dict[str, str]:
    """Site → file of its second moment."""
    key = _moments_key(run, weights)
    return {site: f"moments/{key}/{site}.safetensors" for site in sites_of(run)}


def contexts_file(run: Run, weights: str) -> str:
    """The context prefixes of a run."""
    return f"contexts/{hash_of([weights, run.seed])}.json"


def edit_file(run: Run, weights: str, first: int = 0) -> str:
    """The edit of a run whose first fact is number `first`."""
    group = "" if run.group is None else f"-{first:06}"
    return f"edits/{run.digest}-{weights[:8]}{group}.safetensors"


def _moments_key(run: Run, weights: str) -> str:
    return hash_of([weights, run.texts_digest, run.n_tokens, run.cut.parts(run.n_tokens)])


def _tasks(run: Run, weights: str, passes: Mapping[str, Sequence[str]]) -> Iterator[Task]:
    common: tuple[str, ...] = ()
    if isinstance(run.method, Method):
        common = (contexts_file(run, weights), *moment_files(run, weights).values())
        yield from _before_edit(run, weights, passes)
    for first, end in edit_ranges(run):
        edit: tuple[str, ...] = ()
        if run.method is not None:
            parts = _made_from(run, weights, first, end)
            yield from _steps(run, weights, parts, common) if run.stepwise else ()
            edit = (edit_file(run, weights, first),)
            needs = (*common, *(file for file, *_ in parts))
            yield Task("edit", edit[0], run.digest, first, end, needs, first=first)
        yield from _measured(run, weights, first, end, edit)


def _before_edit(run: Run, weights: str, passes: Mapping[str, Sequence[str]]) -> Iterator[Task]:
    """What the edits of a run and of others are made from."""
    contexts = contexts_file(run, weights)
    yield Task("contexts", contexts, run.digest)
    key, moments = _moments_key(run, weights), moment_files(run, weights)
    sites = tuple(passes[key])
    parts = []
    for k in range(run.cut.parts(run.n_tokens)):
        parts.append(f"moments/{key}/part-{hash_of(sites)}-{k:02}.safetensors")
        yield Task("part", parts[-1], run.digest, k, k + 1, sites=sites)
    for site, file in moments.items():
        yield Task("moments", file, run.digest, needs=tuple(parts), sites=(site,))
    for file, start, stop in [] if run.stepwise else _target_files(run, weights):
        yield Task("targets", file, run.digest, start, stop, (contexts,))


def _steps(
    run: Run, weights: str, shards: Sequence[tuple[str, int, int]], common: tuple[str, ...]
) -> Iterator[Task]:
    """Each shard is made on the model with the edits of those before it."""
    before: tuple[str, ...] = ()
    for file, start, stop in shards:
        yield Task("steps", file, run.digest, start, stop, (*common, *before), first=shards[0][1])
        before = (file,)


def _measured(
    run: Run, weights: str, first: int, end: int, edit: tuple[str, ...]
) -> Iterator[Task]:
    """What is asked with one edit on the model."""
    folder = f"answers/{run.digest}-{weights[:8]}"
    generated = end if run.generate is None else min(end, run.generate)
    ranges = {
        "answers": (first, end, run.cut.answers),
        "collateral": (0, len(run.others), run.cut.others),
        "generation": (first, generated, run.cut.answers),
        "ability": (0, 1, 1),
    }
    for metric in run.metrics:
        kind = "others" if metric == "collateral" else metric
        for start, stop in _ranges(*ranges[metric]):
            file = f"{folder}/{kind}-{first:06}-{start:06}.parquet"
            yield Task(kind, file, run.digest, start, stop, edit, first=first)


def edit_ranges(run: Run) -> list[tuple[int, int]]:
    """The facts of every edit of a run."""
    n = len(run.facts)
    return list(_ranges(0, n, n if run.group is None else run.group))


def _made_from(run: Run, weights: str, first: int, end: int) -> list[tuple[str, int, int]]:
    """File, start, stop of the shards that the edit of facts `first` to `end` is made from."""
    if not isinstance(run.method, Method):
        return []
    if run.stepwise:
        return [(step_file(run, weights, first, e), s, e) for s, e in step_ranges(run, first, end)]
    return [(f, s, e) for f, s, e in _target_files(run, weights) if s < end and e > first]


def step_ranges(run: Run, first: int, end: int) -> list[tuple[int, int]]:
    """The facts of every shard of an edit in steps; a shard ends where a step does."""
    at_once = getattr(run.method, "at_once", None) or 1
    return list(_ranges(first, end, at_once * -(-run.cut.steps // at_once)))


def step_file(run: Run, weights: str, first: int, stop: int) -> str:
    """The shard that ends before fact `stop` of the edit that begins with fact `first`. Runs share
    it that differ in nothing it follows from, above all not in the facts before it."""
    made = [_moments_key(run, weights), run.seed, to_plain(run.method), to_plain(run.hparams)]
    return f"steps/{hash_of([weights, *made, run.cut.steps, _asked(run, first, stop)])}.safetensors"


def _target_files(run: Run, weights: str) -> list[tuple[str, int, int]]:
    return [(target_file(run, weights, *range_), *range_) for range_ in target_ranges(run)]


def target_ranges(run: Run) -> list[tuple[int, int]]:
    """The facts of every shard of targets."""
    return list(_ranges(0, len(run.facts), run.cut.targets))


def target_file(run: Run, weights: str, start: int, stop: int) -> str:
    """The targets of these facts, which runs share that differ in nothing targets follow from."""
    assert isinstance(run.method, Method)
    facts = run.facts[start:stop]
    name = target_files.key(weights, facts, run.method, run.hparams, run.seed)
    return f"targets/{name}.safetensors"


def _asked(run: Run, start: int, stop: int) -> list[tuple[str, str, str | None]]:
    """What an edit reads of facts."""
    return [(f.subject, f.prompt, f.target_new) for f in run.facts[start:stop]]


def _ranges(first: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(first, end, size):
        yield start, min(start + size, end)
