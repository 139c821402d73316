"""A session with one model: ask, edit, undo, compare. What an edit needs is computed once and kept.

This is the explorer without its buttons (`explorer.py`): every method returns a table or an edit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from pmet_lens.data.facts import Fact
from pmet_lens.editing import locate_and_edit
from pmet_lens.editing.edits import Edit, Editor
from pmet_lens.editing.method import Hparams, Method, SettingsError
from pmet_lens.editing.methods import ABLATIONS, METHODS, named
from pmet_lens.editing.targets import OnStep
from pmet_lens.evaluation import scoring
from pmet_lens.models import generation, tokens
from pmet_lens.models.model import Model, Site
from pmet_lens.moments.inputs import EditInputs, OnProgress


@dataclass(frozen=True, eq=False)
class Step:
    """One edit of a session."""

    fact: Fact
    method: str
    hparams: Any
    """What the method was given; None for one that knows its settings itself."""
    edit: Edit
    table: pd.DataFrame
    """`Session.answers` of the fact, before and after."""
    upon: tuple[Step, ...] = ()
    """The steps whose edits were on the model when this one was made."""


class Session(EditInputs):
    """One model, what edits of it need (arguments: those of `EditInputs`), and the edits so far."""

    def __init__(
        self,
        model: Model,
        moments: Mapping[Site, Any] | None = None,
        hparams: Hparams | None = None,
        texts: Sequence[str] | None = None,
        n_tokens: int | None = None,
    ) -> None:
        super().__init__(model, moments, hparams, texts, n_tokens)
        self.steps: list[Step] = []
        self._unedited: dict[str, str] = {}
        self.on_change: Callable[[], object] = lambda: None
        """Called after every edit, undo and redo."""
        self.on_made: Callable[[Fact, Edit], object] = lambda fact, edit: None
        """Called with an edit before its answers are asked for, when it is not on the model."""

    def ask(self, prompt: str, k: int = 5, n_tokens: int = 12) -> pd.DataFrame:
        """The `k` likeliest next tokens without and with the edits that are on the model. Columns
        model ("before", "after"), rank (from 1), token, probability (0 to 1), continuation (the
        next `n_tokens` tokens, greedily; the same in every row of a model)."""
        with self.model.live_edits.bare():
            before = self._asked(prompt, k, n_tokens)
        after = self._asked(prompt, k, n_tokens)
        both = [before.assign(model="before"), after.assign(model="after")]
        columns = ["model", "rank", "token", "probability", "continuation"]
        return pd.concat(both, ignore_index=True).reindex(columns=columns)

    def _asked(self, prompt: str, k: int, n_tokens: int) -> pd.DataFrame:
        (continuation,) = generation.answers(self.model, [prompt], n_tokens)
        return scoring.ask(self.model, prompt, k).assign(continuation=continuation)

    def fact(
        self,
        subject: str,
        prompt: str,
        new: str | None = None,
        *,
        true: str | None = None,
        paraphrases: Sequence[str] = (),
        neighbours: Sequence[str] = (),
    ) -> Fact:
        """A fact from what a person types. In paraphrases `{}` stands for the subject, neighbours
        are prompts about others; the true answers are what the unedited model says.

        Raises:
            FactError: as `pl.Fact` does.
        """
        filled = tuple(p.replace("{}", subject) for p in paraphrases)
        Fact(subject, prompt, "checked")  # before the model is asked
        asked = [*([] if true else [prompt.replace("{}", subject)]), *neighbours]
        answers = self.unedited(asked)
        true = true or answers.pop(0) or "?"
        pairs = tuple(zip(neighbours, [text or "?" for text in answers], strict=True))
        return Fact(subject, prompt, new or None, true, filled, pairs)

    def unedited(self, prompts: Sequence[str]) -> list[str]:
        """What the unedited model says to each prompt, which is asked once in a session."""
        new = [p for p in dict.fromkeys(prompts) if p not in self._unedited]
        if new:
            with self.model.live_edits.bare():
                answers = generation.answers(self.model, new)
            self._unedited.update(zip(new, answers, strict=True))
        return [self._unedited[prompt] for prompt in prompts]

    def edit(
        self,
        fact: Fact,
        method: Method | Editor | str = "PMET",
        change: Mapping[str, Any] | None = None,
        on_step: OnStep | None = None,
        on_progress: OnProgress | None = None,
    ) -> Step:
        """Edit one fact on the model as it is now, and leave the edit on it.

        `method`: one of `pl.METHODS` or `pl.ABLATIONS`, or its name. `change`: fields of the
        settings that differ. Whatever goes wrong, or is raised in a callback, leaves the model as
        it was.

        Raises:
            FactError, SettingsError, SolveError: as `pl.edit` does.
        """
        step = self.trial(fact, method, change, on_step, on_progress)
        self.keep(step)
        return step

    def trial(
        self,
        fact: Fact,
        method: Method | Editor | str = "PMET",
        change: Mapping[str, Any] | None = None,
        on_step: OnStep | None = None,
        on_progress: OnProgress | None = None,
    ) -> Step:
        """The same edit, not left on the model and not among `steps`. Raises as `edit` does."""
        name = _name(method)
        value, hp, upon = named(name), self.settings(name), tuple(self.on())
        if hp is not None:
            hp = replace(hp, **(change or {}))
        known, contexts = self.needed(value, hp, on_progress)
        made = locate_and_edit.edit(
            self.model, [fact], known, value, hp, contexts, on_step=on_step, check=False
        )
        self.on_made(fact, made)
        return Step(fact, name, hp, made, self.answers(fact, made), upon)

    def keep(self, step: Step) -> None:
        """Put a `trial` onto the model, and among `steps`."""
        step.edit.apply_(self.model)
        self.steps.append(step)
        self.on_change()

    def undo(self, step: Step) -> None:
        """Take one edit off the model, whatever came after it; it stays in `steps`."""
        step.edit.revert_(self.model)
        self.on_change()

    def redo(self, step: Step) -> None:
        """Put an edit that was undone onto the model again, after the others."""
        step.edit.apply_(self.model)
        self.on_change()

    def is_on(self, step: Step) -> bool:
        """Whether the edit is on the model now."""
        return step.edit in self.model.live_edits

    def on(self) -> list[Step]:
        """The steps whose edits are on the model now."""
        return [step for step in self.steps if self.is_on(step)]

    def answers(self, fact: Fact, edit: Edit) -> pd.DataFrame:
        """What the model says about a fact, its paraphrases and its neighbours as it is now and
        with `edit` on it too. Columns kind, prompt, before, after (up to 6 tokens, greedily),
        p_before, p_after (probability of the new answer, per token), says_new (after the edit every
        token of the new answer is the arg-max). The model is left as it was."""
        kinds = {"rewrite": [fact.text], "paraphrase": list(fact.paraphrases)}
        kinds["neighbour"] = [prompt for prompt, _ in fact.neighbours]
        asked = [(kind, prompt) for kind, prompts in kinds.items() for prompt in prompts]
        prompts = [prompt for _, prompt in asked]
        wanted = [tokens.Prompt(prompt, None, fact.target_new, fact.blank) for prompt in prompts]
        columns: dict[str, Any] = {"kind": [kind for kind, _ in asked], "prompt": prompts}
        columns["before"] = generation.answers(self.model, prompts)
        scores = scoring.score(self.model, wanted)
        with edit.applied(self.model):
            columns["after"] = generation.answers(self.model, prompts)
            later = scoring.score(self.model, wanted)
        columns["p_before"] = [math.exp(-s.nll) for s in scores]
        columns["p_after"] = [math.exp(-s.nll) for s in later]
        columns["says_new"] = [s.right == 1 for s in later]
        return pd.DataFrame(columns)


def _name(method: Method | Editor | str) -> str:
    """The name of a method that is given as a value, by which a session's lines of code call it."""
    if isinstance(method, str):
        return method
    for name, value in {**METHODS, **ABLATIONS}.items():
        if value == method:
            return name
    raise SettingsError(
        f"A session edits with what is in pl.METHODS and pl.ABLATIONS; with {method} use pl.edit."
    )
