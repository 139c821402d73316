"""A step runs beside its caller, reports, fails in words, and stops where it is asked to."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace

import IPython
import pytest
import torch
from IPython.core.events import EventManager, pre_run_cell

from pmet_lens.data import progress
from pmet_lens.explorer.jobs import Pace, Runner, Stopped, duration


def test_a_step_runs_elsewhere_and_its_end_is_told_here():
    told, busy = [], []
    runner = Runner(lambda *report: told.append((report, threading.get_ident())), busy.append)

    def work(tick):
        tick(1, 2, "half")
        return threading.get_ident()

    runner.start(work, lambda future: told.append((future.result(), threading.get_ident())))
    assert runner.busy
    runner.wait()
    assert not runner.busy
    assert busy == [True, False]
    (report, first), (worker, last) = told
    assert report == (1, 2, "half")
    assert first == last == threading.get_ident() != worker


def test_two_steps_at_once_are_refused():
    runner, go = Runner(), threading.Event()
    runner.start(lambda tick: go.wait(10), lambda future: future.result())
    with pytest.raises(RuntimeError, match="under way"):
        runner.start(lambda tick: None, lambda future: None)
    go.set()
    runner.wait()
    runner.start(lambda tick: None, lambda future: future.result())
    runner.wait()


def test_a_failure_is_handed_on():
    runner, seen = Runner(), []
    runner.start(lambda tick: 1 / 0, lambda future: seen.append(future.exception()))
    runner.wait()
    assert isinstance(seen[0], ZeroDivisionError)


def test_a_step_stops_at_its_next_report_and_the_next_one_runs():
    runner, seen, started = Runner(), [], threading.Event()

    def work(tick):
        while True:
            started.set()
            tick(0, 0, "on and on")

    runner.start(work, lambda future: seen.append(future.exception()))
    assert started.wait(10)
    runner.stop()
    runner.wait()
    assert isinstance(seen[0], Stopped)
    runner.start(lambda tick: tick(1, 1, "again"), lambda future: seen.append(future.exception()))
    runner.wait()
    assert seen[1] is None


def test_a_step_without_reports_stops_at_its_next_forward_pass():
    runner, seen, started = Runner(), [], threading.Event()
    module, x = torch.nn.Linear(2, 2), torch.zeros(1, 2)

    def work(tick):
        while True:
            module(x)
            started.set()

    runner.start(work, lambda future: seen.append(future.exception()))
    assert started.wait(10)
    runner.stop()
    module(x)  # only the step's own passes are stopped
    runner.wait()
    assert isinstance(seen[0], Stopped)
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_in_an_event_loop_nobody_has_to_wait():
    async def main():
        over = asyncio.Event()
        runner = Runner()
        runner.start(lambda tick: threading.get_ident(), lambda future: over.set())
        await asyncio.wait_for(over.wait(), 10)
        return runner

    asyncio.run(main()).wait()


def test_what_a_step_has_done_there_leaves_room_between_two_parts():
    told = []

    async def main():
        over, runner = asyncio.Event(), Runner()

        def part(name):
            told.append((name, threading.get_ident()))
            asyncio.get_running_loop().call_soon(told.append, f"a click after {name}")
            return name.upper()

        def work(tick):
            return [runner.there(lambda n=n: part(n)) for n in ("first", "second")]

        runner.start(work, lambda future: (told.append(future.result()), over.set()))
        await asyncio.wait_for(over.wait(), 10)

    asyncio.run(main())
    here = threading.get_ident()
    assert told == [
        ("first", here),
        "a click after first",
        ("second", here),
        "a click after second",
        ["FIRST", "SECOND"],
    ]


def test_what_is_done_there_hands_on_its_error_and_needs_no_loop():
    runner, seen = Runner(), []

    def work(tick):
        return runner.there(lambda: {}["missing"])

    runner.start(work, lambda future: seen.append(future.exception()))
    runner.wait()
    assert isinstance(seen[0], KeyError)


def test_a_step_ends_when_the_loop_it_has_something_done_in_is_closed():
    begun, closed, seen = threading.Event(), threading.Event(), []
    runner = Runner()

    def work(tick):
        begun.set()
        closed.wait(10)
        try:
            runner.there(lambda: None)
        except Stopped as error:
            seen.append(error)

    async def main():
        runner.start(work, lambda future: None)
        begun.wait(10)

    asyncio.run(main())
    closed.set()
    runner._threads().shutdown(wait=True)
    assert isinstance(seen[0], Stopped)


def test_what_is_left_follows_from_how_it_went():
    pace = Pace()
    pace.begin("Edit", 0.0)
    assert pace.left(0, 0, "", 0.2) == ""
    assert pace.left(0, 0, "", 3.0) == "3 s so far"
    pace.left(0, 100, "reading", 10.0)
    assert pace.left(20, 100, "reading", 20.0) == "about 40 s left"
    pace.left(5, 10, "optimising", 30.0)  # begun somewhere: only what was seen counts
    assert pace.left(6, 10, "optimising", 32.0) == "about 8 s left"
    assert pace.end(200.0) == 200.0
    pace.begin("Edit", 300.0)
    assert pace.left(0, 0, "", 302.0) == "2 s so far, 3 min 20 s the last time"
    pace.begin("Ask", 400.0)
    assert pace.left(0, 0, "", 401.0) == "1 s so far"


def test_durations_are_words():
    words = [duration(seconds) for seconds in (0.2, 59.6, 200, 7500)]
    assert words == ["1 s", "1 min 0 s", "3 min 20 s", "2 h 5 min"]


def test_progress_lines_of_the_package_are_told_and_can_be_stopped(monkeypatch):
    monkeypatch.setattr("pmet_lens.explorer.jobs._BRIEF", -1.0)
    told, seen = [], []
    runner = Runner(lambda *report: told.append(report))

    def work(tick):
        with progress.line("reading", "token") as tell:
            tell(1, 3)
            runner.stop()
            tell(2, 3)

    runner.start(work, lambda future: seen.append(future.exception()))
    runner.wait()
    assert told == [(1, 3, "reading (tokens)")]
    assert isinstance(seen[0], Stopped)


def test_a_look_waits_for_the_step_and_only_the_newest_is_told():
    runner, go, order = Runner(), threading.Event(), []
    runner.start(lambda tick: go.wait(10), lambda future: order.append("step"))
    runner.look(lambda: order.append("never"), order.append)
    runner.look(lambda: "newest", order.append)
    assert order == []
    go.set()
    runner.wait()
    assert order == ["step", "newest"]


def test_the_next_cell_waits_for_a_look_and_not_for_a_step(monkeypatch):
    """Two threads that run one model take each other's activations."""
    events = EventManager(None, {"pre_run_cell": pre_run_cell})
    shell = SimpleNamespace(events=events)
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    runner, seen, go = Runner(), [], threading.Event()

    def slow():
        time.sleep(0.05)
        seen.append("look")

    runner.look(slow, lambda found: None)
    events.trigger("pre_run_cell", None)
    seen.append("cell")
    assert seen == ["look", "cell"]
    events.trigger("pre_run_cell", None)  # nobody waits any more
    runner.start(lambda tick: go.wait(10), lambda future: future.result())
    runner.look(slow, lambda found: None)
    events.trigger("pre_run_cell", None)
    assert seen == ["look", "cell"]
    go.set()
    runner.wait()
    assert seen == ["look", "cell", "look"]


def test_what_changed_the_model_is_not_stopped_any_more():
    runner, seen = Runner(), []

    def late(tick):
        runner.firm()
        runner.stop()
        tick(1, 1, "on it")
        return "done"

    runner.start(late, lambda future: seen.append(future.result()))
    runner.wait()
    runner.start(
        lambda tick: runner.stop() or tick(1, 1, "x"), lambda f: seen.append(f.exception())
    )
    runner.wait()
    assert seen[0] == "done"
    assert isinstance(seen[1], Stopped)  # the next step can be stopped again
