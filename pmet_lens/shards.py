"""How the work of a grid is cut: shards with a file each, and what each needs.

The cut follows from the runs alone. Who makes a shard, when, and how many others are at work does
not change a bit of it, so that a grid can be cut off, gone on with, and shared out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from pmet_lens import target_files
from pmet_lens.adapter import Site
from pmet_lens.grid import Run
from pmet_lens.plain import hash_of
from pmet_lens.settings import Method

OWN = ("edit", "answers", "generation", "others", "ability")
"""Kinds of shards that belong to one run; the other kinds serve every run that needs the same."""


@dataclass(frozen=True)
class Task:
    """One shard: a file, and what is done to make it."""

    kind: str
    """"contexts", "part" (of the text of second moments), "moments" (of one site), "targets", or
    one of `OWN`."""
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


def tasks_of(grid: Sequence[Run], weights: str) -> dict[str, list[Task]]:
    """Digest of a run → its shards, those it shares with others among them, in an order in which
    they can be made. The runs are of one model, whose weights have this hash.

    It has to be the whole grid: the second moments of all sites any run needs are of one pass."""
    passes: dict[str, list[str]] = {}
    for run in grid:
        for site in sites_of(run):
            own = passes.setdefault(_moments_key(run, weights), [])
            own += [] if site in own else [site]
    for own in passes.values():
        own.sort(key=Site.parse)
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


def edit_file(run: Run, weights: str) -> str:
    """The edit of a run."""
    return f"edits/{run.digest}-{weights[:8]}.safetensors"


def _moments_key(run: Run, weights: str) -> str:
    return hash_of([weights, run.texts_digest, run.n_tokens, run.cut.parts(run.n_tokens)])


def _tasks(run: Run, weights: str, passes: Mapping[str, Sequence[str]]) -> Iterator[Task]:
    edit: tuple[str, ...] = ()
    if run.method is not None:
        needs: list[str] = []
        for task in _before_edit(run, weights, passes):
            yield task
            needs += [] if task.kind == "part" else [task.file]
        edit = (edit_file(run, weights),)
        yield Task("edit", edit[0], run.digest, 0, len(run.facts), tuple(needs))
    folder, n = f"answers/{run.digest}-{weights[:8]}", len(run.facts)
    sizes = {
        "answers": (n, run.cut.answers),
        "collateral": (len(run.others), run.cut.others),
        "generation": (n, run.cut.answers),
        "ability": (1, 1),
    }
    for metric in run.metrics:
        kind = "others" if metric == "collateral" else metric
        for start, stop in _ranges(*sizes[metric]):
            file = f"{folder}/{kind}-{start:06}.parquet"
            yield Task(kind, file, run.digest, start, stop, edit)


def _before_edit(run: Run, weights: str, passes: Mapping[str, Sequence[str]]) -> Iterator[Task]:
    if not isinstance(run.method, Method):
        return
    contexts = contexts_file(run, weights)
    yield Task("contexts", contexts, run.digest)
    key, own = _moments_key(run, weights), moment_files(run, weights)
    sites = tuple(passes[key])
    parts = []
    for k in range(run.cut.parts(run.n_tokens)):
        parts.append(f"moments/{key}/part-{hash_of(sites)}-{k:02}.safetensors")
        yield Task("part", parts[-1], run.digest, k, k + 1, sites=sites)
    for site, file in own.items():
        yield Task("moments", file, run.digest, needs=tuple(parts), sites=(site,))
    if run.stepwise:
        return
    for start, stop in target_ranges(run):
        file = target_file(run, weights, start, stop)
        yield Task("targets", file, run.digest, start, stop, (contexts,))


def target_ranges(run: Run) -> list[tuple[int, int]]:
    """The facts of every shard of targets."""
    return list(_ranges(len(run.facts), run.cut.targets))


def target_file(run: Run, weights: str, start: int, stop: int) -> str:
    """The targets of these facts, which runs share that differ in nothing targets follow from."""
    asked = [(f.subject, f.prompt, f.target_new) for f in run.facts[start:stop]]
    method, read = run.method, asdict(target_files.strengths(run.hparams))
    assert isinstance(method, Method)
    made = [method.delta_at, method.position, read, asked]
    return f"targets/{hash_of([weights, run.seed, *made])}.safetensors"


def _ranges(n: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, n, size):
        yield start, min(start + size, n)
