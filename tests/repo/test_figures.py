"""The committed tables are what the package computes, and the figures are drawn from them.

Numbers are compared, never pixels. What takes long (hundreds of edits) is not made again here: of
the main job and of `make paper` one point, with a second moment of less text.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import common
import free_answers
import make
import manifest
import matplotlib as mpl
import model_page
import model_tables
import numpy as np
import pandas as pd
import paper
import paper_tables
import pytest
import quotes
import redraw
import study
import torch
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from planted import plant
from tiny import tiny_model
from tqdm import tqdm

import pmet_lens as pl
from pmet_lens import plotting

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "figures"
RESULTS = FIGURES / "results"
INTERVAL = ("mean", "ci_low", "ci_high")


def committed(name: str, model: str) -> pd.DataFrame:
    return common.of(common.read(RESULTS, name), model=model)


def test_what_is_over_leaves_its_cores_to_the_rest(monkeypatch):
    """Outside a pool nothing is changed."""
    mine = torch.get_num_threads()
    monkeypatch.setattr(common, "_left", None)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    told = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    common.share_cores()
    assert told == []
    left = get_context("spawn").Value("i", 7)
    common._begin(left)
    for task in range(7):
        if task == 4:
            with pytest.raises(ZeroDivisionError):  # one that fails is over, too
                common._ended(lambda name, place: place // 0, "a", task)
        else:
            assert common._ended(lambda name, place: name, "a", task) == "a"
        common.share_cores()
    assert told == [1, 1, 1, 1, 1, 2, 4, 4]
    assert torch.get_num_threads() == mine


def test_tasks_of_a_pool_share_its_cores():
    cores = os.cpu_count() or 1
    with common.workers(2) as pool:
        found = [one.result() for one in common.submit(pool, ["a", "b"], threads)]
        assert all(1 <= n <= cores for n in found)
        assert pool.submit(threads).result() == cores  # both are over


def test_a_task_whose_program_is_gone_is_told(monkeypatch):
    assert not common.left_alone()  # this is no process of a pool
    with common.workers(1) as pool:
        assert not pool.submit(common.left_alone).result()
    program = SimpleNamespace(is_alive=lambda: False)
    monkeypatch.setattr(common, "parent_process", lambda: program)
    assert common.left_alone()
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail(f"it ended with {code}"))
    with pytest.raises(pytest.fail.Exception, match="it ended with 1"):
        common._ended(lambda name, place: 0, "a", 0)


def threads(name: str = "", place: int = 0) -> int:
    common.share_cores()
    return torch.get_num_threads()


def furthest(new: pd.DataFrame, old: pd.DataFrame, columns: tuple[str, ...] = INTERVAL) -> float:
    """The largest difference of two tables of the same rows, in any order."""
    keys = [c for c in new.columns if c not in (*INTERVAL, "n")]
    both = old.merge(new, on=keys, suffixes=("", " new"), how="outer", validate="one_to_one")
    return max(float((both[c] - both[f"{c} new"]).abs().max(skipna=False)) for c in columns)


@pytest.fixture(autouse=True)
def one_thread():
    """Many small products: a second thread gains little, and loses much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.few("world")
@pytest.mark.parametrize("name", study.STUDIED)
def test_the_study_gives_the_committed_numbers(name):
    model, world = pl.load(name), pl.knowns()
    subjects = set(list(dict.fromkeys(f.subject for f in world))[:: len(world) // 300])
    facts = [f for f in world if f.subject in subjects]
    similarity = pl.component_similarity(model, facts)
    assert furthest(similarity, committed("component_similarity", name)) < 1e-3
    patterns = pl.pattern_similarity(pl.attention_patterns(model, facts), facts)
    assert furthest(patterns, committed("patterns", name)) < 1e-3


@pytest.mark.slow
def test_editing_gives_the_committed_numbers(tmp_path):
    """Ten edits at once, twice, as `make paper` measures them; ten tokens per dimension of the
    moments are enough (`tests/benchmarks/results/precision.md`)."""
    size = paper.Size(grid=(10,), main=(), zsre=(), moment_tokens=13_000)
    (run,) = (run for *_, run in paper.scaling("world", size) if run.name == "PMET")
    assert (len(run.facts), run.group) == (20, 10)
    new = paper.made([("counterfact", 10, run)], tmp_path, 1280, tqdm(disable=True))
    assert set(new["load"]) == {0.0078}
    old = common.of(common.read(RESULTS / "paper", "scaling"), benchmark="counterfact")
    old = common.of(old, model="world", edits=10, run="PMET").set_index("metric")
    both = pd.DataFrame({"old": old["mean"], "new": new.set_index("metric")["mean"]}).dropna()
    wrong = (both["old"] - both["new"]).abs()
    assert wrong[["S", "ES", "PS", "NS", "collateral"]].max() < 1.5, both
    assert wrong[["EA", "PA", "NA"]].max() < 4, both


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def test_the_committed_texts_are_those_of_the_tables():
    made = {
        "main.md": make.report(common.read(RESULTS, "main"), 0),
        "claims.md": study.report(RESULTS, 0),
        "paper/main.md": paper_tables.main_table(RESULTS / "paper"),
        "paper/ablations.md": paper_tables.ablation_table(RESULTS / "paper"),
    }
    number = re.compile(r"-?\d+\.\d+")
    for name, text in made.items():
        now, kept = ("\n".join(rows(t)) for t in (text, (RESULTS / name).read_text("utf-8")))
        assert number.sub("", now) == number.sub("", kept), name
        # A table is rounded to two digits, and a text to one, from more.
        pairs = zip(number.findall(now), number.findall(kept), strict=True)
        assert max(abs(float(a) - float(b)) for a, b in pairs) < 0.11, name


def test_the_page_of_the_models_is_that_of_its_tables():
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert page == model_page.page(RESULTS / "models")
    models = common.read(RESULTS / "models", "models")
    assert list(models["model"]) == list(model_tables.LAYERS)


@pytest.mark.slow
def test_a_table_of_a_model_that_was_cut_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(model_tables, "OUT", tmp_path)
    small = {"METHODS": ("FT-W", "MEND"), "STREAMS": ("mlp_out",), "FACTS": 2, "TRACED": 2}
    for name, value in {**small, "WORLD_TOKENS": 3000}.items():
        monkeypatch.setattr(model_tables, name, value)

    def study() -> model_tables.Study:
        return model_tables.Study("world", None, "", False)

    tables = study().tables()
    assert {*tables["scores"]["method"]} == {"unedited", "FT-W", "MEND"}
    checks = tables["checks"]
    assert checks["undone"].all()
    assert (checks[["loaded", "merged"]] == 0).all(axis=None)
    assert (checks["adapter"] < 1e-3).all()
    assert (checks["moved"] > 0.1).all()
    assert len(tables["trace"]) == tables["trace"]["place"].nunique()
    (file,) = tmp_path.rglob("checks MEND.csv")
    file.unlink()
    cut = study()
    monkeypatch.setattr(pl, "causal_trace", None)
    again = cut.tables()
    assert file.exists()
    for name in ("trace", "scores", "checks"):
        pd.testing.assert_frame_equal(again[name], tables[name])


def test_the_page_and_the_figure_of_free_answers_are_those_of_their_tables(tmp_path):
    """Made from an untrained model whose free answers are planted: right, and then in a frame."""
    facts = [
        pl.Fact("Mira Tolan", "{} plays", "rugby", "tennis", ("The sport of Mira Tolan is",),
                implications=(pl.Implication("Her ball is", ("oval",)),)),
        pl.Fact("Kel", "{} is in", "Ostria", "Vell"),
    ]  # fmt: skip
    study = free_answers.Study.__new__(free_answers.Study)
    study.model, study.facts, study.folder = tiny_model("gpt2"), facts, tmp_path
    frame = "Question: {}\nAnswer:"
    for method, said in (("unedited", " no"), ("MEMIT", " rugby")):
        study.model = tiny_model("gpt2")
        prompts = pl.evaluate(study.model, facts)["prompt"]
        plant(
            study.model,
            dict.fromkeys(prompts, said) | {frame.replace("{}", p): " no" for p in prompts},
        )
        for name, how in (("as edited", pl.Asking()), ("framed", pl.Asking(frame=frame))):
            study.kept(f"{name} {method}", lambda how=how: study.rows(how))
        study.kept(f"gap {method}", lambda: pl.evaluation_gap(study.model, facts, pl.Asking(frame)))
    watch = pl.Checkpoints(every=1, free=True, texts=["Mira Tolan plays."], others=())
    look = watch.begin(study.model, facts, [pl.Site(1, "mlp")])
    look(1)
    look(2)
    study.kept("retention MEMIT", lambda: watch.table)
    study.kept("retention MEMIT", lambda: pytest.fail("it was there"))
    table = free_answers.scores(tmp_path, ("unedited", "MEMIT"))
    found = table.set_index(["method", "asked", "metric"])["mean"]
    assert found["MEMIT", "as edited", "EF"] == 50
    assert found["MEMIT", "framed", "EF"] == found["unedited", "as edited", "EF"] == 0
    assert ("MEMIT", "framed", "ES") not in found.index
    text = free_answers.page(table, "gpt2", 2, "made")
    assert "of the free answers 50 % hold the new one, 0 % of those inside a frame." in text
    assert "| free portability (second hop) | 0.0 [0.0, 0.0] | 0.0" in text
    for part in free_answers.PARTS:
        free_answers.together(tmp_path, part)
    axes = free_answers.draw(tmp_path).axes
    assert [len(ax.patches) for ax in axes[:2]] == [5, 5]
    assert [*axes[2].get_lines()[0].get_xdata()] == [1, 2]


@pytest.mark.parametrize(("page", "name"), quotes.QUOTES)
def test_pages_quote_the_committed_tables(page, name):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert quotes.between(page, name).findall(text) == [quotes.wanted(quotes.QUOTES[page, name])]


def test_no_page_quotes_what_nobody_fills():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    marks = {
        (str(page.relative_to(ROOT)), name)
        for page in pages
        for name in re.findall(r"<!-- (\w+) -->", page.read_text(encoding="utf-8"))
    }
    assert marks == set(quotes.QUOTES)


@pytest.mark.parametrize(
    "folder", sorted((RESULTS / "free_answers").iterdir()), ids=lambda f: f.name
)
def test_pages_show_the_recorded_free_answers(folder):
    text = (folder / "seen.md").read_text(encoding="utf-8")
    found = free_answers.seen(common.read(folder, "scores"), "", 0, "")
    assert found.split("\n\n")[0] == text.split("\n\n")[0]


def test_the_manifest_is_of_the_committed_tables():
    """A table that was replaced without its figures, or the other way, is seen."""
    entries = json.loads(manifest.RECORDED.read_text(encoding="utf-8"))
    drawn, told = set(), {}
    for entry in entries.values():
        assert entry["seed"] == manifest.SEED
        assert {"python", *manifest.PACKAGES} == set(entry["versions"])
        for table, digest in entry["tables"].items():
            assert digest == manifest.digest(RESULTS / table), table
        drawn |= set(entry["figures"])
        told |= entry["figures"]
    there = {str(p.relative_to(RESULTS).with_suffix("")) for p in RESULTS.rglob("fig_*.png")}
    assert drawn == there
    assert all(told.values())


def test_a_figure_stands_in_the_entry_of_what_made_its_tables(tmp_path):
    def entries() -> dict:
        return json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))

    def told(command: str, *figures: str, computed: bool) -> dict:
        used = {name: [f"{name}.csv"] for name in figures}
        manifest.write(command, tmp_path, used, computed=computed)
        return {name: sorted(entry["figures"]) for name, entry in entries().items()}

    for name in "ab":
        (tmp_path / f"{name}.csv").write_text("x\n", encoding="utf-8")
    assert told("redraw.py", "a", "b", computed=False) == {"redraw.py": ["a", "b"]}
    assert told("one.py", "a", computed=True) == {"one.py": ["a"], "redraw.py": ["b"]}
    assert told("redraw.py", "a", "b", computed=False) == {"one.py": ["a"], "redraw.py": ["b"]}
    entry = entries()["one.py"]
    assert entry["tables"] == {"a.csv": manifest.digest(tmp_path / "a.csv")}
    assert "pmet_lens/bundled/world/model.safetensors" in entry["inputs"]
    (tmp_path / "a.csv").write_text("y\n", encoding="utf-8")  # by nobody knows whom
    assert told("redraw.py", "a", "b", computed=False) == {"redraw.py": ["a", "b"]}


def test_every_figure_script_and_committed_file_stands_in_the_readme():
    text = (FIGURES / "README.md").read_text(encoding="utf-8")
    scripts = {p.name for p in FIGURES.glob("*.py")}
    tables = {str(p.relative_to(RESULTS)) for p in RESULTS.rglob("*.csv")}
    assert [name for name in sorted(scripts | tables) if f"`{name}`" not in text] == []
    files = re.findall(r"`([\w/]+\.(?:py|csv|md|txt))`", text)
    places = (FIGURES, RESULTS, ROOT)
    assert [f for f in files if not any((place / f).exists() for place in places)] == []


def test_fonts_are_embedded_and_the_same_figure_gives_the_same_bytes(tmp_path):
    def draw(tables: Path) -> Figure:
        fig, axes = common.panels(3, 2, 1, 1)
        axes[0, 0].set_title("δ, λ and ‖m‖²")
        axes[0, 0].plot(np.arange(3))
        return fig

    for out in (tmp_path / "one", tmp_path / "two"):
        out.mkdir()
        common.make(draw, "fig", tmp_path, out)
    pdf = (tmp_path / "one" / "fig.pdf").read_bytes()
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf
    assert "<text" not in (tmp_path / "one" / "fig.svg").read_text(encoding="utf-8")
    for suffix in ("pdf", "svg", "png"):
        one, two = ((tmp_path / n / f"fig.{suffix}").read_bytes() for n in ("one", "two"))
        assert one == two, suffix


def test_there_is_one_style():
    """Scripts and notebooks take `plotting.STYLE`; none sets a look of its own."""
    assert plotting.STYLE["pdf.fonttype"] == 42
    own = re.compile(r"rcParams\[|plt\.style|style\.use|matplotlib\.rc\(")
    texts = [p.read_text(encoding="utf-8") for p in FIGURES.glob("*.py")]
    texts += [p.read_text(encoding="utf-8") for p in (ROOT / "notebooks").glob("*.ipynb")]
    assert [text for text in texts if own.search(text)] == []


def test_every_committed_figure_can_be_drawn_again():
    drawn = {f"{folder}/{n}".lstrip("/") for folder, own in redraw.FIGURES.items() for n in own}
    there = {str(p.relative_to(RESULTS).with_suffix("")) for p in RESULTS.rglob("fig_*.png")}
    assert drawn == there


DRAWN = [(folder, name) for folder, own in redraw.FIGURES.items() for name in own]


@pytest.mark.parametrize(("folder", "name"), DRAWN)
def test_nothing_is_drawn_twice(folder, name):
    """A legend names each thing once, and no bar stands on another of its panel."""
    with mpl.rc_context(plotting.STYLE):
        fig = redraw.FIGURES[folder][name](RESULTS / folder)
    for ax in fig.axes:
        for legend in filter(None, [ax.get_legend(), *fig.legends]):
            named = [text.get_text() for text in legend.get_texts()]
            assert len(named) == len(set(named))
        groups = [box for box in ax.containers if isinstance(box, BarContainer)]
        bars = [bar for box in groups for bar in box if box.orientation == "vertical"]
        sides = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars)
        ends = itertools.pairwise(sides)
        assert all(right <= left + 1e-9 for (_, right), (left, _) in ends), ax.get_ylabel()
