"""What the tabs of the explorer share: the step that runs, the fact they are about, and a page per
model."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from pmet_lens.data.facts import Fact
from pmet_lens.explorer import widgets
from pmet_lens.explorer.fact_panel import FactPanel
from pmet_lens.explorer.jobs import Pace, Runner, Stopped, Tick, duration
from pmet_lens.explorer.session import Session
from pmet_lens.explorer.views import Pane, View

Work = Callable[[Tick], Any]
"""What a step does in its thread; what it returns is shown."""


class Shell:
    """One step at a time with its progress, what remains, and the line that says how it went."""

    def __init__(self) -> None:
        self.runner = Runner(self._progress, self._busy, self._second)
        self._pace, self._report = Pace(), ("", 0, 0, "")
        self._buttons: list[Any] = []
        self._bar, self._status = widgets.progress(), widgets.html()
        stop = "Stop the step that is running; the model stays as it was"
        self._stop = widgets.button("Stop", stop, self.runner.stop, "warning")
        self._stop.disabled = True
        rule = widgets.html(widgets.RULES)
        rule.layout.display = "none"
        self.line = widgets.row(self._bar, self._stop, self._status, rule)
        self.box: Any = widgets.column(self.line)

    def button(self, label: str, tip: str, on_click: Callable[[], object], style: str = "") -> Any:
        """A button that is off while a step runs."""
        made = widgets.button(label, tip, lambda: self._safely(on_click), style)
        made.disabled = self.runner.busy
        self._buttons.append(made)
        return made

    def run(
        self,
        what: str,
        work: Work,
        then: Callable[[Any], object],
        instead: Callable[[], object] = lambda: None,
    ) -> None:
        """Run `work(tick)` in a thread with progress and the stop button on, then show its result
        with `then`. Errors are shown in words; after one, and after Stop, `instead` is called.
        Where there is no event loop, nobody could click meanwhile, and this waits."""
        if not self.runner.busy:  # else `start` refuses
            self._pace.begin(what, time.monotonic())
            self._report = (what, 0, 0, "")
        self.runner.start(work, lambda future: self._finish(what, future, then, instead))
        self._second()
        if self.runner.loop is None:
            self.wait()

    def say(self, text: str, kind: str = "") -> None:
        """Show a line of status."""
        self._status.value = widgets.message(text, kind)

    def wait(self) -> None:
        """Block until the step that is running is over, and what it shows is there."""
        self.runner.wait()

    def _finish(
        self,
        what: str,
        future: Future[Any],
        then: Callable[[Any], object],
        instead: Callable[[], object],
    ) -> None:
        error = future.exception()
        self._bar.value = 0.0 if error else 1.0
        if error is None:
            took = self._pace.end(time.monotonic())
            self.say(f"{what}: done, in {duration(took)}.")  # `then` may have more to say
            self._safely(lambda: then(future.result()))
            return
        if isinstance(error, Stopped):
            self.say(f"{what}: stopped. The model is as it was.")
        else:
            self._failed(error)
        instead()

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

    def _progress(self, done: int, total: int, part: str) -> None:
        if self.runner.busy:
            self._report = (self._report[0], done, total, part)
            self._bar.value = min(1.0, done / total) if total else 0.0
            self._second()

    def _second(self) -> None:
        """Say how far the step is, and what remains."""
        what, done, total, part = self._report
        left = self._pace.left(done, total, part, time.monotonic())
        count = f"{part}: {done:,} of {total:,}" if total else part
        self.say(f"{what} … {', '.join(filter(None, (count, left)))}", "progress")


class Page:
    """One model: its session, the fact its tabs are about, and the shell they run in."""

    def __init__(self, shell: Shell, session: Session, facts: Sequence[Fact]) -> None:
        self.session, self.runner = session, shell.runner
        self.button, self.run, self.say, self.wait = shell.button, shell.run, shell.say, shell.wait
        self.fact = FactPanel(session, facts, shell.runner)


class Tab(ABC):
    """A tab of a page. Each puts its controls, the button that runs its step and the pane that
    shows what the step makes into `box`."""

    def __init__(self, page: Page, label: str, tip: str) -> None:
        self._shell = page
        self.button = page.button(label, tip, self.run, "primary")
        self.pane = Pane(page.button, page.say)
        self.box: Any = None

    def run(self) -> None:
        """Run the step and show what it makes."""
        what, work = self.step()

        def drawn(tick: Tick) -> Any:
            return self.drawn(work(tick))

        self._shell.run(what, drawn, self.show, self.pane.again)

    @abstractmethod
    def step(self) -> tuple[str, Work]:
        """The step that the controls describe: its name, and its work."""

    def drawn(self, made: Any) -> Any:
        """What the step made, with its figure drawn; still in the step's thread."""
        view, text = made
        return view, text, view.inline()

    def show(self, made: tuple[View, str, str]) -> None:
        """Show what the step made: a view, HTML above its figure, and HTML of the figure."""
        self.pane.show(*made)
