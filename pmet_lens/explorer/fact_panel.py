"""The fact that all tabs of the explorer are about: chosen from examples, or typed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pmet_lens.data.facts import Fact, FactError
from pmet_lens.explorer import widgets
from pmet_lens.explorer.session import Session

_NEIGHBOURS = 5  # of an example; all of them make a long table


class FactPanel:
    """Subject, prompt and new answer; paraphrases and neighbours are folded away."""

    def __init__(self, session: Session, facts: Sequence[Fact]) -> None:
        self._session, self._facts = session, list(facts)
        texts = [f"{f.text} → {f.target_new}" for f in self._facts]
        self.example = widgets.choice(
            "Example",
            [("your own", -1), *((text, i) for i, text in enumerate(texts))],
            tip="A fact to begin with; change anything you like",
            wide="auto",
        )
        self.subject = widgets.text("Subject", tip="Who or what the fact is about", hint="Paris")
        self.prompt = widgets.text(
            "Prompt",
            tip="A text with {} for the subject that ends right before the answer",
            hint="{} is the capital of",
        )
        self.new = widgets.text("New answer", tip="What the model should say", hint="Italy")
        self.paraphrases = widgets.area(
            "Paraphrases", tip="Other phrasings, one per line, {} for the subject"
        )
        self.neighbours = widgets.area(
            "Neighbours",
            tip="Prompts about other subjects, whose answers should stay, one a line",
        )
        more = widgets.column(self.paraphrases, self.neighbours)
        self.box = widgets.column(
            self.example,
            widgets.row(self.subject, self.prompt, self.new),
            widgets.folded("Paraphrases and neighbours to check", more),
        )
        self.example.observe(self._choose, names="value")
        if self._facts:
            self.example.value = 0

    def _choose(self, change: Any) -> None:
        fields = (self.subject, self.prompt, self.new, self.paraphrases, self.neighbours)
        if change["new"] < 0:
            for field in fields:
                field.value = ""
            return
        fact = self._facts[change["new"]]
        self.subject.value, self.prompt.value = fact.subject, fact.prompt
        self.new.value = fact.target_new or ""
        self.paraphrases.value = "\n".join(p.replace(fact.subject, "{}") for p in fact.paraphrases)
        self.neighbours.value = "\n".join(p for p, _ in fact.neighbours[:_NEIGHBOURS])

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.value.replace("{}", self.subject.value)

    def read(self, *, new: bool, true: str | None = None) -> Fact:
        """The fact as it stands there. The model says the true answers, so call it in a step.

        Raises:
            FactError: as `pl.Fact` does, and without a new answer where `new` asks for one.
        """
        if new and not self.new.value.strip():
            raise FactError("Type the new answer first: what should the model say?")
        return self._session.fact(
            self.subject.value,
            self.prompt.value,
            self.new.value.strip() or None,
            true=true,
            paraphrases=_lines(self.paraphrases.value),
            neighbours=_lines(self.neighbours.value),
        )


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
