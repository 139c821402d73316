"""Trials: a method, or a variation of one, edited and measured on one model, many times over.

A `Trial` says what differs from the settings known for a model; a `Bench` holds what every trial on
a model needs (second moments, context prefixes, targets on disk), so that a table of many methods,
ablations and loads optimises each target once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from pmet_lens.data import datasets
from pmet_lens.data.facts import Fact
from pmet_lens.editing.edits import Edit, Editor
from pmet_lens.editing.locate_and_edit import edit, edit_sequentially
from pmet_lens.editing.method import Hparams, Method, SettingsError
from pmet_lens.editing.methods import ABLATIONS, PMET, resolved, settled
from pmet_lens.editing.solvers import Factor, NullSpace, NullSpaceFactor, Solver
from pmet_lens.editing.targets import Targets
from pmet_lens.evaluation import metrics, scoring
from pmet_lens.experiments import target_files
from pmet_lens.models import tokens
from pmet_lens.models.model import Model, Site
from pmet_lens.moments import moment_files
from pmet_lens.moments.inputs import EditInputs
from pmet_lens.moments.second_moments import Moment, chained

OnDone = Callable[[int, int], object]
KEPT = 4
"""Settings whose factorised moments a bench keeps: a factor is as large as its moment."""


@dataclass(frozen=True)
class Trial:
    """One row of a table: the method, and what else differs from the usual."""

    method: Method | Editor | str = PMET
    """A value, or the name of one."""
    change: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the model's `Hparams` that differ, with their values."""
    prefixes: bool = True
    """Whether prompts also come after context prefixes."""
    hparams: Any = None
    """All strengths, where they are not those that the bench knows (`pl.tune` found them)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", resolved(self.method))


def ablations(hparams: Hparams) -> dict[str, Trial]:
    """PMET without one of its parts, or with one strength changed: those of `ABLATIONS`, and those
    of `hparams` and the context prefixes. Every λ, clamp and number of layers is relative to
    `hparams`, so that the same rows are made for every model. "PMET" comes first."""
    layers, clamp, weight = hparams.layers, hparams.clamp, hparams.second_moment_weight
    out = {name: Trial(method) for name, method in ABLATIONS.items()}
    out["without prefixes"] = Trial(prefixes=False)
    for n in range(1, len(layers)):
        out[f"the last {n} critical layers" if n > 1 else "the last critical layer only"] = Trial(
            change={"layers": layers[-n:]}
        )
    for times, text in ((0.5, "half the clamp"), (2.0, "twice the clamp")):
        out[text] = Trial(change={"clamp": times * clamp})
    for times, text in ((0.1, "a tenth of λ"), (10.0, "ten times λ")):
        out[text] = Trial(change={"second_moment_weight": times * weight})
    return out


class Bench:
    """One model, and what edits of it need. `folder` keeps targets and second moments between runs;
    what is there is read, not computed again.

    Args:
        texts: for the second moments; None: about the bundled world.
        n_tokens: of these.
        hparams: method → its settings, for a model that `pl.HPARAMS` does not know.
        layers: whose second moments are computed; None: all below the last.
        shard: facts per file of targets, which is what a run that is cut loses at most.
        moments: second moments that are there already; then no text is read.
    """

    def __init__(
        self,
        model: Model,
        folder: str | Path,
        texts: Sequence[str] | None = None,
        n_tokens: int = 100_000,
        hparams: Callable[[Any], Any] | None = None,
        layers: Sequence[int] | None = None,
        shard: int = 125,
        moments: Mapping[Site, Any] | None = None,
    ) -> None:
        self.model, self.folder, self.shard = model, Path(folder), shard
        if moments is None:
            moments = self._read_moments(texts, n_tokens, layers)
        self.inputs = EditInputs(model, moments)
        self.settings = hparams or self.inputs.settings
        self.contexts, self.moments = self.inputs.contexts(), self.inputs.moments(())
        self._drawn_from = target_files.identity(model)
        self._kept: dict[tuple[Any, ...], dict[Site, Factor]] = {}

    def _read_moments(
        self, texts: Sequence[str] | None, n_tokens: int, layers: Sequence[int] | None
    ) -> dict[Site, Moment]:
        read = "world" if texts is None else chained("", texts)[:8]
        name = f"{target_files.weights(self.model)[:16]}-{read}-{n_tokens}"
        name += "" if layers is None else f"-{'-'.join(map(str, layers))}"
        return moment_files.kept_moments(
            self.folder / f"moments-{name}.safetensors",
            self.model,
            datasets.texts() if texts is None else texts,
            range(self.model.n_layers - 1) if layers is None else layers,
            n_tokens=n_tokens,
        )

    def hparams(self, trial: Trial) -> Any:
        """The strengths of a trial; None for a gradient method, which knows its settings."""
        known_here = self.settings(trial.method) if trial.hparams is None else trial.hparams
        if known_here is None and trial.change:
            raise SettingsError(
                f"{trial.method} knows its settings itself: give Bench hparams= to change "
                f"{', '.join(trial.change)}."
            )
        return None if known_here is None else replace(known_here, **trial.change)

    def targets(
        self, trial: Trial, facts: Sequence[Fact], on_facts: OnDone | None = None
    ) -> Targets | None:
        """The targets of all facts, optimised on the unedited model; None for a method without."""
        if not isinstance(trial.method, Method):
            return None
        return target_files.optimise(
            self.model,
            facts,
            trial.method,
            self.hparams(trial),
            self._contexts(trial),
            self.folder / "targets",
            self.shard,
            on_facts=on_facts,
            drawn=(self._drawn_from, 0) if trial.prefixes else None,
        )

    def edit(
        self,
        trial: Trial,
        facts: Sequence[Fact],
        targets: Targets | Callable[..., Targets] | None = None,
    ) -> Edit:
        """The edit of these facts, all at once as far as the method can; `targets` are theirs, or
        give them (None: those of `targets`, kept in the folder). They are asked for once facts and
        settings have been checked."""
        hp, method = self.hparams(trial), trial.method
        alone = not isinstance(method, Method) or (method.at_once or len(facts)) >= len(facts)
        factorised = None
        if isinstance(method, Method):
            hp = settled(self.model, method, hp, method.at_once or len(facts))
            # All that a factor follows from beside the moment of its site.
            way = (hp.strengthen(method.solver), hp.second_moment_weight)
            if way not in self._kept:
                new = self._reweighted(way[0])
                while len(self._kept) >= KEPT:
                    self._kept.pop(next(iter(self._kept)))
                self._kept[way] = new
            factorised = self._kept[way]
            targets = partial(self._targets, trial, facts) if targets is None else targets
        return edit(
            self.model,
            facts,
            self.moments,
            method,
            hp,
            self._contexts(trial),
            targets if alone else None,
            factorised=factorised if alone else None,
            check=False,
        )

    def _targets(self, trial: Trial, facts: Sequence[Fact], *_: object) -> Targets:
        """Those that are kept, as `edit` asks for them."""
        found = self.targets(trial, facts)
        assert found is not None  # only a `Method` is asked for some
        return found

    def _reweighted(self, solver: Solver) -> dict[Site, Factor]:
        """What is kept of the same null spaces under another weight: their eigenvectors are most of
        what an edit with few facts computes."""
        found: dict[Site, Factor] = {}
        if isinstance(solver, NullSpace) and solver.l2 is not None:
            for (other, _), kept in self._kept.items():
                if isinstance(other, NullSpace) and other.threshold == solver.threshold:
                    found |= {
                        site: factor.weighted(solver.l2)
                        for site, factor in kept.items()
                        if isinstance(factor, NullSpaceFactor)
                    }
        return found

    def chain(
        self, trial: Trial, facts: Sequence[Fact], look: Callable[[int], object], step: int = 1
    ) -> None:
        """Edit `step` facts after the other and call `look(facts so far)` while the model has all
        edits so far."""
        if not isinstance(trial.method, Method):
            raise TypeError(f"{trial.method} does not edit in steps.")
        edit_sequentially(
            self.model,
            facts,
            self.moments,
            trial.method,
            self.hparams(trial),
            self._contexts(trial),
            batch_size=step,
            on_batch=lambda done, _: look(done),
        )

    def _contexts(self, trial: Trial) -> list[str]:
        return self.contexts if trial.prefixes else [tokens.PLAIN]


def measured(
    bench: Bench, trial: Trial, facts: Sequence[Fact], others: Sequence[Fact]
) -> tuple[pd.DataFrame, metrics.Numbers]:
    """The rows of `evaluate` with the trial's edit, and per other fact 100 where it is right."""
    with bench.edit(trial, facts).applied(bench.model):
        rows = scoring.evaluate(bench.model, facts)
        right = scoring.recall(bench.model, others)["correct"] if len(others) else pd.Series([])
        return rows, 100 * right.to_numpy(dtype=float)
