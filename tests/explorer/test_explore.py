"""The explorer without a browser: what its buttons do, its exports, and what a stop leaves."""

from __future__ import annotations

import builtins
import io
import re
from dataclasses import replace

import pandas as pd
import pytest
import torch
from tiny import tiny_hf, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import pmet_lens as pl
from pmet_lens.explorer import recipes, variants, views, widgets
from pmet_lens.explorer import session as session_file
from pmet_lens.plotting.maps import attention_panels, lens_panels, loss_curve, trace_panels

N_TOKENS = 3000


@pytest.fixture
def weights(model):
    """The weights' bits before the test; behind it they must be the same."""
    before = {name: value.clone() for name, value in model.hf.state_dict().items()}
    yield before
    assert same(model, before)
    assert len(model.live_edits) == 0


def same(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.hf.state_dict().items())


def known(n):
    """The first facts of the world, each with two neighbours."""
    return [replace(fact, neighbours=fact.neighbours[:2]) for fact in pl.counterfact(n=n)]


def session(model, moments):
    return pl.Session(model, moments, n_tokens=N_TOKENS)


def test_an_edit_is_made_undone_and_made_again(model, moments, weights):
    own, (one, two) = session(model, moments), known(2)
    first, second = own.edit(one), own.edit(two, "MEMIT", {"lr": 0.4})
    assert second.hparams == replace(pl.hparams_for(model, pl.MEMIT), lr=0.4)
    assert second.upon == (first,)
    rows = first.table.set_index("kind")
    assert rows.loc["rewrite", "before"] == one.target_true
    assert rows.loc["rewrite", "after"] == one.target_new
    assert rows.loc["rewrite", "p_after"] > 0.5 > rows.loc["rewrite", "p_before"]
    own.undo(first)  # not the last one
    assert own.on() == [second]
    asked = own.ask(one.text, k=1).set_index("model")
    assert asked.loc["after", "continuation"] == one.target_true
    own.redo(first)
    asked = own.ask(one.text, k=1).set_index("model")
    assert asked.loc["after", "continuation"] == one.target_new
    assert asked.loc["before", "continuation"] == one.target_true
    own.undo(second)
    own.undo(first)


def test_the_model_says_the_true_answers_of_a_typed_fact(model, moments, weights):
    own, old = session(model, moments), known(1)[0]
    neighbours = [prompt for prompt, _ in old.neighbours[:2]]
    step = own.edit(old)
    fact = own.fact(old.subject, old.prompt, "blues", paraphrases=["{} is"], neighbours=neighbours)
    assert fact.target_true == old.target_true  # of the unedited model
    assert fact.paraphrases == (f"{old.subject} is",)
    assert fact.neighbours == old.neighbours[:2]
    own.undo(step)
    with pytest.raises(pl.FactError, match="exactly one"):
        own.fact("Paris", "the capital of", "Italy")


def test_the_unedited_model_is_asked_once(model, moments, monkeypatch):
    own, prompts = session(model, moments), [fact.text for fact in known(3)]
    first = own.unedited([prompts[0], prompts[0], prompts[1]])
    assert first[0] == first[1] == known(1)[0].target_true
    asked = []
    monkeypatch.setattr(
        session_file.generation, "answers", lambda _, new: (asked.extend(new), ["so"])[1]
    )
    assert own.unedited(prompts) == [first[0], first[2], "so"]
    assert asked == prompts[2:]


@pytest.mark.parametrize("at", [0, 3])
def test_what_is_raised_in_a_callback_leaves_the_model(model, moments, weights, at):
    class Enough(Exception):
        pass

    def on_step(step, losses):
        if step == at:
            raise Enough

    own = session(model, moments)
    with pytest.raises(Enough):
        own.edit(known(1)[0], on_step=on_step)
    assert own.steps == []


def test_second_moments_are_computed_once_and_only_where_missing(model, moments):
    seen = []
    sites = [pl.Site(1, "mlp"), pl.Site(2, "attn")]
    own = pl.Session(model, {sites[0]: moments[sites[0]]}, n_tokens=N_TOKENS)
    for _ in range(2):
        found = own.moments(sites, lambda done, total, what: seen.append((done, total, what)))
    assert found[sites[0]] is moments[sites[0]]
    assert torch.allclose(found[sites[1]].value, moments[sites[1]].value, atol=1e-6)
    assert max(done for done, *_ in seen) >= N_TOKENS
    assert len([done for done, *_ in seen if done >= N_TOKENS]) == 1


def test_a_model_nobody_knows_is_told_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setenv("PMET_LENS_CACHE", str(tmp_path))
    own = pl.Session(tiny_model("gpt2"))
    fact = pl.Fact("Mira Tolan", "{} plays the sport of", "tennis", "rugby")
    with pytest.raises(pl.SettingsError, match="hparams=Hparams"):
        own.edit(fact)
    own = pl.Session(tiny_model("gpt2"), hparams=pl.Hparams(layers=(1, 2), n_steps=2))
    assert own.edit(fact).hparams.n_steps == 2  # on text of its own
    assert len(list(tmp_path.rglob("text-*.json"))) == 1
    own = pl.Session(tiny_model("gpt2"), hparams=pl.Hparams(layers=(1, 2), n_steps=2))
    own.texts = [text for text, _ in zip(pl.texts(), range(60), strict=False)]
    assert own.edit(fact).hparams.n_steps == 2
    explorer = pl.explore(tiny_model("gpt2"))
    assert "hparams=" in explorer.edit._note.value
    assert explorer.edit.layers.disabled


def test_a_real_models_examples_are_what_it_knows():
    """Planted: a model that says French after everything."""
    facts = pl.real_facts()
    words = {w for f in facts for w in f"{f.text} {f.target_true} {f.target_new}".split()}
    names = {word: n for n, word in enumerate(["<end>", "<other>", *sorted(words)])}
    backend = Tokenizer(models.WordLevel(names, "<other>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<end>", unk_token="<other>"
    )
    hf = tiny_hf("gptj", vocab_size=len(names))
    hf.lm_head.bias.data[names["French"]] = 1e6
    model = pl.load(hf, tokenizer, name="frenchman")
    explorer = pl.explore(model)
    offered = [text for text, _ in explorer.fact.example.options]
    known = [f for f in facts if f.target_true == "French"]
    assert 1 < len(known) <= 40
    assert offered == ["your own", *(f"{f.text} → {f.target_new}" for f in known)]
    assert explorer.fact.subject.value == known[0].subject
    assert pl.explore(model, [facts[0]]).fact.subject.value == facts[0].subject
    copy = pl.load(pl.load("world").hf, pl.load("world").tokenizer, name="a copy")
    assert pl.explore(copy).fact.subject.value == pl.counterfact(n=1)[0].subject


@pytest.mark.slow
def test_the_exported_lines_make_the_same_tables(model, moments, weights, monkeypatch):
    fresh = pl.load("world")

    def computed(of, texts, layers, projections, n_tokens):
        assert (layers, projections, n_tokens) == ([1, 2, 3], ("mlp",), N_TOKENS)
        return moments

    monkeypatch.setattr(pl, "load", lambda name: {"world": fresh}[name])
    monkeypatch.setattr(pl, "second_moments", computed)
    own = pl.Session(model, n_tokens=N_TOKENS)
    own._moments.update(moments)  # as it would compute them
    one, two, three = known(3)
    first = own.edit(one)
    second = own.edit(two, "PMET", {"n_steps": 5})
    own.undo(first)
    third = own.edit(three, "FT-W")
    prompt = two.text
    asked = own.ask(prompt, k=3, n_tokens=4)
    looked = pl.lens_tokens(model, one, streams=("mlp_out",))
    for code, table in (
        (recipes.edit(own, second), second.table),  # made on the first, which is off now
        (recipes.edit(own, third), third.table),
        (recipes.ask(own, prompt, 3, 4), asked),
        (recipes.look(own, one, "lens_tokens", {"streams": ("mlp_out",)}), looked),
    ):
        names = {}
        exec(code, names)
        pd.testing.assert_frame_equal(names["table"], table, atol=1e-3)
        for edit in list(fresh.live_edits):
            edit.revert_(fresh)
    own.undo(second)
    own.undo(third)


def test_variants_are_the_ablations_where_these_have_a_name():
    both = (True, False)
    made = variants.variants(both, both, ("sqrt", "linear"), tuple(variants.SOLVERS))
    assert len(made) == 3 * 2 * 3  # W_O is not written without δ^a
    for name in ("PMET", "w/o δ^a", "+ W_O", "linear spread"):
        assert made[name] == pl.ABLATIONS[name]
    assert made["exact"].solver == pl.Exact()
    assert variants.variants((), both) == {}


def test_ablations_are_those_of_edit_and_leave_the_model(model, moments, weights):
    own, fact = session(model, moments), known(1)[0]
    earlier = own.edit(replace(fact, target_new="blues"))  # the same fact: the base is unedited
    methods = variants.variants(spread=("sqrt", "linear"))
    rows = pl.ablate(own, fact, methods)
    own.undo(earlier)
    made = pl.edit(model, [fact], moments, pl.PMET, contexts=own.contexts())
    pd.testing.assert_frame_equal(
        rows[rows["method"] == "PMET"].drop(columns=["method", "relative"]),
        own.answers(fact, made),
        atol=1e-4,
    )
    table = variants.compared(rows)
    assert list(table.index) == list(methods)
    assert table.loc["PMET", "answer"] == fact.target_new
    assert table["neighbours"].between(0, 100).all()
    code = recipes.ablate(own, fact, methods, own.settings(pl.PMET))
    assert "moments=moments" in code
    assert "pl.ABLATIONS['linear spread']" in code


def test_the_token_maps_agree_with_the_tables_of_many_facts(model):
    fact = known(1)[0]
    tokens = pl.lens_tokens(model, fact)
    table = pl.lens(model, [fact], positions=("last",))
    last = tokens[tokens["position"] == tokens["position"].max()]
    both = last.merge(table, on=["stream", "layer"])
    assert len(both) == len(table)
    assert (both["rank_x"] == both["rank_y"]).all()
    assert (both["probability_x"] - both["probability_y"]).abs().max() < 1e-5
    looks = pl.subject_attention(model, fact)
    of_last = looks[looks["position"] == looks["position"].max()]
    roles = pl.attention_patterns(model, [fact])
    weight = of_last.sort_values(["layer", "head"])["weight"].to_numpy()
    expected = (roles["in_subject"] + roles["last_subject"]).to_numpy()
    assert abs(weight - expected).max() < 1e-5
    traced = pl.trace_tokens(model, fact, layers=[2])
    places = pl.causal_trace(model, [fact], layers=[2]).set_index("place")["recovered"]
    own = traced.set_index("position")["recovered"]
    assert own[2] == pytest.approx(places["last subject token"], abs=1e-4)
    assert own[5] == pytest.approx(places["last"], abs=1e-4)
    with pytest.raises(pl.FactError, match="target_true"):
        pl.trace_tokens(model, pl.Fact("a", "{} b", "c"))


@pytest.mark.parametrize("position", [None, 2])
def test_panels_have_one_cell_per_row_and_layer(model, position):
    fact = known(1)[0]
    for table, panels in (
        (pl.lens_tokens(model, fact), lens_panels),
        (pl.trace_tokens(model, fact, samples=1), trace_panels),
        (pl.subject_attention(model, fact), attention_panels),
    ):
        out = panels(table, position)
        cells = out.groupby(["panel", "order", "layer"]).size()
        assert (cells == 1).all()
        assert set(out["layer"]) == set(range(model.n_layers))


def test_a_view_is_written_in_every_format_and_follows_the_theme(tmp_path):
    table = pd.DataFrame({"step": [0, 1], "loss": [2.0, 1.0]})
    view = views.View("v", 'a "title"', table, lambda f: loss_curve(table, f), "x = 1\n")
    names = {path.name: path for path in view.save(tmp_path / "new")}
    assert set(names) == {"v.png", "v.svg", "v.csv", "v.py"}
    assert names["v.png"].read_bytes().startswith(b"\x89PNG")
    assert b"currentColor" not in names["v.svg"].read_bytes()
    pd.testing.assert_frame_equal(pd.read_csv(io.BytesIO(names["v.csv"].read_bytes())), table)
    assert names["v.py"].read_text() == "x = 1\n"
    inline = view.inline()
    assert inline.startswith("<svg role=")
    assert "currentColor" in inline
    assert "&quot;title&quot;" in inline
    assert not re.search(r"fill: #(fff|000)", inline)  # neither paper nor ink of its own
    assert view.links().count("<a ") == 4


def controls(box):
    """All controls of a widget tree."""
    for child in getattr(box, "children", ()):
        yield child
        yield from controls(child)


def test_every_control_has_a_label_and_a_tooltip(model, moments):
    explorer = pl.explore(model, moments=moments)
    kinds = ("Text", "Textarea", "Dropdown", "Combobox", "Slider", "Checkbox", "Button")
    found = [c for c in controls(explorer.box) if type(c).__name__.endswith(kinds)]
    assert len(found) > 30
    assert [c for c in found if not c.description or not c.tooltip] == []
    assert not any("#000" in str(c.get_state()) or "black" in str(c.get_state()) for c in found)


def test_the_buttons_do_what_they_say(model, moments, weights):
    explorer = pl.explore(model, moments=moments)
    explorer.ask.run()
    explorer.wait()
    assert "jazz" in explorer.ask.pane._text.value
    explorer.edit.button.click()
    explorer.wait()
    (step, line, button), *_ = explorer.edit.history
    assert "dream pop</b>" in line.value
    assert button.description == "Undo"
    assert not button.disabled
    button.click()
    assert "jazz</b>" in line.value
    assert button.description == "Redo"
    explorer.ablate.button.click()
    explorer.wait()
    assert "linear spread" in explorer.ablate.pane._text.value
    explorer.look.kind.label = "Attention to the subject"
    explorer.look.button.click()
    explorer.wait()
    assert explorer.look.pane.view is not None
    assert explorer.look.pane.view.name == "look-weight"
    made = explorer.session.edit(step.fact)  # in code
    assert len(explorer.edit.history) == 2
    explorer.session.undo(made)


def test_mistakes_are_shown_in_words_and_nothing_is_left(model, moments, weights):
    explorer = pl.explore(model, moments=moments)
    explorer.fact.new.value = ""
    explorer.edit.button.click()
    explorer.wait()
    assert "Type the new answer" in explorer._status.value
    assert 'role="alert"' in explorer._status.value
    assert explorer.session.steps == []
    for box in explorer.ablate.spread.values():
        box.value = False
    explorer.ablate.button.click()
    assert "Tick at least one" in explorer._status.value
    assert not explorer.runner.busy


def test_stop_leaves_the_model_and_the_explorer_ready(model, moments, weights):
    explorer = pl.explore(model, moments=moments)
    original = explorer.edit._shell.session.edit

    def stopped_midway(fact, method, change, on_step, on_progress):
        def step(number, losses):
            if number == 2:
                explorer.runner.stop()
            on_step(number, losses)

        return original(fact, method, change, step, on_progress)

    explorer.session.edit = stopped_midway
    explorer.edit.button.click()
    explorer.wait()
    assert "stopped. The model is as it was." in explorer._status.value
    assert explorer.session.steps == []
    assert explorer._stop.disabled
    assert not explorer.edit.button.disabled
    pane = explorer.edit.pane
    assert pane._figure.value == ""  # no half a curve

    def click(edit):
        explorer.session.edit = edit
        explorer.edit.button.click()
        explorer.wait()
        return pane._figure.value, pane._text.value, pane._row.layout.display

    shown = click(original)
    assert shown[0]
    assert click(stopped_midway) == shown  # what was there comes back
    explorer.session.undo(explorer.session.steps[0])


def test_without_widgets_there_is_text(model, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "ipywidgets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert not widgets.available()
    explorer = pl.explore(model)
    monkeypatch.undo()
    assert explorer.box is None
    assert 'pip install "pmet-lens[notebook]"' in repr(explorer)
    assert set(explorer._repr_mimebundle_()) == {"text/plain", "text/html"}
    bundle = pl.explore(model)._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_old_widgets_are_none(model, monkeypatch):
    """Version 7, which some services have, shows tabs without titles."""
    import ipywidgets

    monkeypatch.setattr(ipywidgets, "__version__", "7.7.1")
    assert "ipywidgets 8" in repr(pl.explore(model))
    monkeypatch.setattr(ipywidgets, "__version__", "10.0.0")
    assert pl.explore(model).box is not None


def test_values_show_themselves_without_colours_of_their_own(model, moments, weights):
    fact = replace(known(1)[0], target_new="<b>blues</b>")
    edit = pl.edit(model, [fact], moments, contexts=[])
    summary = pl.summarise(pl.evaluate(model, [fact]))
    assert isinstance(summary, pd.DataFrame)
    for value, word in (
        (fact, "neighbours"),
        (edit, "1.mlp (rank 1)"),
        (edit.targets, "attn_out, mlp_out of layer 3"),
        (pl.PMET, "R/√n"),
        (summary, "harmonic mean"),
    ):
        html = value._repr_html_()
        assert word in html
        assert "<b>blues" not in html
        assert "color:" not in html
        assert html.count("<table") == html.count("</table>") == 1
