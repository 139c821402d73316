"""Second moments that are kept: begun, cut, gone on with, shared, and never read half."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
from kept import shared_model
from tiny import tiny_model

import pmet_lens as pl
from pmet_lens.data import file_format
from pmet_lens.editing import keys
from pmet_lens.models.model import Site
from pmet_lens.moments import moment, moment_files, second_moments
from pmet_lens.moments.own_moments import TOKENS_PER_DIMENSION
from pmet_lens.moments.python_text import python_text
from pmet_lens.moments.second_moments import MomentError

torch.set_num_threads(1)
SETTINGS = {"layers": [1, 2], "n_tokens": 2000, "batch_tokens": 200}


@pytest.fixture(scope="module")
def model():
    return shared_model("llama", positions=128)


@pytest.fixture(scope="module")
def texts():
    return list(itertools.islice(pl.texts(), 200))


@pytest.fixture(scope="module")
def wanted(model, texts):
    return pl.second_moments(model, texts, **SETTINGS)


def same(found, wanted) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.equal(found[s].total, m.total)
        and (found[s].count, found[s].shards, found[s].squares) == (m.count, m.shards, m.squares)
        for s, m in wanted.items()
    )


class Cut(Exception):
    """Somebody pulled the plug."""


def cut_at(tokens: int):
    def on_tokens(done: int, _: int) -> None:
        if done >= tokens:
            raise Cut

    return on_tokens


def test_what_is_kept_is_computed_once(model, texts, wanted, tmp_path, monkeypatch):
    path = tmp_path / "new folder" / "m.safetensors"
    assert same(pl.kept_moments(path, model, texts, **SETTINGS), wanted)
    monkeypatch.setattr(model, "forward", None)
    assert same(pl.kept_moments(path, model, iter(texts), **SETTINGS), wanted)
    assert same(pl.load_moments(path), wanted)


@pytest.mark.parametrize("tokens", [100, 900, 1900])
def test_a_run_that_was_cut_goes_on_to_the_same_bits(model, texts, wanted, tmp_path, tokens):
    path = tmp_path / "m.safetensors"
    with pytest.raises(Cut):
        pl.kept_moments(path, model, texts, every=0.0, on_tokens=cut_at(tokens), **SETTINGS)
    assert not path.exists()
    seen = []
    again = pl.kept_moments(
        path, model, texts, every=0.0, on_tokens=lambda n, _: seen.append(n), **SETTINGS
    )
    assert same(again, wanted)
    # A shard is 400 tokens; all that were whole are not read again.
    assert min(seen) > max(0, tokens - 2 * 400)
    assert {p.name for p in tmp_path.iterdir()} <= {"m.safetensors", "m.safetensors.lock"}


def test_what_was_made_of_something_else_is_not_taken_for_this(model, texts, tmp_path):
    path = tmp_path / "m.safetensors"
    pl.kept_moments(path, model, texts, **SETTINGS)
    other = shared_model("llama", seed=1, positions=128)
    for changed, words in (
        (lambda: pl.kept_moments(path, other, texts, **SETTINGS), "weights"),
        (lambda: pl.kept_moments(path, model, texts[1:], **SETTINGS), "texts"),
        (lambda: pl.kept_moments(path, model, texts, **{**SETTINGS, "layers": [1]}), "sites"),
        (lambda: pl.kept_moments(path, model, texts, **SETTINGS, max_length=9), "max_length"),
    ):
        with pytest.raises(MomentError, match=rf"made with other {words}.*remove it"):
            changed()
    pl.save_moments(pl.load_moments(path), path)
    with pytest.raises(MomentError, match="does not say what it was made of"):
        pl.kept_moments(path, model, texts, **SETTINGS)
    with pytest.raises(MomentError, match="one string"):
        pl.kept_moments(tmp_path / "x", model, "text", **SETTINGS)


def test_a_begun_run_with_other_texts_is_not_gone_on_with(model, texts, tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(Cut):
        pl.kept_moments(path, model, texts, every=0.0, on_tokens=cut_at(900), **SETTINGS)
    with pytest.raises(MomentError, match=r"m\.safetensors\.begun was made with other texts"):
        pl.kept_moments(path, model, texts[1:], **SETTINGS)


CHILD = """
import sys
sys.path.insert(0, {tests!r})
import itertools, torch, pmet_lens as pl
from tiny import tiny_model
torch.set_num_threads(1)
model = tiny_model("llama", positions=128)
texts = list(itertools.islice(pl.texts(), 200))
def told(done, _):
    sys.stdout.write(f"{{done}}\\n"); sys.stdout.flush()
    {wait}
pl.kept_moments({path!r}, model, texts, every=0.0, on_tokens=told, **{settings!r})
"""


def child(path: Path, wait: str = "pass") -> subprocess.Popen[str]:
    tests = str(Path(__file__).parents[1])
    code = CHILD.format(tests=tests, path=str(path), settings=SETTINGS, wait=wait)
    env = {**os.environ, "PYTHONPATH": str(Path(pl.__file__).parents[1])}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", code], env=env, text=True, **pipes)


@pytest.mark.slow
def test_a_killed_process_leaves_what_it_had_and_no_lock(model, texts, wanted, tmp_path):
    path = tmp_path / "m.safetensors"
    wait = "sys.stdin.read() if done > 900 else None"  # for ever
    with child(path, wait) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) > 900:
                break
        process.send_signal(signal.SIGKILL)
    assert not path.exists()
    seen = []
    found = pl.kept_moments(path, model, texts, on_tokens=lambda n, _: seen.append(n), **SETTINGS)
    assert same(found, wanted)
    assert min(seen) > 400


def test_of_two_at_once_one_computes(model, texts, wanted, tmp_path, monkeypatch):
    path, told, begun, go = tmp_path / "m.safetensors", warnings.warn, Event(), Event()

    def wait(*_):
        begun.set()
        assert go.wait(60)

    def first():
        pl.kept_moments(path, model, texts, on_tokens=wait, **SETTINGS)

    def warn(*args, **more):
        go.set()
        told(*args, **more)

    other = Thread(target=first)
    other.start()
    assert begun.wait(60)  # it has the lock now
    monkeypatch.setattr(moment_files.warnings, "warn", warn)
    with pytest.warns(UserWarning, match="Another process computes .*waiting"):
        found = pl.kept_moments(
            path, model, texts, on_tokens=lambda *_: pytest.fail("both compute"), **SETTINGS
        )
    other.join()
    assert same(found, wanted)


@pytest.mark.slow
def test_of_two_processes_one_computes(model, texts, wanted, tmp_path, monkeypatch):
    path, told = tmp_path / "m.safetensors", warnings.warn
    with child(path, "sys.stdin.read()") as first:  # it waits until its input is closed
        assert first.stdout is not None
        assert first.stdin is not None
        first.stdout.readline()  # it has the lock now

        def warn(*args, **more):
            first.stdin.close()
            told(*args, **more)

        monkeypatch.setattr(moment_files.warnings, "warn", warn)
        with pytest.warns(UserWarning, match="Another process computes .*waiting"):
            found = pl.kept_moments(
                path, model, texts, on_tokens=lambda *_: pytest.fail("both compute"), **SETTINGS
            )
        first.stdout.read()
    assert first.returncode == 0
    assert same(found, wanted)


# -- disks ----------------------------------------------------------------------------------------


def limited(n: int):
    """No file of this process may become longer than `n` bytes: a write beyond fails for real."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    return hard


def test_a_full_disk_loses_nothing(model, texts, wanted, tmp_path):
    path = tmp_path / "m.safetensors"
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    hard = limited(5000)
    try:
        with pytest.warns(UserWarning, match="could not be written") as warned:
            found = pl.kept_moments(path, model, texts, every=0.0, **SETTINGS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert same(found, wanted)
    told = [str(w.message) for w in warned]
    assert any("Going on without keeping" in text for text in told)
    assert "returned, but not kept" in told[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors.lock"]


def test_a_folder_that_cannot_be_written_is_said_before_the_work(model, texts, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MomentError, match=r"cannot be written.*Name another file"):
        pl.kept_moments(
            tmp_path / "file" / "m", model, texts,
            on_tokens=lambda *_: pytest.fail("computed"), **SETTINGS,
        )  # fmt: skip


def test_a_changed_bit_is_seen(model, wanted, tmp_path):
    path = tmp_path / "m.safetensors"
    pl.save_moments(wanted, path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(MomentError, match=r"is damaged: .* is not what was written"):
        pl.load_moments(path)
    site = max(wanted, key=str)
    with pytest.raises(MomentError, match="is damaged"):
        pl.open_moments(path)[site].matrix()


def test_files_of_the_first_days_are_read(wanted, tmp_path):
    path = tmp_path / "m.safetensors"
    site = next(iter(wanted))
    head = {"format": moment_files.FORMAT, "model": "", "counts": {str(site): wanted[site].count}}
    metadata = {file_format.KEY: json.dumps(head)}
    file_format.save_file({str(site): wanted[site].total}, path, metadata)
    assert torch.equal(pl.load_moments(path)[site].value, wanted[site].value)


# -- memory ---------------------------------------------------------------------------------------


def test_a_batch_that_does_not_fit_is_halved_to_the_same_sums(texts, monkeypatch):
    """Out of memory in the last site's hook, when the other sites have had the batch already."""
    model = tiny_model("gpt2", torch.float64, positions=128)  # float32 rounds by batch
    wanted = pl.second_moments(model, texts, **SETTINGS)
    last, full = max(wanted), []
    original = moment.solvers.add_gram

    def add_gram(total, rows):
        if len(rows) > 120 and total is sums[last].total:
            full.append(len(rows))
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        original(total, rows)

    run = second_moments.Summing(model, **SETTINGS)
    sums = run.sums
    monkeypatch.setattr(moment.solvers, "add_gram", add_gram)
    with pytest.warns(UserWarning, match="texts at once do not fit into memory; going on with"):
        for _ in run.read(texts):
            pass
    assert full
    for site, summed in run.moments().items():
        assert summed.count == wanted[site].count
        assert torch.allclose(summed.total, wanted[site].total, rtol=1e-10, atol=1e-10)


def test_keys_of_an_edit_are_read_in_halves(model, monkeypatch):
    facts = pl.counterfact(n=8)
    reader = keys.Reader(model, facts, ["{}"])
    wanted = [reader.keys(Site(n, "mlp")) for n in (1, 2)]
    forward, run = model.forward, []

    def small(ids, mask, **more):
        if len(ids) > 3:
            raise RuntimeError("out of memory")
        run.append(len(ids))
        return forward(ids, mask, **more)

    monkeypatch.setattr(model, "forward", small)
    halved = keys.Reader(model, facts, ["{}"])
    with pytest.warns(UserWarning, match="facts at once do not fit"):
        found = [halved.keys(Site(n, "mlp")) for n in (1, 2)]
    assert run == [2, 2, 2, 2]
    for own, other in zip(found, wanted, strict=True):
        assert torch.allclose(own, other, atol=1e-5)


def test_the_time_between_two_keepings_is_kept(model, texts, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(moment_files, "_keep", lambda *_: kept.append(time.monotonic()))
    pl.kept_moments(tmp_path / "a", model, texts, every=3600.0, **SETTINGS)
    assert kept == []
    pl.kept_moments(tmp_path / "b", model, texts, every=0.0, **SETTINGS)
    assert len(kept) >= 4


# -- the model's own words ------------------------------------------------------------------------


def test_own_moments_are_those_of_sampled_text_and_kept(model, tmp_path, monkeypatch):
    monkeypatch.setenv("PMET_LENS_CACHE", str(tmp_path))
    found = pl.own_moments(model, [1, 2])
    tokens = TOKENS_PER_DIMENSION * model.d_in(Site(1, "mlp"))
    texts = list(pl.sampled_texts(model, n_tokens=tokens))
    assert sum(map(len, model.tokenizer(texts)["input_ids"])) >= tokens
    how = {"projections": ("mlp",), "n_tokens": tokens}
    assert same(found, pl.second_moments(model, texts, [1, 2], **how))

    def again(*_, **__):
        raise AssertionError("it is there already")

    monkeypatch.setattr("pmet_lens.moments.sampled_text.sampled_texts", again)
    other = pl.own_moments(model, [2])  # its text is there
    assert list(other) == [Site(2, "mlp")]
    monkeypatch.setattr(second_moments.Summing, "read", again)
    assert same(pl.own_moments(model, [2, 1]), found)
    session = pl.Session(model)  # for want of text
    assert same({s: session.moments(found)[s] for s in found}, found)


def test_own_moments_are_those_of_the_unedited_model(model, tmp_path, monkeypatch):
    monkeypatch.setenv("PMET_LENS_CACHE", str(tmp_path))
    found = pl.own_moments(model, [1], n_tokens=200)
    fact = pl.Fact("Kel", "{} is the capital of", "Ostria")
    hparams = pl.Hparams((1,), n_steps=2)
    with pl.edit(model, fact, pl.own_moments(model, [1]), "MEMIT", hparams, ["{}"]).applied(model):
        assert same(pl.own_moments(model, [1], n_tokens=200), found)
    other = pl.own_moments(tiny_model("llama", seed=1, positions=128), [1], n_tokens=200)
    assert not same(other, found)


def test_moments_of_python_s_documentation(model, tmp_path, monkeypatch):
    monkeypatch.setenv("PMET_LENS_CACHE", str(tmp_path))
    texts = python_text()
    assert len(set(texts)) == len(texts) > 100
    assert all(len(text.split()) >= 25 and "\n" not in text for text in texts)
    found = pl.own_moments(model, [1], n_tokens=300, text="python")
    how = {"projections": ("mlp",), "n_tokens": 300}
    assert same(found, pl.second_moments(model, texts, [1], **how))
    assert not same(found, pl.own_moments(model, [1], n_tokens=300))  # each has its own file
    assert same(found, pl.own_moments(model, [1], n_tokens=300, text="python"))
    with pytest.raises(MomentError, match=r"has [\d,]+ tokens .* 9,000,000 are needed"):
        pl.own_moments(model, [1], n_tokens=9_000_000, text="python")
    with pytest.raises(MomentError, match="not 'wikipedia'"):
        pl.own_moments(model, [1], text="wikipedia")
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(MomentError, match="without its documentation"):
        pl.own_moments(model, [1], text="python")


@pytest.mark.parametrize("at", ["text", "moments", "file"])
def test_ctrl_c_leaves_the_cache_whole(model, tmp_path, monkeypatch, at):
    """What is there afterwards is whole, and the next call gives what an uncut one gives."""
    monkeypatch.setenv("PMET_LENS_CACHE", str(tmp_path / "other"))
    wanted = pl.own_moments(model, [1], n_tokens=200)
    monkeypatch.setenv("PMET_LENS_CACHE", str(tmp_path / "cut"))

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    told = interrupt if at == "moments" else lambda *_: None
    with monkeypatch.context() as patch:
        if at == "text":
            patch.setattr(Path, "write_text", interrupt)
        if at == "file":  # half of it is written
            patch.setattr(file_format, "save_file", lambda _, path, **__: half(path))
        with pytest.raises(KeyboardInterrupt):
            pl.own_moments(model, [1], n_tokens=200, on_tokens=told)
    left = [p.suffix for p in (tmp_path / "cut").rglob("*") if p.is_file()]
    assert sorted(left) == ([] if at == "text" else [".json", ".lock"])
    assert same(pl.own_moments(model, [1], n_tokens=200), wanted)


def half(path: str) -> None:
    Path(path).write_bytes(b"half")
    raise KeyboardInterrupt
