"""The fact that all tabs of a page are about: chosen from examples or typed, and checked while it
is typed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from pmet_lens.data.facts import Fact, FactError, Implication
from pmet_lens.explorer import typed, widgets
from pmet_lens.explorer.jobs import Runner
from pmet_lens.explorer.session import Session

_NEIGHBOURS = 5  # of an example; all of them make a long table
_PAUSE = 0.4  # seconds without a letter before the model is asked
_ARROWS = ("→", "->")


class FactPanel:
    """Subject, prompt and new answer; paraphrases, neighbours and what follows are folded away."""

    def __init__(self, session: Session, facts: Sequence[Fact], runner: Runner) -> None:
        self._session, self._runner = session, runner
        self._facts: list[Fact] = []
        tip = "A fact to begin with; change anything you like"
        self.example = widgets.choice("Example", [("your own", -1)], tip=tip, wide="auto")
        tip = "Who or what the fact is about"
        self.subject = widgets.text("Subject", tip=tip, hint="Paris", live=True)
        tip = "A text with {} for the subject that ends right before the answer"
        self.prompt = widgets.text("Prompt", tip=tip, hint="{} is the capital of", live=True)
        tip = "What the model should say"
        self.new = widgets.text("New answer", tip=tip, hint="Italy", live=True)
        self.paraphrases = widgets.area(
            "Paraphrases", tip="Other phrasings, one per line, {} for the subject"
        )
        self.neighbours = widgets.area(
            "Neighbours", tip="Prompts about other subjects, whose answers should stay, one a line"
        )
        tip = "Prompts whose answer follows from the new one, one per line: prompt → answer"
        self.follows = widgets.area("Follows", tip=tip, rows=2)
        more = widgets.column(self.paraphrases, self.neighbours, self.follows)
        self.checked = widgets.html()
        self.box = widgets.column(
            self.example,
            widgets.row(self.subject, self.prompt, self.new),
            self.checked,
            widgets.folded("Paraphrases and neighbours to check, and what follows", more),
        )
        self._pause: asyncio.TimerHandle | None = None
        for field in (self.subject, self.prompt, self.new):
            field.observe(lambda _: self.check(), names="value")
        self.example.observe(lambda change: self._choose(change["new"]), names="value")
        self.offer(facts)

    def offer(self, facts: Sequence[Fact]) -> None:
        """Offer these facts as examples, and choose the first one where nothing is typed yet."""
        self._facts = list(facts)
        texts = [f"{f.text} → {f.target_new}" for f in self._facts]
        self.example.options = [("your own", -1), *((t, i) for i, t in enumerate(texts))]
        if self._facts and not self.subject.value:
            self.example.value = 0

    def _choose(self, number: int) -> None:
        fields = (self.subject, self.prompt, self.new, self.paraphrases, self.neighbours)
        texts = [""] * 6
        if number >= 0:
            fact = self._facts[number]
            paraphrases = [text.replace(fact.subject, "{}") for text in fact.paraphrases]
            neighbours = [text for text, _ in fact.neighbours[:_NEIGHBOURS]]
            texts = [fact.subject, fact.prompt, fact.target_new or ""]
            texts += ["\n".join(paraphrases), "\n".join(neighbours), _told(fact)]
        for field, text in zip((*fields, self.follows), texts, strict=True):
            field.value = text

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.value.replace("{}", self.subject.value)

    def check(self) -> None:
        """Say where the tokens of what is typed lie, and, when the typing stops for a moment, what
        the model says now (where there is an event loop)."""
        if self._pause is not None:
            self._pause.cancel()
        model = self._session.model
        subject, prompt, new = (f.value for f in (self.subject, self.prompt, self.new))
        if not (subject.strip() and prompt.strip()):
            self.checked.value = widgets.message("Type a subject, and a prompt with {} for it.")
            return
        try:
            found = typed.typed(model, subject, prompt, new)
        except FactError as error:
            self.checked.value = widgets.message(str(error), "error")
            return
        self.checked.value = typed.shown(found)
        loop = self._runner.loop
        if loop is not None:
            self._pause = loop.call_later(_PAUSE, lambda: self._look(found))

    def _look(self, found: typed.Typed) -> None:
        model = self._session.model

        def show(asked: typed.Typed) -> None:
            same = (asked.fact.subject, asked.fact.prompt, asked.fact.target_new or "")
            now = (f.value for f in (self.subject, self.prompt, self.new))
            if same == tuple(text.strip() for text in now):
                self.checked.value = typed.shown(asked)

        neighbours = _lines(self.neighbours.value)

        def look() -> None:
            asked = typed.asked(model, found)
            self._runner.post(lambda: show(asked))
            if not self._session.on():  # an edit needs these, and need not wait for them then
                self._session.unedited(neighbours)

        self._runner.look(look, lambda _: None)

    def read(self, *, new: bool, true: str | None = None) -> Fact:
        """The fact as it stands there. The model says the true answers, so call it in a step.

        Raises:
            FactError: as `pl.Fact` does, without a new answer where `new` asks for one, and for a
                line of what follows without an arrow.
        """
        answer = self.new.value.strip()
        if new and not answer:
            raise FactError("Type the new answer first: what should the model say?")
        number = self.example.value
        given = self._facts[number] if 0 <= number < len(self._facts) else None
        subject, prompt = self.subject.value, self.prompt.value
        same = given is not None and (given.subject, given.prompt) == (subject, prompt)
        if same and given is not None:
            true = true or given.target_true
        fact = self._session.fact(
            subject,
            prompt,
            answer or None,
            true=true,
            paraphrases=_lines(self.paraphrases.value),
            neighbours=_lines(self.neighbours.value),
        )
        if same and given is not None and given.target_new == answer:
            fact = replace(fact, aliases=given.aliases, relation=given.relation)
            stays = tuple(one for one in given.implications if one.stays)
        else:
            stays = ()
        return replace(fact, implications=(*_followed(self.follows.value, given), *stays))


def _told(fact: Fact) -> str:
    """What follows from a fact, as it is typed."""
    pairs = [(one.prompt, one.answers[0]) for one in fact.implications if not one.stays]
    return "\n".join(f"{prompt} → {answer}" for prompt, answer in (*pairs, *fact.portability))


def _followed(text: str, given: Fact | None) -> list[Implication]:
    """What was typed of it; other names of the answers and the kinds are those of the example."""
    known = {} if given is None else {one.prompt: one for one in given.implications}
    found = []
    for line in _lines(text):
        arrow = next((arrow for arrow in _ARROWS if arrow in line), None)
        if arrow is None:
            raise FactError(f"Write what follows as “prompt → answer”; {line!r} has no arrow.")
        prompt, answer = (part.strip() for part in line.split(arrow, 1))
        one = known.get(prompt)
        same = one is not None and one.answers[0] == answer
        found.append(one if one is not None and same else Implication(prompt, (answer,)))
    return found


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
