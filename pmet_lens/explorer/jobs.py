"""One long step at a time in a thread, with progress, the time that is left, and a way to stop it.

The step runs beside the kernel, so buttons work meanwhile; whatever it has to say is handed to the
thread that started it. Stopping raises `Stopped` inside the step, at its next report or the next
forward pass, and the package restores the model as on any other error.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any

from torch.nn.modules import module

from pmet_lens.data.progress import heard

Tick = Callable[[int, int, str], None]
"""`tick(done, all, what)`: reports progress (all 0: not known), and raises `Stopped` when asked."""
_OFTEN = 0.1  # seconds between two reports of the same thing
_BRIEF = 0.5  # seconds a progress line lasts before it is told


class Stopped(Exception):
    """The step was stopped; the model is as it was before."""


class Pace:
    """How long a step will go on, told from how its parts went so far; and of one that does not
    count what it does, how long it took the last time. Times are seconds on any one clock."""

    def __init__(self) -> None:
        self._lasted: dict[str, float] = {}
        self._step, self._part, self._began, self._part_began, self._at = "", "", 0.0, 0.0, 0

    def begin(self, step: str, now: float) -> None:
        """A step of this name begins."""
        self._step, self._part, self._began = step, "", now

    def end(self, now: float) -> float:
        """It is over, and was not cut short: how long it took."""
        self._lasted[self._step] = now - self._began
        return self._lasted[self._step]

    def left(self, done: int, total: int, part: str, now: float) -> str:
        """What remains when `done` of `total` of a part are done: "about 12 s left", "8 s so far,
        21 s the last time", or nothing where a second has not passed yet."""
        if part != self._part or done < self._at:
            self._part, self._part_began, self._at = part, now, done
        spent, passed = now - self._part_began, done - self._at
        if total and passed > 0 and spent >= 1:
            return f"about {duration(spent * (total - done) / passed)} left"
        so_far = now - self._began
        before = self._lasted.get(self._step)
        if so_far < 1:
            return ""
        last = "" if before is None else f", {duration(before)} the last time"
        return f"{duration(so_far)} so far{last}"


def duration(seconds: float) -> str:
    """ "7 s", "3 min 20 s", "2 h 5 min"."""
    whole = max(1, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


class Runner:
    """Runs one step at a time.

    `on_progress(done, all, what)` and `on_busy(whether)` are called as `then` is: in the event loop
    of the thread that started the step, or inside `wait` where there is none; `on_second` every
    second while a step runs, in the loop alone.
    """

    def __init__(
        self,
        on_progress: Callable[[int, int, str], object] = lambda done, total, what: None,
        on_busy: Callable[[bool], object] = lambda busy: None,
        on_second: Callable[[], object] = lambda: None,
    ) -> None:
        self._on_progress, self._on_busy, self._on_second = on_progress, on_busy, on_second
        self._pool: ThreadPoolExecutor | None = None
        self._stop = threading.Event()
        self._firm = False
        self._over = threading.Event()
        self._over.set()
        self._looks = 0
        self._calls: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._draining = threading.RLock()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def busy(self) -> bool:
        """Whether a step is under way, its `then` included."""
        return not self._over.is_set()

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop of this thread; None: no front end, so nobody clicks."""
        try:
            return asyncio.get_running_loop()
        except RuntimeError:
            return None

    def start(self, work: Callable[[Tick], Any], then: Callable[[Future[Any]], object]) -> None:
        """Run `work(tick)` in a thread, and `then(future)` when it is done, failed or stopped.

        Raises:
            RuntimeError: while another step is under way.
        """
        if self.busy:
            raise RuntimeError("Another step is under way; wait for it, or stop it.")
        self._stop.clear()
        self._firm = False
        self._over.clear()
        self._loop = self.loop  # None: `wait` does what a loop would
        self._on_busy(True)
        self._second()
        future = self._threads().submit(self._run, work)
        future.add_done_callback(lambda done: self.post(lambda: self._finish(done, then)))

    def look(self, work: Callable[[], Any], then: Callable[[Any], object]) -> None:
        """Have a short look at the model beside the steps, behind the one that runs: `then` gets
        what `work()` returns, unless a newer look was asked for meanwhile. Errors of this package
        say nothing. The next cell of a notebook waits for it: nobody asked for the look, and two
        threads that run one model take each other's activations."""
        self._looks += 1
        number, self._loop = self._looks, self._loop or self.loop

        def looked() -> None:
            if number == self._looks:
                try:
                    found = work()
                except ValueError:
                    return
                self.post(lambda: then(found) if number == self._looks else None)

        self._before_next_cell(self._threads().submit(looked))

    def _before_next_cell(self, look: Future[None]) -> None:
        """Where cells are run, the next one begins when `look` is over (or a step is under way,
        which may take minutes, and which somebody began)."""
        ipython = sys.modules.get("IPython")
        shell = None if ipython is None else ipython.get_ipython()
        if shell is None:
            return

        def wait(*_: Any) -> None:
            shell.events.unregister("pre_run_cell", wait)
            if not self.busy:
                look.result()

        shell.events.register("pre_run_cell", wait)

    def stop(self) -> None:
        """Ask the step to stop; it does at its next report or forward pass."""
        self._stop.set()

    def firm(self) -> None:
        """From here on the step is not stopped any more, because it has changed the model. Called
        by the step itself."""
        self._firm = True

    def post(self, call: Callable[[], object]) -> None:
        """Have `call` made where the step was started. From any thread."""
        self._calls.put(call)
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._drain)

    def there(self, call: Callable[[], Any]) -> Any:
        """Have `call` made where the step was started, and wait for what it returns. From the
        step's own thread: work for the loop that is done piece by piece leaves it free between
        the pieces. Raises what `call` raises, and `Stopped` where the loop is gone."""
        made: Future[Any] = Future()

        def answer() -> None:
            try:
                made.set_result(call())
            except BaseException as error:  # noqa: BLE001 (it is raised in the step)
                made.set_exception(error)

        self.post(answer)
        while not wait([made], timeout=1).done:
            if self._loop is not None and self._loop.is_closed():
                raise Stopped("The kernel is closing.")
        return made.result()

    def wait(self) -> None:
        """Block until the step and its `then` are over; for code, where nobody clicks."""
        while not self._over.wait(0.02):
            self._drain()
        self._threads().submit(int).result()  # a look may be under way
        self._drain()

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pmet_lens")
        return self._pool

    def _second(self) -> None:
        if self.busy and self._loop is not None and not self._loop.is_closed():
            self._on_second()
            self._loop.call_later(1.0, self._second)

    def _run(self, work: Callable[[Tick], Any]) -> Any:
        told: tuple[str, float] = ("", 0.0)
        began: dict[str, float] = {}

        def tick(done: int, total: int, what: str) -> None:
            nonlocal told
            self._check()
            now = time.monotonic()
            if what != told[0] or now - told[1] > _OFTEN or done == total:
                told = (what, now)
                self.post(lambda: self._on_progress(done, total, what))

        def line(done: int, total: int, what: str) -> None:
            self._check()
            if time.monotonic() - began.setdefault(what, time.monotonic()) > _BRIEF:
                tick(done, total, what)

        with _forwards_check(self._check), heard(line):
            return work(tick)

    def _check(self) -> None:
        if self._stop.is_set() and not self._firm:
            raise Stopped("Stopped; the model is as it was.")

    def _finish(self, done: Future[Any], then: Callable[[Future[Any]], object]) -> None:
        try:
            then(done)
        finally:
            self._over.set()
            self._on_busy(False)

    def _drain(self) -> None:
        with self._draining:
            while True:
                try:
                    call = self._calls.get_nowait()
                except Empty:
                    return
                call()


@contextmanager
def _forwards_check(check: Callable[[], None]) -> Iterator[None]:
    """Every forward pass of any module on this thread begins with `check`."""
    starter = threading.get_ident()

    def hook(*_: Any) -> None:
        if threading.get_ident() == starter:
            check()

    handle = module.register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
