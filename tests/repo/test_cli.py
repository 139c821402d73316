"""The commands as somebody types them: what they write, say and return."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from grids import FACTS, saved_model, tiny_run
from kept import bundled

import pmet_lens as pl
from pmet_lens import cli
from pmet_lens.data import datasets

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with facts, moments and an edit of two facts, all made by the commands."""
    folder = tmp_path_factory.mktemp("cli")
    facts = [
        {"subject": f.subject, "prompt": f.prompt, "target_new": f.target_new}
        for f in pl.counterfact(n=2)
    ]
    pd.DataFrame(facts).to_csv(folder / "facts.csv", index=False)
    said = run("moments", "--layers", 1, 2, 3, "--tokens", 4000, "--out", folder / "m.safetensors")
    assert said.startswith("6 second moments over 4000 tokens")
    run(
        "edit", "--facts", folder / "facts.csv", "--moments", folder / "m.safetensors",
        "--out", folder / "edit.safetensors",
    )  # fmt: skip
    return folder


def run(*arguments, code: int = 0) -> str:
    """What a command says last, and that it ends with `code`."""
    own = [str(argument) for argument in arguments]
    out: list[str] = []
    before, cli._say = cli._say, lambda text, stream=None: out.append(text)
    try:
        assert cli.main(own) == code
    finally:
        cli._say = before
    return out[-1]


def test_help_comes_at_once():
    """Before torch or pandas are imported: that takes seconds."""
    command = "import sys; from pmet_lens import cli\ntry: cli.main(['edit', '--help'])\n"
    command += "except SystemExit: pass\nprint(sorted(sys.modules.keys() & {'torch', 'pandas'}))"
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True
    )
    assert "--facts" in done.stdout
    assert done.stdout.strip().endswith("[]")


def test_an_edit_is_written_and_takes(work):
    model = bundled("world")
    edit = pl.Edit.load(work / "edit.safetensors", model)
    assert [f.target_new for f in edit.facts] == [f.target_new for f in pl.counterfact(n=2)]
    table = edit.receipt(model).facts
    assert (table["nll after"] < table["nll before"] - 1).all()


def test_evaluate_with_and_without(work):
    plain = run("evaluate", "--facts", work / "facts.csv")
    with_edit = run(
        "evaluate", "--facts", work / "facts.csv", "--edit", work / "edit.safetensors",
        "--out", work / "rows.csv",
    )  # fmt: skip
    assert plain != with_edit
    assert len(pd.read_csv(work / "rows.csv")) == 2


def test_apply_writes_a_model_and_an_adapter(work):
    run("apply", "--edit", work / "edit.safetensors", "--out", work / "merged")
    model = bundled("world")
    edit = pl.Edit.load(work / "edit.safetensors", model)
    merged = pl.load(work / "merged")
    for site, delta in edit.deltas.items():
        assert torch.equal(merged.weight(site), model.weight(site) + delta)
    asked = pl.counterfact(n=1)[0].text
    assert not pl.ask(merged, asked, 3).equals(pl.ask(model, asked, 3))
    with edit.applied(model):
        pd.testing.assert_frame_equal(pl.ask(merged, asked, 3), pl.ask(model, asked, 3), rtol=1e-4)
    run("apply", "--edit", work / "edit.safetensors", "--out", work / "adapter", "--adapter")
    assert (work / "adapter" / "adapter_model.safetensors").is_file()
    said = run("apply", "--edit", work / "edit.safetensors", "--out", work / "merged", code=2)
    assert "is there already" in said


def test_another_base_is_refused(work):
    arguments = ("apply", "--model", "world-unmasked", "--edit", work / "edit.safetensors")
    said = run(*arguments, "--out", work / "other", code=2)
    assert said.startswith("pmet-lens apply: This edit was computed on 'world'")
    assert not (work / "other").exists()
    run(*arguments, "--out", work / "other", "--any-base")


def test_facts_of_every_kind(tmp_path):
    world = datasets.world.build()
    own = [{"subject": "x", "prompt": "{} is", "target_new": "y"}]
    for name, records in (
        ("counterfact", world.counterfact()[:3]),
        ("zsre", world.zsre()[:3]),
        ("own", own),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    kinds = [
        cli._facts(str(tmp_path / f"{n}.json"), 2, None) for n in ("counterfact", "zsre", "own")
    ]
    assert [len(facts) for facts in kinds] == [2, 2, 1]
    assert [facts[0].benchmark for facts in kinds] == [None, "zsre", None]
    assert len(cli._facts(None, 4, bundled("world"))) == 4


@pytest.mark.slow
def test_a_model_without_settings_is_edited_with_suggested_ones(work, tmp_path):
    bundled = Path(pl.__file__).parent / "bundled" / "world"
    plain = tmp_path / "somebody's"
    plain.mkdir()
    for file in bundled.iterdir():
        if file.name != "manifest.json":
            (plain / file.name).write_bytes(file.read_bytes())
    known = tmp_path / "known.json"
    known.write_text(json.dumps(datasets.world.build().counterfact()[20:40]), encoding="utf-8")
    edit = ("edit", "--model", plain, "--facts", work / "facts.csv")
    out = ("--out", tmp_path / "e.safetensors")
    assert "There are no PMET settings" in run(*edit, *out, "--dtype", "float32", code=2)
    (tmp_path / "text.txt").write_text("\n".join(itertools.islice(pl.texts(), 400)), "utf-8")
    text = ("--texts", tmp_path / "text.txt")
    said = run(*edit, *out, *text, "--suggest", known, "--dtype", "float32", "--device", "auto")
    assert re.match(r"Edit\(2 facts, \d of them answered, sites .*3\.mlp", said)


def test_an_interrupted_command_says_so(monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_load", stopped)
    assert run("ask", "x", code=130) == "pmet-lens ask: interrupted"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("edit", "--method", "PMTE"), "pmet-lens edit: "),
        (("ask", "x", "--template", "{}"), "has no chat template"),
        (("ask", "x", "--device", "nonsense"), "cannot be put on device"),
        (("edit", "--model", "./nowhere"), "there is no directory or .gguf file 'nowhere'"),
        (("edit", "--facts", "none.csv"), "none.csv cannot be read"),
        (("evaluate", "--edit", "none.safetensors"), "none.safetensors cannot be read as an edit"),
        (("moments", "--texts", "none.txt"), "none.txt cannot be read"),
    ],
)
def test_what_is_wrong_is_said_and_ends_with_two(arguments, words, tmp_path):
    out = () if arguments[0] in ("evaluate", "ask") else ("--out", tmp_path / "out")
    assert words in run(*arguments, *out, code=2)


def test_models_are_listed(tmp_path, monkeypatch):
    monkeypatch.setenv("PMET_LENS_CACHE", str(tmp_path))
    said = run("models")
    for words in ("world-sequential +GPT2LMHeadModel", "smollm2-135m .*98.4 +Apache-2.0 +no"):
        assert re.search(words, said)
    assert "Gemma Terms of Use" in run("models", "--fetch", "gemma-3-270m", code=2)
    assert run("models", "--fetch", "world").startswith("Model('world': GPTJForCausalLM, ")


def test_ask():
    fact = pl.counterfact(n=1)[0]
    assert run("ask", fact.text, "--tokens", 12).startswith(fact.text)


def test_a_grid_runs_in_shards(tmp_path):
    path = saved_model(tmp_path / "model")
    runs = [tiny_run(path, facts=FACTS[:2], seed=seed) for seed in (0, 1)]
    pl.save_grid(runs, tmp_path / "grid.json")
    for k in (1, 2):
        said = run(
            "run", tmp_path / "grid.json", "--folder", tmp_path / "runs", "--shard", f"{k}/2"
        )
        assert said.startswith("1 runs: ")
    out = tmp_path / "table.csv"
    said = run("run", tmp_path / "grid.json", "--folder", tmp_path / "runs", "--out", out)
    assert said.startswith("2 runs: ")
    assert set(pd.read_csv(out)["digest"]) == {one.digest for one in runs}
    said = run("run", tmp_path / "grid.json", "--plan")
    assert "2 runs, 1 worker: about" in said
    said = run("run", tmp_path / "grid.json", "--shard", "3/2", code=2)
    assert "no shard '3/2'" in said
    said = run("run", tmp_path / "none.json", code=2)
    assert "cannot be read as a grid" in said
