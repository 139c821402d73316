"""Models out of GGUF files: small ones written here, read as transformers reads them."""

from __future__ import annotations

import pytest
import torch
from small_gguf import written
from tiny import D_MODEL, N_LAYERS, refused, tiny_hf, tiny_tokenizer

import pmet_lens as pl
from pmet_lens.data import gguf_files
from pmet_lens.models import loading


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return written(tmp_path_factory.mktemp("gguf") / "small.gguf")


def as_transformers_reads(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize("way", ["file", "directory"])
def test_a_file_is_read_as_floats(file, way):
    model = pl.load(file if way == "file" else str(file.parent))
    assert model.kind == "Q4_0"
    assert repr(model) == (
        f"Model('small': LlamaForCausalLM, {N_LAYERS} layers, d_model {D_MODEL}, float32, weights "
        "from a 4-bit file (Q4_0))"
    )
    theirs = as_transformers_reads(file).state_dict()
    ours = model.hf.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (
        model.tokenizer("The tower of Ilmar")["input_ids"]
        == (tiny_tokenizer()("The tower of Ilmar")["input_ids"])
    )


def test_a_file_is_read_once(file, monkeypatch):
    """transformers alone parses it for the configuration, the weights and the tokenizer."""
    import gguf

    read, plain = [], gguf.GGUFReader
    counting = lambda *args: read.append(args) or plain(*args)  # noqa: E731
    monkeypatch.setattr(gguf, "GGUFReader", counting)
    pl.load(file)
    assert len(read) == 1
    assert gguf.GGUFReader is counting  # and what was put there for it is gone
    file.with_name("cut.gguf").write_bytes(file.read_bytes()[:-1000])
    with refused("cannot be read as a model"):
        pl.load(file.with_name("cut.gguf"))
    file.with_name("cut.gguf").unlink()
    assert gguf.GGUFReader is counting


def test_a_model_that_transformers_read_is_taken_as_it_is(file):
    hf = as_transformers_reads(file)
    assert hf.is_quantized
    model = pl.load(hf, tiny_tokenizer())
    assert model.kind == "Q4_0"
    assert hf.is_quantized  # it is the user's
    packed = as_transformers_reads(file)
    down = packed.model.layers[1].mlp.down_proj
    down.weight = torch.nn.Parameter(down.weight.detach().to(torch.uint8), requires_grad=False)
    with refused("quantised, so nothing can be written"):
        pl.load(packed, tiny_tokenizer())
    plain = tiny_hf("llama")
    plain.is_quantized = True
    with refused("quantised, so nothing can be written"):
        pl.load(plain, tiny_tokenizer())


def test_it_is_edited_and_saved_like_any_other(file, tmp_path):
    from transformers import AutoModelForCausalLM

    model = pl.load(file)
    site = pl.Site(1, "mlp")
    with torch.no_grad():
        model.weight(site).add_(1.0)
    model.hf.save_pretrained(tmp_path / "out")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(saved[name], value) for name, value in model.hf.state_dict().items())


def test_floats_are_floats(tmp_path):
    """Weights that were never quantised keep every bit of what was written."""
    model = pl.load(written(tmp_path / "full.gguf", "F32"))
    assert "32-bit file (F32)" in repr(model)
    want = tiny_hf("llama", intermediate=64).state_dict()
    down = "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(model.hf.state_dict()[down], want[down])


def test_what_is_no_whole_gguf_file_is_refused(file, tmp_path):
    with refused("no directory or .gguf file"):
        pl.load("nowhere.gguf")
    (tmp_path / "a.gguf").write_bytes(b"PK not a model")
    with refused("does not begin with GGUF"):
        pl.load(tmp_path / "a.gguf")
    whole = file.read_bytes()
    for size in (10, 200, 2000, len(whole) // 2):
        (tmp_path / "a.gguf").write_bytes(whole[:size])
        with refused("cannot be read"):
            pl.load(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(whole)
    with refused("several GGUF files .*a.gguf, b.gguf"):
        pl.load(tmp_path)


def test_without_the_package_that_reads_them_it_is_named(file, monkeypatch):
    monkeypatch.setattr(gguf_files.importlib.util, "find_spec", lambda _: None)
    with refused(r'pip install "pmet-lens\[gguf\]"'):
        pl.load(file)
    monkeypatch.setattr(loading.fetched.downloads, "cache", lambda: file.parent / "cache")
    with refused(r"pmet-lens\[gguf\]"):
        pl.load("smollm2-135m")
    assert not (file.parent / "cache").exists()  # nothing was fetched that could not be read


def test_floats_are_kept_whole_or_not_at_all(file, tmp_path):
    model, floats = pl.load(file), tmp_path / "floats"
    assert not gguf_files.are_whole(floats, "00ff")
    assert gguf_files.keep(floats, model.hf, model.tokenizer, "00ff")
    assert gguf_files.are_whole(floats, "00ff")
    assert not gguf_files.are_whole(floats, "0100")
    again = pl.load(floats).hf.state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.hf.state_dict().items())
    (floats / "config.json").write_text("{}")
    assert not gguf_files.are_whole(floats, "00ff")
    assert not gguf_files.keep(tmp_path / "nowhere" / "floats", model.hf, model.tokenizer, "00ff")
