"""Long work says what it does and how long it will take, where somebody watches; and only then."""

from __future__ import annotations

import io
import time
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import FACTS, HP, some_moments
from tiny import tiny_model

import pmet_lens as pl
from pmet_lens.data import progress

torch.set_num_threads(1)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def watched(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Somebody watches, and the work began ten seconds ago."""
    screen = Terminal()  # no fixture: pytest puts its own stream back before the test begins
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(progress, "time", SimpleNamespace(time=lambda: time.time() - 10))
    return screen


def test_a_line_says_what_how_much_and_how_long(monkeypatch):
    terminal = watched(monkeypatch)
    with progress.line("second moments", "token") as tell:
        tell(250, 1000)
        said = terminal.getvalue()
    assert "second moments:  25%" in said
    assert "250/1000 [00:10<00:30" in said  # ten seconds for a quarter
    assert "token/s" in said
    assert not terminal.getvalue().rpartition("\r")[2].strip()  # and is gone


def test_there_is_no_line_before_two_seconds(monkeypatch):
    terminal = watched(monkeypatch)
    monkeypatch.setattr(progress, "time", time)  # it has just begun
    with progress.line("second moments", "token") as tell:
        tell(250, 1000)
    assert terminal.getvalue() == ""


def test_there_is_no_line_where_something_else_shows_it_or_nobody_watches(monkeypatch):
    terminal, told = watched(monkeypatch), []

    @progress.shown("work", "step", "on_step")
    def work(*, on_step: Any = None) -> None:
        on_step(1, 4)

    with progress.silent():
        work()
    work(on_step=lambda *now: told.append(now))
    assert terminal.getvalue() == ""
    assert told == [(1, 4)]
    work()
    assert "work:  25%" in terminal.getvalue()
    terminal.truncate(terminal.seek(0))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    work()
    assert terminal.getvalue() == ""
    monkeypatch.delenv("TQDM_DISABLE")
    pipe = io.StringIO()
    monkeypatch.setattr("sys.stderr", pipe)
    work()
    assert pipe.getvalue() == ""


def test_steps_that_nobody_takes_any_more_count_as_done(monkeypatch):
    told = []

    @contextmanager
    def line(what, unit):
        yield lambda *now: told.append(now)

    monkeypatch.setattr(progress, "line", line)
    # Two batches of 3 and 2 facts, ten steps: some stop early, the first batch after its third.
    taken = [(0, 3), (1, 3), (2, 1), (0, 2), *((step, 1) for step in range(1, 10))]
    with progress.steps("targets", 5, 10, None) as on_step:
        for step, left in taken:
            on_step(step, {"loss": torch.zeros(left)})
    done = [n for n, _ in told]
    assert done[:4] == [3, 6, 2 * 10 + 3, 3 * 10 + 2]
    assert done == sorted(done)
    assert told[-1] == (50, 50)
    with progress.steps("targets", 5, 10, print) as on_step:
        assert on_step is print


def test_everything_long_has_a_line(monkeypatch):
    seen = set()

    @contextmanager
    def line(what, unit):
        def tell(done, total):
            seen.add(what)
            assert 0 < done <= (total or done), what

        yield tell

    monkeypatch.setattr(progress, "line", line)
    for module in ("interp.patching", "evaluation.ability", "moments.sampled_text"):
        monkeypatch.setattr(f"pmet_lens.{module}.line", line)
    model, one = tiny_model("llama", positions=96), FACTS[:2]
    moments = pl.second_moments(model, ["Kel is the capital of Ostria"], [1], n_tokens=20)
    pl.edit(model, FACTS, some_moments(model), "PMET", HP)
    pl.edit(model, one, None, pl.FT_W, pl.FineTuneHparams(layer=1, n_steps=2))
    pl.edit_sequentially(model, one, some_moments(model), "MEMIT", HP)
    pl.evaluate(model, one)
    pl.recall(model, one)
    pl.generate(model, "Kel", 8)
    next(pl.sampled_texts(model, length=8, batch_tokens=80))
    pl.probe(model, one)
    pl.causal_trace(model, one, layers=[1])
    pl.general_ability(model, texts=["Kel is"], prompts=["Kel is"], others=one)
    assert moments
    assert seen == {
        *("second moments", "targets", "fine-tuning", "edits", "evaluation", "scoring answers"),
        *("generation", "sampling text", "reading activations", "causal trace", "perplexity"),
        *("next tokens",),
    }
