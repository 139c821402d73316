"""The progress line of work that takes longer than two seconds, in a terminal or a notebook.

Who passes a callback of his own (`on_tokens=…`) shows the progress himself: then there is no line.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

Tell = Callable[[int, int], object]
"""Called with (done, all); all is 0 where nobody knows."""
OnStep = Callable[[int, Mapping[str, Any]], object]
"""Called with the number of a step and the losses of the facts that took it."""
Hear = Callable[[int, int, str], object]
"""Called with (done, all, what); all is 0 where nobody knows."""
P = ParamSpec("P")
R = TypeVar("R")

AFTER = 2.0
"""Seconds after which a line appears."""
_SILENT: ContextVar[bool] = ContextVar("silent", default=False)
_HEARD: ContextVar[Hear | None] = ContextVar("heard", default=None)


@contextmanager
def silent() -> Iterator[None]:
    """A block without lines, on this thread: something else shows what is done."""
    before = _SILENT.set(True)
    try:
        yield
    finally:
        _SILENT.reset(before)


@contextmanager
def heard(by: Hear) -> Iterator[None]:
    """A block whose lines, on this thread, are told to `by` and not drawn, from the first call on:
    for what shows progress itself."""
    before = _HEARD.set(by)
    try:
        with silent():
            yield
    finally:
        _HEARD.reset(before)


@contextmanager
def line(what: str, unit: str) -> Iterator[Tell]:
    """A block with a line that says `what` is done, how much of it, and how long it will take;
    gone afterwards. Yields the function that moves it. Where nobody watches (a pipe, or
    `$TQDM_DISABLE` is set) there is none."""
    from tqdm.auto import tqdm

    start, bars = time.time(), list[Any]()

    def tell(done: int, total: int) -> None:
        if (by := _HEARD.get()) is not None:
            by(done, total, f"{what} ({'bytes' if unit == 'B' else f'{unit}s'})")
            return
        if not bars:  # made now, because a notebook's bar keeps the total it begins with
            off = True if _SILENT.get() or os.environ.get("TQDM_DISABLE") else None
            how = {"desc": what, "unit": unit, "total": total or None, "disable": off}
            how |= {"unit_scale": unit == "B", "smoothing": 0.1}
            bars.append(tqdm(**how, delay=AFTER, leave=False, dynamic_ncols=True))
            bars[0].start_t = bars[0].last_print_t = start
        bars[0].total = total or None
        bars[0].update(done - bars[0].n)

    try:
        yield tell
    finally:
        for bar in bars:
            bar.close()


@contextmanager
def steps(what: str, n_facts: int, n_steps: int, on_step: OnStep | None) -> Iterator[OnStep]:
    """A block with `on_step`, or with the line of an optimisation of at most `n_steps` steps per
    fact, which runs in batches and leaves out facts that have stopped."""
    if on_step is not None:
        yield on_step
        return
    done = left = at = 0

    def took(step: int, losses: Mapping[str, Any]) -> None:
        nonlocal done, left, at
        now = len(losses["loss"])
        # Steps that nobody takes any more: of a batch that is over, or of facts that have stopped.
        done += now + (left * (n_steps - at) if step == 0 else (left - now) * (n_steps - step))
        left, at = now, step + 1
        tell(done, n_facts * n_steps)

    with line(what, "step") as tell:
        yield took


def shown(what: str, unit: str, callback: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function that gets the `line` as its keyword argument `callback` where it is given none."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if kwargs.get(callback) is not None:
                return function(*args, **kwargs)
            with line(what, unit) as tell:
                with_it: Any = functools.partial(function, **{callback: tell})
                return with_it(*args, **{k: v for k, v in kwargs.items() if k != callback})

        return run

    return decorate
