"""A session with one model: ask, edit, undo, compare. What an edit needs is computed once and kept.

This is the explorer without its buttons (`explorer.py`): every method returns a table or an edit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import pandas as pd

from pmet_lens.data import datasets
from pmet_lens.data.facts import Fact
from pmet_lens.editing import locate_and_edit
from pmet_lens.editing.edits import Edit
from pmet_lens.editing.method import Hparams, Method, SettingsError
from pmet_lens.editing.methods import hparams_for, named
from pmet_lens.editing.targets import OnStep
from pmet_lens.evaluation import scoring
from pmet_lens.models import generation, loading, tokens
from pmet_lens.models.model import Model, Projection, Site
from pmet_lens.moments.second_moments import second_moments

OnProgress = Callable[[int, int, str], None]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
TOKENS_PER_DIMENSION = 20
"""Text for the second moments: ten per dimension give the edits that eighty give
(`tests/benchmarks/results/precision.md`)."""


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


class Session:
    """One model, and what edits of it need.

    Args:
        moments: second moments as `pl.edit` takes them; sites that are missing are computed from
            `texts` when an edit needs them.
        hparams: for every method of the closed form; None: those known for the model.
        texts: for second moments; None: about the bundled world, for a bundled model only.
        n_tokens: of these; None: 20 per dimension of the widest key.
    """

    def __init__(
        self,
        model: Model,
        moments: Mapping[Site, Any] | None = None,
        hparams: Hparams | None = None,
        texts: Sequence[str] | None = None,
        n_tokens: int | None = None,
    ) -> None:
        self.model, self.own_hparams, self.texts = model, hparams, texts
        self.given = moments is not None
        self.n_tokens = n_tokens
        self.steps: list[Step] = []
        self._moments: dict[Site, Any] = dict(moments or {})
        self._contexts: list[str] | None = None
        self.on_change: Callable[[], object] = lambda: None
        """Called after every edit, undo and redo."""

    def settings(self, method: str | Method) -> Hparams | None:
        """The strengths `method` takes; None for a method that knows them itself (fine-tuning).

        Raises:
            SettingsError: for a model without known settings, where none were given.
        """
        value = named(method) if isinstance(method, str) else method
        if not isinstance(value, Method):
            return None
        return self.own_hparams if self.own_hparams is not None else hparams_for(self.model, value)

    def contexts(self) -> list[str]:
        """The context prefixes, sampled once from the unedited model."""
        if self._contexts is None:
            with self.model.live_edits.bare():
                self._contexts = tokens.sample_contexts(self.model)
        return self._contexts

    def moments(
        self, sites: Iterable[Site], on_progress: OnProgress | None = None
    ) -> dict[Site, Any]:
        """The second moments of the sites; those not known yet are computed on the unedited model.

        Raises:
            SettingsError: where they would have to be computed and there is no text.
        """
        missing = [site for site in sites if site not in self._moments]
        for projection in PROJECTIONS:
            layers = [site.layer for site in missing if site.projection == projection]
            if not layers:
                continue
            what = f"second moments of {len(layers)} layers, once per model (tokens)"
            with self.model.live_edits.bare():
                more = second_moments(
                    self.model,
                    self._texts(),
                    layers,
                    projections=(projection,),
                    n_tokens=self.tokens_read(),
                    on_tokens=_counter(on_progress, what),
                )
            self._moments.update(more)
        return self._moments

    def tokens_read(self) -> int:
        """How many tokens second moments are computed from."""
        width = max(self.model.d_in(Site(0, "mlp")), self.model.d_in(Site(0, "attn")))
        return self.n_tokens or TOKENS_PER_DIMENSION * width

    def _texts(self) -> Iterable[str]:
        if self.texts is None and not loading.of_the_world(self.model):
            raise SettingsError(
                f"An edit of {self.model.name!r} needs second moments, and there is no text to "
                "compute them from: give explore texts= (a list of strings, such as "
                "list(pl.texts(path)), or pl.sampled_texts(model)) or moments=."
            )
        return datasets.texts() if self.texts is None else self.texts

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
        with self.model.live_edits.bare():
            answers = generation.answers(self.model, asked) if asked else []
        true = true or answers.pop(0) or "?"
        pairs = tuple(zip(neighbours, [text or "?" for text in answers], strict=True))
        return Fact(subject, prompt, new or None, true, filled, pairs)

    def edit(
        self,
        fact: Fact,
        method: str = "PMET",
        change: Mapping[str, Any] | None = None,
        on_step: OnStep | None = None,
        on_progress: OnProgress | None = None,
    ) -> Step:
        """Edit one fact on the model as it is now, and leave the edit on it.

        `method`: a name of `pl.METHODS` or `pl.ABLATIONS`. `change`: fields of the settings that
        differ. Whatever goes wrong, or is raised in a callback, leaves the model as it was.

        Raises:
            FactError, SettingsError, SolveError: as `pl.edit` does.
        """
        value, hp, upon = named(method), self.settings(method), tuple(self.on())
        if hp is not None:
            hp = replace(hp, **(change or {}))
        known, contexts = self.needed(value, hp, on_progress)
        made = locate_and_edit.edit(self.model, [fact], known, value, hp, contexts, on_step=on_step)
        table = self.answers(fact, made)
        made.apply_(self.model)
        step = Step(fact, method, hp, made, table, upon)
        self.steps.append(step)
        self.on_change()
        return step

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

    def needed(
        self, method: Any, hp: Any, on_progress: OnProgress | None = None
    ) -> tuple[Mapping[Site, Any], list[str]]:
        """The second moments and context prefixes that a method with these settings takes."""
        if not isinstance(method, Method):
            return {}, []
        hp.check(self.model.n_layers)
        sites = [Site(layer, projection) for layer in hp.layers for projection in method.write]
        if on_progress is not None:
            on_progress(0, 0, "context prefixes, once per model")
        return self.moments(sites, on_progress), self.contexts()

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


def _counter(on_progress: OnProgress | None, what: str) -> Callable[[int, int], object] | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(done, total, what)
