"""A step runs beside its caller, reports, fails in words, and stops where it is asked to."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from pmet_lens.explorer.jobs import Runner, Stopped


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
