"""What the tabs of the explorer share: the fact they are about, the step that runs, and a page."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from pmet_lens.data.facts import Fact, FactError
from pmet_lens.explorer import widgets
from pmet_lens.explorer.jobs import Runner, Stopped, Tick
from pmet_lens.explorer.session import Session
from pmet_lens.explorer.views import Pane

Work = Callable[[Tick], Any]
"""What a step does in its thread; what it returns is shown."""
_NEIGHBOURS = 5  # of an example; all of them make a long table


class FactPanel:
    """The fact that all tabs are about, chosen from examples or typed: subject, prompt and new
    answer; paraphrases and neighbours are folded away."""

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
            "Neighbours", tip="Prompts about other subjects, whose answers should stay, one a line"
        )
        more = widgets.column(self.paraphrases, self.neighbours)
        self.box = widgets.column(
            self.example,
            widgets.row(self.subject, self.prompt, self.new),
            widgets.folded("Paraphrases and neighbours to check", more),
        )
        self.example.observe(lambda change: self._choose(change["new"]), names="value")
        if self._facts:
            self.example.value = 0

    def _choose(self, number: int) -> None:
        fields = (self.subject, self.prompt, self.new, self.paraphrases, self.neighbours)
        texts = [""] * len(fields)
        if number >= 0:
            fact = self._facts[number]
            paraphrases = [text.replace(fact.subject, "{}") for text in fact.paraphrases]
            neighbours = [text for text, _ in fact.neighbours[:_NEIGHBOURS]]
            texts = [fact.subject, fact.prompt, fact.target_new or ""]
            texts += ["\n".join(paraphrases), "\n".join(neighbours)]
        for field, text in zip(fields, texts, strict=True):
            field.value = text

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.value.replace("{}", self.subject.value)

    def read(self, *, new: bool, true: str | None = None) -> Fact:
        """The fact as it stands there. The model says the true answers, so call it in a step.

        Raises:
            FactError: as `pl.Fact` does, and without a new answer where `new` asks for one.
        """
        answer = self.new.value.strip()
        if new and not answer:
            raise FactError("Type the new answer first: what should the model say?")
        return self._session.fact(
            self.subject.value,
            self.prompt.value,
            answer or None,
            true=true,
            paraphrases=_lines(self.paraphrases.value),
            neighbours=_lines(self.neighbours.value),
        )


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


class Shell:
    """The fact, one step at a time with its progress, and the line that says how it went."""

    def __init__(self, session: Session, facts: Sequence[Fact]) -> None:
        self.session = session
        self.runner = Runner(self._progress, self._busy)
        self.fact = FactPanel(session, facts)
        self._buttons: list[Any] = []
        self._bar, self._status = widgets.progress(), widgets.html()
        stop = "Stop the step that is running; the model stays as it was"
        self._stop = widgets.button("Stop", stop, self.runner.stop, "warning")
        self._stop.disabled = True
        bar = widgets.row(self._bar, self._stop, self._status)
        self.box: Any = widgets.column(self.fact.box, bar)

    def button(self, label: str, tip: str, on_click: Callable[[], object], style: str = "") -> Any:
        """A button that is off while a step runs."""
        made = widgets.button(label, tip, lambda: self._safely(on_click), style)
        made.disabled = self.runner.busy
        self._buttons.append(made)
        return made

    def run(self, what: str, work: Work, then: Callable[[Any], object]) -> None:
        """Run `work(tick)` in a thread with progress and the stop button on, then show its result
        with `then`. Errors are shown in words."""
        self.runner.start(work, lambda future: self._finish(what, future, then))
        self._progress(0, 0, what)

    def say(self, text: str, kind: str = "") -> None:
        """Show a line of status."""
        self._status.value = widgets.message(text, kind)

    def wait(self) -> None:
        """Block until the step that is running is over, and what it shows is there."""
        self.runner.wait()

    def _finish(self, what: str, future: Future[Any], then: Callable[[Any], object]) -> None:
        error = future.exception()
        self._bar.value = 0.0 if error else 1.0
        if error is None:
            self.say(f"{what}: done.")  # before `then`, which may have more to say
            self._safely(lambda: then(future.result()))
        elif isinstance(error, Stopped):
            self.say(f"{what}: stopped. The model is as it was.")
        else:
            self._failed(error)

    def _safely(self, call: Callable[[], object]) -> None:
        try:
            call()
        except (ValueError, OSError) as error:  # every error of this package is a ValueError
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        self.say(f"{kind}{error}", "error")

    def _busy(self, busy: bool) -> None:
        self._stop.disabled = not busy
        for made in self._buttons:
            made.disabled = busy

    def _progress(self, done: int, total: int, what: str) -> None:
        self._bar.value = min(1.0, done / total) if total else 0.0
        self.say(f"{what}: {done:,} of {total:,}" if total else f"{what} …")


class Tab(ABC):
    """A page. Each tab puts its controls, the button that runs its step and the pane that shows
    what the step makes into `box`."""

    def __init__(self, shell: Shell, label: str, tip: str) -> None:
        self._shell = shell
        self.button = shell.button(label, tip, self.run, "primary")
        self.pane = Pane(shell.button, shell.say)
        self.box: Any = None

    def run(self) -> None:
        """Run the step and show what it makes."""
        what, work = self.step()
        self._shell.run(what, work, self.show)

    @abstractmethod
    def step(self) -> tuple[str, Work]:
        """The step that the controls describe: its name, and its work."""

    def show(self, made: Any) -> None:
        """Show what the step made: a view, and HTML above its figure."""
        self.pane.show(*made)
