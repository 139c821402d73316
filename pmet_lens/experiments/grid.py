"""A grid: a list of `Run`s, each of which says all that its result follows from.

Nothing here computes. A `Run` is a value; its `digest` names its result file, so that the same run
is never made twice, whatever it is called and wherever it runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from pmet_lens.data import file_format
from pmet_lens.data.facts import Fact, FactError, check_editable
from pmet_lens.data.file_format import from_plain, hash_of, to_plain
from pmet_lens.editing import edit_files
from pmet_lens.editing.edits import Editor
from pmet_lens.editing.finetune import FineTune, FineTuneHparams
from pmet_lens.editing.mend import Mend, MendHparams
from pmet_lens.editing.method import Hparams, Method, kind_of
from pmet_lens.editing.methods import ABLATIONS, METHODS, PMET, known_hparams, named
from pmet_lens.models.weights import DTYPES

FORMAT = "pmet_lens grid 1"
ENGINES = ("serial", "ray")
METRICS = ("answers", "collateral", "generation", "ability")
"""What can be measured: the scores of `evaluate`; the share of `others` still right; fluency and
consistency of generated text; perplexity and KL on what the edit is not about."""
_VALUES = (*edit_files.VALUES, FineTune, FineTuneHparams, Mend, MendHparams)
"""The classes that a file of a grid may name."""


class GridError(ValueError):
    """A grid, or a folder of results, that cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Cut:
    """Into how large shards the work of a run is cut. Results follow from it as far as rounding
    does (batches), so it is part of the run, and the number of workers is not."""

    targets: int = 125
    """Facts per shard of targets; in a shard they are optimised batch by batch."""
    answers: int = 100
    """Facts per shard of an evaluation."""
    others: int = 1000
    """Facts per shard of the collateral measure."""
    tokens: int = 100_000
    """Tokens per shard of second moments, of which there are at most 16: a shard is as large as
    the moments themselves while it lasts."""
    steps: int = 10
    """Facts per shard of an edit that is made in steps (ROME): it is resumed after these."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise GridError(f"A shard needs at least 1 of {name}, not {value}.")

    def parts(self, n_tokens: int) -> int:
        """Shards of the text of `n_tokens` tokens."""
        return max(1, min(16, -(-n_tokens // self.tokens)))


@dataclass(frozen=True)
class Run:
    """One edit and its measurement: everything its result follows from, and nothing else."""

    model: str
    """What `pl.load` takes: a bundled name, a directory or a hub id."""
    facts: Sequence[Fact] = field(repr=False)
    """The facts that are edited and asked for."""
    method: Method | Editor | str | None = PMET
    """A value, or the name of one; None: the model as it is."""
    hparams: Any = None
    """The strengths of the method; None: those known for this model."""
    metrics: Sequence[str] = ("answers",)
    """Some of `METRICS`."""
    others: Sequence[Fact] = field(default=(), repr=False)
    """Facts the edit is not about, for "collateral"."""
    group: int | None = None
    """So many facts are edited at once, each group alone on the unedited model, and asked for with
    that edit on it: what few edits do, measured on many facts. None: all at once."""
    generate: int | None = None
    """"generation" is of the first so many facts; None: of all."""
    n_texts: int = 200
    """Texts that "ability" reads."""
    seed: int = 0
    """Of the context prefixes that are sampled from the model."""
    texts: str | None = None
    """The text of the second moments, as `pl.texts` takes it; None: about the bundled world."""
    n_tokens: int = 100_000
    """Of these."""
    dtype: str | None = None
    """The dtype of the weights, as `pl.load` takes it."""
    template: str | None = None
    """What stands around every prompt of a chat model, as `pl.load` takes it."""
    cut: Cut = Cut()
    """Into how large shards the work is cut."""
    name: str = field(default="", compare=False)
    """What tables call it; no part of the digest. None given: the name of the method."""

    def __post_init__(self) -> None:
        if not isinstance(self.model, (str, Path)):
            raise GridError(
                "The model of a Run is a bundled name, a directory or a hub id, which every worker "
                "can read. Write a model in memory to a directory with save_pretrained first."
            )
        method = named(self.method) if isinstance(self.method, str) else self.method
        given = {"model": str(self.model), "facts": tuple(self.facts), "method": method}
        given |= {"metrics": tuple(self.metrics), "others": tuple(self.others)}
        given["texts"] = None if self.texts is None else str(self.texts)
        given["hparams"] = _strengths(method, Path(self.model).name, self.hparams)
        for key, value in given.items():
            object.__setattr__(self, key, value)
        if isinstance(method, Method) and isinstance(self.hparams, Hparams):
            together = min(method.at_once or self.edits, self.edits)
            settled = self.hparams.settled(method, together)
            object.__setattr__(self, "hparams", settled)
        if not self.name:
            object.__setattr__(self, "name", _name(method))
        self._check()

    def _check(self) -> None:
        for name in ("n_tokens", "n_texts", "group", "generate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise GridError(f"{name} must be at least 1, not {value}.")
        if self.method is None and not self.facts:
            raise FactError("There are no facts to ask for; pass at least one Fact.")
        for start in range(0, max(len(self.facts), 1), max(self.edits, 1)):
            if self.method is not None:
                check_editable(self.facts[start : start + self.edits])
        wrong = [m for m in self.metrics if m not in METRICS]
        if wrong or not self.metrics:
            raise GridError(f"metrics must be some of {', '.join(METRICS)}; got {self.metrics!r}.")
        if ("collateral" in self.metrics) != bool(self.others):
            raise GridError(
                'The metric "collateral" counts which of the facts `others` are still right: give '
                "both or neither (experiment.others_of(pl.knowns(), facts) for the bundled world)."
            )
        if self.group is not None and (self.method is None or "ability" in self.metrics):
            raise GridError(
                'Groups are of edits, and "ability" is measured of one edit: leave group= out '
                "without a method, and for this metric."
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise GridError(f"unknown dtype {self.dtype!r}; choose from {', '.join(DTYPES)}.")
        if self.texts is not None and not Path(self.texts).is_file():
            raise GridError(f"There is no file of texts {self.texts!r}.")

    @cached_property
    def digest(self) -> str:
        """A name of 16 hexadecimal digits: equal for runs with the same result."""
        return hash_of(self.record())

    @cached_property
    def texts_digest(self) -> str:
        """SHA-256 of the file of texts; empty for the bundled text."""
        if self.texts is None:
            return ""
        return file_format.file_digest(Path(self.texts))

    def record(self) -> dict[str, Any]:
        """The run as JSON has it, facts and texts by their hashes, without its name."""
        plain = {
            f.name: to_plain(getattr(self, f.name))
            for f in fields(self)
            if f.name not in ("name", "facts", "others", "cut")
        }
        plain |= {"facts": facts_digest(self.facts), "others": facts_digest(self.others)}
        plain |= {"texts": self.texts_digest, "cut": asdict(self.cut)}
        return {**plain, "n_facts": len(self.facts)}

    @property
    def edits(self) -> int:
        """How many facts an edit of this run has."""
        return 0 if self.method is None else min(self.group or len(self.facts), len(self.facts))

    @property
    def stepwise(self) -> bool:
        """Whether the method edits some of the facts after the others, each time on the model as
        edited so far: then targets cannot be shared out."""
        at_once = getattr(self.method, "at_once", None)
        return at_once is not None and at_once < self.edits


def _strengths(method: Any, model: str, hparams: Any) -> Any:
    """`hparams`, or those known for the model of this name."""
    if isinstance(method, FineTune):
        return method.settings(model, hparams)
    if hparams is not None:
        return hparams
    if isinstance(method, Method):
        return known_hparams(model, kind_of(method))
    return MendHparams() if isinstance(method, Mend) else None


def _name(method: Any) -> str:
    known = {**ABLATIONS, **METHODS}
    match = next((name for name, value in known.items() if value == method), None)
    return "unedited" if method is None else match or type(method).__name__


def facts_digest(facts: Sequence[Fact]) -> str:
    """A hash of facts in their order; empty for none."""
    return hash_of([fact.record() for fact in facts]) if facts else ""


def check_grid(grid: Run | Sequence[Any]) -> list[Run]:
    """The runs of a grid, one or several.

    Raises:
        GridError: for an empty one, something that is no `Run`, and one that is there twice.
    """
    runs = [grid] if isinstance(grid, Run) else list(grid)
    if not runs:
        raise GridError("The grid is empty; pass a list of at least one Run.")
    places: dict[str, int] = {}
    for i, run in enumerate(runs):
        if not isinstance(run, Run):
            raise GridError(f"Number {i} of the grid is a {type(run).__name__}, not a Run.")
        if run.digest in places:
            first = places[run.digest]
            raise GridError(
                f"The runs {first} ({runs[first].name!r}) and {i} ({run.name!r}) of the grid are "
                "the same, and would be one result counted twice. Leave one out."
            )
        places[run.digest] = i
    return runs


def by_model(runs: Sequence[Run]) -> dict[tuple[Any, ...], list[Run]]:
    """Model, dtype and chat template → the runs of these."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.model, run.dtype, run.template), []).append(run)
    return groups


def share_of(runs: Sequence[Run], shard: str | None) -> list[Run]:
    """The runs k, k + n, … of a grid for `shard` "k/n", k from 1; None: all of them.

    Raises:
        GridError: for any other text.
    """
    if shard is None:
        return list(runs)
    k, slash, n = shard.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise GridError(
            f"There is no shard {shard!r}: write k/n with k from 1 to n, such as 1/4 to 4/4."
        )
    return list(runs[int(k) - 1 :: int(n)])


def save_grid(grid: Run | Sequence[Run], path: str | Path) -> None:
    """Write a grid as JSON, each list of facts once; `pmet-lens run` and `load_grid` read it."""
    lists: dict[str, list[Any]] = {}
    rows = []
    for run in check_grid(grid):
        for facts in (run.facts, run.others):
            if facts:
                lists.setdefault(facts_digest(facts), [fact.record() for fact in facts])
        record = {**run.record(), "texts": run.texts, "name": run.name}
        rows.append({key: value for key, value in record.items() if key != "n_facts"})
    whole = {"format": FORMAT, "facts": lists, "runs": rows}
    try:
        with file_format.whole(Path(path)) as part:
            part.write_text(json.dumps(whole, ensure_ascii=False, indent=1), encoding="utf-8")
    except OSError as error:
        raise GridError(f"The grid could not be written to {path}: {error}") from error


def load_grid(path: str | Path) -> list[Run]:
    """Read what `save_grid` wrote.

    Raises:
        GridError: for a file that is missing or no grid.
    """
    try:
        whole = json.loads(Path(path).read_text(encoding="utf-8"))
        if whole.get("format") != FORMAT:
            raise GridError(f"{path} is no grid as save_grid writes it.")
        lists = {k: tuple(map(Fact.from_record, v)) for k, v in whole["facts"].items()}
        return check_grid([_read(row, lists) for row in whole["runs"]])
    except GridError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise GridError(f"{path} cannot be read as a grid: {error}") from error


def _read(row: Mapping[str, Any], lists: Mapping[str, tuple[Fact, ...]]) -> Run:
    values = {k: v for k, v in row.items() if k not in ("facts", "others", "cut")}
    for key in ("method", "hparams", "metrics"):
        values[key] = from_plain(values[key], _VALUES, GridError)
    facts, others = lists[row["facts"]], lists[row["others"]] if row["others"] else ()
    return Run(facts=facts, others=others, cut=Cut(**row["cut"]), **values)
