"""One long step at a time in a thread, with progress and a way to stop it.

The step runs beside the kernel, so buttons work meanwhile; whatever it has to say is handed to the
thread that started it. Stopping raises `Stopped` inside the step, at its next report or the next
forward pass, and the package restores the model as on any other error.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any

from torch.nn.modules import module

from pmet_lens.data.progress import silent

Tick = Callable[[int, int, str], None]
"""`tick(done, all, what)`: reports progress (all 0: not known), and raises `Stopped` when asked."""


class Stopped(Exception):
    """The step was stopped; the model is as it was before."""


class Runner:
    """Runs one step at a time.

    `on_progress(done, all, what)` and `on_busy(whether)` are called as `then` is: in the event loop
    of the thread that started the step, or inside `wait` where there is none.
    """

    def __init__(
        self,
        on_progress: Callable[[int, int, str], object] = lambda done, total, what: None,
        on_busy: Callable[[bool], object] = lambda busy: None,
    ) -> None:
        self._on_progress, self._on_busy = on_progress, on_busy
        self._pool: ThreadPoolExecutor | None = None
        self._stop = threading.Event()
        self._over = threading.Event()
        self._over.set()
        self._calls: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._draining = threading.RLock()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def busy(self) -> bool:
        """Whether a step is under way, its `then` included."""
        return not self._over.is_set()

    def start(self, work: Callable[[Tick], Any], then: Callable[[Future[Any]], object]) -> None:
        """Run `work(tick)` in a thread, and `then(future)` when it is done, failed or stopped.

        Raises:
            RuntimeError: while another step is under way.
        """
        if self.busy:
            raise RuntimeError("Another step is under way; wait for it, or stop it.")
        self._stop.clear()
        self._over.clear()
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:  # no front end: `wait` does what a loop would
            self._loop = None
        self._on_busy(True)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pmet_lens")
        future = self._pool.submit(self._run, work)
        future.add_done_callback(lambda done: self.post(lambda: self._finish(done, then)))

    def stop(self) -> None:
        """Ask the step to stop; it does at its next report or forward pass."""
        self._stop.set()

    def post(self, call: Callable[[], object]) -> None:
        """Have `call` made where the step was started. From any thread."""
        self._calls.put(call)
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._drain)

    def wait(self) -> None:
        """Block until the step and its `then` are over; for code, where nobody clicks."""
        while not self._over.wait(0.02):
            self._drain()
        self._drain()

    def _run(self, work: Callable[[Tick], Any]) -> Any:
        def tick(done: int, total: int, what: str) -> None:
            self._check()
            self.post(lambda: self._on_progress(done, total, what))

        with _forwards_check(self._check), silent():
            return work(tick)

    def _check(self) -> None:
        if self._stop.is_set():
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
