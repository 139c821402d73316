"""Settings by measurement: `tune` tries those of `spaces.py` on facts that are not edited later.

Successive halving over facts: every group of settings is tried on a few facts, the better half on
twice as many, and so on; the first guess stays to the end, so that one sees what tuning is worth.
Targets of a group are optimised once per fact and kept; λ and the layers below the last only cost a
solve and an evaluation. What is spent is counted in targets, not seconds, so that the same call
gives the same answer on every machine, also after a cut.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pmet_lens.data.facts import Fact, FactError, check_editable, listed
from pmet_lens.editing.edits import Editor
from pmet_lens.editing.method import Method, SettingsError
from pmet_lens.editing.methods import resolved
from pmet_lens.evaluation.knowledge import recalled
from pmet_lens.experiments.trials import Bench, Trial
from pmet_lens.models.model import Model, Site
from pmet_lens.moments.inputs import EditInputs
from pmet_lens.plans.goals import Goal
from pmet_lens.plans.search import Search
from pmet_lens.plans.spaces import Space, check_tunable, first_guess
from pmet_lens.plans.tuned import Tuned, told

LEAST = 8
"""Facts to be tuned on at least."""
PER_FACT = 4
"""The default budget: so many targets per fact."""
MOST_PER_FACT = 25
"""A budget of more targets per fact tries more settings than the facts can tell apart."""


def tune(
    model: Model | Bench,
    facts: Fact | Sequence[Fact],
    method: Method | Editor | Trial | str = "PMET",
    budget: int | None = None,
    *,
    goal: Goal | str = "S",
    others: Sequence[Fact] = (),
    edited: Sequence[Fact] = (),
    n_edits: int | None = None,
    hparams: Any = None,
    fast: bool | None = None,
    folder: str | Path | None = None,
    texts: Sequence[str] | None = None,
    on_trial: Callable[[int, int], object] | None = None,
) -> Tuned:
    """Find settings of `method` on this model by editing `facts`, which are then used up: measure
    on others. See `Tuned` and, for a fair comparison of methods, `compare(…, tune_on=facts)`.

    Searched around a first guess (`hparams`, else what is known for the model, else
    `suggest_hparams`): the last critical layer, the number of layers, λ from a tenth of the guess
    to ten times it, the clamp, for PMET the norm it refers to; AlphaEdit's null space; of
    fine-tuning the learning rate, the layer and the bound.

    Args:
        model: or a `Bench`, whose folder keeps what was found: a call that was cut goes on.
        facts: at least 8, better 40, that the model recalls, with paraphrases and neighbours.
        method: or a `Trial`, whose settings are the first guess.
        budget: targets (facts × groups of settings) that may be optimised; None: 4 per fact.
        goal: what for, `Goal` or a metric's name.
        others: facts for the floor on collateral.
        edited: facts that will be edited with the result; one that is tuned on is refused.
        n_edits: how many facts at once the result is for (λ in proportion); None: as many as here.
        fast: search with `Hparams.fast()` and confirm with the first guess's own steps, where those
            are others. None: where the model has ten million parameters and the method does not
            store exactly.
        folder: keeps targets and results where `model` is no `Bench`; None: nothing is kept.
        texts: for second moments, where `model` is no `Bench`; None: as `EditInputs` chooses.
        on_trial: called with (targets spent so far, budget).

    Raises:
        FactError: too few facts for the budget, contradicting ones, or some that are edited later.
        SettingsError: a budget that is too small, a method without settings to tune.
    """
    trial = method if isinstance(method, Trial) else Trial(resolved(method))
    facts = listed(facts)
    goal = Goal(goal) if isinstance(goal, str) else goal
    check_tunable(trial.method)
    check_editable(facts)
    refuse_overlap(facts, listed(edited))
    budget = PER_FACT * len(facts) if budget is None else budget
    if len(facts) < LEAST:
        raise FactError(f"tune needs at least {LEAST} facts, better 40; there are {len(facts)}.")
    if budget > MOST_PER_FACT * len(facts):
        raise FactError(
            f"{len(facts)} facts are too few for a budget of {budget} targets: so many settings "
            f"could not be told apart. Give {math.ceil(budget / MOST_PER_FACT)} facts, or a budget "
            f"of at most {MOST_PER_FACT * len(facts)}."
        )
    real = model.model if isinstance(model, Bench) else model
    guess, source = _guess(model, trial, facts, hparams)
    known = _what_is_known(real, facts)
    with _at_bench(model, trial, guess, folder, texts) as bench:
        search = Search(bench, trial, facts, guess, goal, others, fast, budget, on_trial)
        rows = search.run()
    return told(search, rows, source, known, n_edits or len(facts))


def refuse_overlap(tuned_on: Sequence[Fact], edited: Sequence[Fact]) -> None:
    """Raises `FactError` if a fact stands in both lists: same subject and relation, or prompt."""
    pairs = {(f.subject, key) for f in tuned_on for key in _asks(f)}
    for fact in edited:
        if any((fact.subject, key) in pairs for key in _asks(fact)):
            raise FactError(
                f"{fact.text!r} is tuned on and edited, too: its score would be too good. Tune on "
                "facts that are not edited later."
            )


def _asks(fact: Fact) -> Iterator[tuple[str, str]]:
    if fact.relation is not None:
        yield "relation", fact.relation
    yield "prompt", fact.prompt


def _guess(
    model: Model | Bench, trial: Trial, facts: Sequence[Fact], given: Any
) -> tuple[Any, str]:
    """The first guess, with nothing left open, and where it is from."""
    found, source = given, "the settings given"
    if found is None and isinstance(model, Bench):
        found = _known_at(model, trial)
    elif found is None and trial.hparams is not None:
        found = replace(trial.hparams, **trial.change)
    if found is None:
        real = model.model if isinstance(model, Bench) else model
        found, source = first_guess(real, facts, resolved(trial.method))
        found = replace(found, **trial.change)
    if isinstance(trial.method, Method):
        at_once = min(trial.method.at_once or len(facts), len(facts))
        found = found.settled(trial.method, at_once)
    return found, source


def _known_at(bench: Bench, trial: Trial) -> Any:
    try:
        return bench.hparams(trial)
    except SettingsError:
        return None


def _what_is_known(model: Model, facts: Sequence[Fact]) -> str:
    """A sentence where the model does not recall the facts, which is also a warning."""
    asked = [fact for fact in facts if fact.target_true is not None]
    if not asked:
        return "The facts have no target_true, so nobody knows whether the model recalls them."
    right = len(recalled(model, asked))
    if right == len(asked):
        return ""
    said = (
        f"The model recalls only {right} of these {len(asked)} facts: what it does not know it "
        "does not recall at any layer, and settings for that are others. Take pl.recalled(model)."
    )
    warnings.warn(said, stacklevel=3)
    return said


@contextmanager
def _at_bench(
    model: Model | Bench,
    trial: Trial,
    guess: Any,
    folder: str | Path | None,
    texts: Sequence[str] | None,
) -> Iterator[Bench]:
    """The bench given, or one with the second moments that the search may need."""
    if isinstance(model, Bench):
        yield model
        return
    moments: Mapping[Site, Any] = {}
    if isinstance(trial.method, Method):
        every = frozenset(range(model.n_layers - 1))
        groups = Space(trial.method, guess, model.n_layers, every).groups()
        layers = {layer for hp in groups for layer in range(hp.layers[0] - 2, hp.layers[-1] + 1)}
        sites = [Site(n, p) for n in sorted(layers & every) for p in trial.method.write]
        moments = EditInputs(model, texts=texts).moments(sites)
    with tempfile.TemporaryDirectory() as own:
        yield Bench(model, own if folder is None else folder, moments=moments)
