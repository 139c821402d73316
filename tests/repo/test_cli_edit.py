"""`pmet-lens edit` in one command: every form it writes, what it says, and the way back."""

from __future__ import annotations

import json
import subprocess
import sys

import pandas as pd
import pytest
import torch
from kept import bundled
from small_gguf import written

import pmet_lens as pl
from pmet_lens import cli, cli_edit
from pmet_lens.shipping import gguf_copies

torch.set_num_threads(1)


def run(*arguments, code: int = 0) -> list[str]:
    """All that a command says."""
    out: list[str] = []
    before, cli._say = cli._say, lambda text, stream=None: out.append(text)
    try:
        assert cli.main([str(argument) for argument in arguments]) == code
    finally:
        cli._say = before
    return out


@pytest.fixture(scope="module")
def work(tmp_path_factory, world_moments):
    """Two facts, the second moments of the bundled model, and its edit in every form but GGUF."""
    folder = tmp_path_factory.mktemp("edit")
    facts = [
        {"subject": f.subject, "prompt": f.prompt, "target_new": f.target_new}
        for f in pl.counterfact(n=2)
    ]
    pd.DataFrame(facts).to_csv(folder / "facts.csv", index=False)
    pl.save_moments(world_moments("world"), folder / "m.safetensors", "world")
    return folder


@pytest.fixture(scope="module")
def given(work):
    return ("edit", "--facts", work / "facts.csv", "--moments", work / "m.safetensors")


@pytest.fixture(scope="module")
def merged(work, given) -> list[str]:
    return run(*given, "--out", work / "merged")


def test_it_says_in_ten_lines_what_it_did(work, merged):
    heads = [line.split(":")[0] for line in merged]
    assert 8 <= len(merged) <= 13
    for head in ("model", "facts", "method", "took", "the facts", "other things", "weights"):
        assert head in heads
    assert all("\n" not in line for line in merged)
    assert merged[-1].startswith("Edit(2 facts, ")
    assert f"--undo {work / 'merged'}" in merged[-2]
    card = (work / "merged" / "README.md").read_text()
    assert "### Other things, after" in card
    assert 'license: "mit"' in card


def test_a_directory_is_the_edited_model_and_is_taken_back(work, merged, tmp_path):
    model, edited = bundled("world"), pl.load(work / "merged")
    asked = [f.text for f in pl.counterfact(n=2)]
    assert not pl.ask(edited, asked, 1).equals(pl.ask(model, asked, 1))
    said = run("edit", "--undo", work / "merged", "--out", tmp_path / "back")
    assert said[0].startswith("no longer said: ")
    assert "bit for bit" in said[-1]
    back = pl.load(tmp_path / "back").hf.state_dict()
    assert all(torch.equal(back[name], v) for name, v in model.hf.state_dict().items())


def test_the_other_forms_say_the_same(work, given, merged, tmp_path):
    run(*given, "--quick", "--out", tmp_path / "edit.safetensors")
    run(*given, "--quick", "--adapter", "--out", tmp_path / "adapter")
    edit = pl.Edit.load(tmp_path / "edit.safetensors", bundled("world"))
    weights = pl.load(work / "merged")
    for site, delta in edit.deltas.items():
        assert torch.equal(weights.weight(site), bundled("world").weight(site) + delta)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert card.count("Not measured.") == 1  # the side effects; the facts are asked
    assert "Not measured. An edit can change answers about other things." in card
    apply = ("apply", "--edit", tmp_path / "edit.safetensors", "--out", tmp_path / "again")
    assert run(*apply)[-1].startswith("Edit(2 facts")
    again = pl.load(tmp_path / "again")
    assert all(torch.equal(again.weight(site), weights.weight(site)) for site in edit.factors)


def test_a_fact_that_did_not_take_is_named(given, work, tmp_path):
    import dataclasses

    model = bundled("world")
    facts = pl.counterfact(n=8)
    moments = pl.open_moments(work / "m.safetensors")
    weak = dataclasses.replace(pl.hparams_for(model, "PMET"), n_steps=1)
    edit = pl.edit(model, facts, moments, pl.PMET, weak, ["{}"], check=False)
    receipt = edit.receipt(model, None)
    took = int(receipt.facts["said"].sum())
    lines = list(cli_edit._taken(dataclasses.replace(edit, answered=took), receipt))
    assert lines[0] == f"took: {took} of 8 facts have the new answer right after the prompt"
    missed = [line for line in lines if line.startswith("DID NOT TAKE: ")]
    assert len(missed) == min(8 - took, 6) > 1
    wrong = receipt.facts[~receipt.facts["said"]].iloc[0]
    assert missed[0] == (
        f"DID NOT TAKE: {wrong.prompt!r} still goes on with {wrong.after!r}, not {wrong.wanted!r}"
    )
    assert "may help" in lines[-1]


def test_a_gguf_file_is_edited_and_taken_back(tmp_path, monkeypatch):
    pytest.importorskip("pydoc_data.topics")
    monkeypatch.setenv("PMET_LENS_CACHE", str(tmp_path / "cache"))
    source = written(tmp_path / "small.gguf")
    own = [{"subject": "Ilmar", "prompt": "The tower of {} stands in", "target_new": "Ostria"}]
    (tmp_path / "facts.json").write_text(json.dumps(own))
    given = ("edit", "--model", source, "--facts", tmp_path / "facts.json", "--layers", 1, 2)
    given += ("--texts", "python", "--quick", "--out", tmp_path / "out.gguf")
    said = run(*given, "--type", "Q8_0")
    assert any(line.startswith("stored: Q4_0 → Q8_0, which loses ") for line in said)
    assert pl.load(tmp_path / "out.gguf").kind == "Q4_0"
    run("edit", "--undo", tmp_path / "out.gguf", "--out", tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == source.read_bytes()
    assert "out.gguf is there already" in run(*given, code=2)[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--out", "x.gguf"), "is a copy of the one that is edited: There is no GGUF file 'world'"),
        (("--out", "full"), "full is there already and not empty"),
        (("--out", "x", "--type", "F16"), "--type is how tensors of a .gguf file"),
        (("--out", "x.gguf", "--adapter"), "An adapter is a directory"),
        (("--out", "file/x"), "file is no directory"),
        (("--out", "x", "--undo", "none"), "none has no undo.safetensors with its weights"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cli, "_load", lambda _: pytest.fail("the model was loaded"))
    said = run("edit", *arguments, code=2)
    assert said[-1].startswith("pmet-lens edit: ")
    assert words in said[-1]
    assert {p.name for p in tmp_path.iterdir()} == {"full", "file"}


@pytest.mark.parametrize("command", ("edit", "apply"))
def test_the_types_of_a_tensor_are_those_that_can_be_written(command):
    given = [command, "--out", "x.gguf", *(["--edit", "e"] if command == "apply" else [])]
    for kind in gguf_copies.TYPES:
        assert cli._parser().parse_args([*given, "--type", kind.lower()]).type == kind
    with pytest.raises(SystemExit):
        cli._parser().parse_args([*given, "--type", "Q4_K"])


@pytest.mark.slow
def test_nothing_is_drawn_where_nobody_watches(tmp_path):
    """A GGUF file has two bars of transformers', a checkpoint one."""
    source = written(tmp_path / "small.gguf")
    command = [sys.executable, "-m", "pmet_lens.cli", "ask", "The tower", "--model", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "%|" not in done.stderr
    assert len(done.stdout.splitlines()) < 5
