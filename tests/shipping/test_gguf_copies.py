"""An edit in a copy of a GGUF file: what differs, what does not, what is lost, what is refused."""

from __future__ import annotations

import struct
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from small_gguf import written
from tiny import refused

import pmet_lens as pl
from pmet_lens.data import fetched
from pmet_lens.shipping import gguf_copies, undoing

torch.set_num_threads(1)
FACT = pl.Fact("Mira Tolan", "{} plays the sport of", "rugby", "tennis")
SITES = (pl.Site(1, "attn"), pl.Site(2, "mlp"))
NAMES = ["blk.1.attn_output.weight", "blk.2.ffn_down.weight"]


def edit_of(model: pl.Model, size: float = 0.02) -> pl.Edit:
    """Of rank one at both kinds of site, without an optimisation."""
    from pmet_lens.editing.edit_files import origin

    generator = torch.Generator().manual_seed(0)
    factors = {
        site: (
            size * torch.randn(model.d_in(site), 1, generator=generator, dtype=torch.float64),
            torch.randn(1, model.d_model, generator=generator, dtype=torch.float64),
        )
        for site in SITES
    }
    hp = pl.Hparams((1, 2))
    made_on = origin(model, SITES)
    return pl.Edit(factors, model.dtype, (FACT,), pl.PMET, hp, ("{}",), **made_on)


@pytest.fixture(scope="module", params=("Q4_0", "F32"))
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def source(kind, tmp_path_factory):
    return written(tmp_path_factory.mktemp("gguf") / f"{kind}.gguf", kind)


@pytest.fixture(scope="module")
def model(source) -> pl.Model:
    return pl.load(source)


@pytest.fixture(scope="module")
def edit(model) -> pl.Edit:
    return edit_of(model)


def tensors(path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("stored", (None, "F16", "Q8_0", "F32", "BF16"))
def test_only_the_edited_tensors_differ(source, model, edit, kind, stored, tmp_path):
    out = tmp_path / "edited.gguf"
    before = source.read_bytes()
    table = edit.save_gguf(source, out, stored)
    assert source.read_bytes() == before
    old, new = tensors(source), tensors(out)
    assert list(old) == list(new)
    for name in old.keys() - set(NAMES):
        assert old[name].tensor_type == new[name].tensor_type
        assert old[name].data.tobytes() == new[name].data.tobytes()
    head = gguf_copies.layout(source).listed_at
    assert out.read_bytes()[:head] == before[:head]  # every value of the header
    assert out.stat().st_size % 32 == 0
    now = stored or ("F32" if kind == "F32" else "F16")
    assert list(table.index) == NAMES
    assert set(table["stored"]) == {now} == {new[name].tensor_type.name for name in NAMES}
    assert set(table["was"]) == {kind}
    for site, name in zip(SITES, NAMES, strict=True):
        left, right = edit.factors[site]
        wanted = model.weight(site).double() + left @ right
        values = gguf.quants.dequantize(new[name].data.view(np.uint8), new[name].tensor_type)
        got = torch.from_numpy(values.reshape(wanted.T.shape).astype(np.float64)).T
        lost = float((got - wanted).norm() / (left @ right).norm())
        assert table.loc[name, "rounded"] == pytest.approx(lost, rel=1e-6)
        grown = new[name].n_bytes - old[name].n_bytes
        assert table.loc[name, "bytes"] == grown


def test_what_rounding_costs_is_in_the_order_of_the_types(source, edit, tmp_path):
    lost = {
        kind: edit.save_gguf(source, tmp_path / f"{kind}.gguf", kind)["rounded"].max()
        for kind in gguf_copies.TYPES
    }
    assert lost["F32"] < 1e-5 < lost["F16"] < 0.003 < lost["BF16"] < lost["Q8_0"] < 0.1


def test_it_is_read_again_as_the_edited_model(source, model, edit, tmp_path):
    edit.save_gguf(source, tmp_path / "edited.gguf", "F32")
    again = pl.load(tmp_path / "edited.gguf")
    with edit.applied(model):
        for site in SITES:
            assert torch.allclose(again.weight(site), model.weight(site), atol=1e-6)
        ids = torch.arange(12)[None]
        with torch.no_grad():
            assert torch.allclose(again.hf(ids).logits, model.hf(ids).logits, atol=1e-4)


def test_it_is_taken_back_to_the_last_byte(source, edit, tmp_path):
    out, back = tmp_path / "edited.gguf", tmp_path / "back.gguf"
    for stored in ("Q8_0", "F16"):
        edit.save_gguf(source, out, stored, undoable=True)
        assert undoing.restored(out, back) == [f"{FACT.text} → rugby"]
        assert back.read_bytes() == source.read_bytes()
        with refused("back.gguf is there already", pl.EditError):
            undoing.restored(out, back)
        back.unlink()
    out.write_bytes(out.read_bytes() + b"\0")
    with refused("was changed since it was edited", pl.EditError):
        undoing.restored(out, back)
    assert not back.exists()
    with refused("has no .*gguf.undo with its weights from before.*nothing to take", pl.EditError):
        undoing.restored(source, back)


def test_no_copy_without_its_way_back(source, edit, tmp_path):
    out = tmp_path / "edited.gguf"
    undoing.file_of(out).mkdir()
    with refused("the way back could not be written", pl.EditError):
        edit.save_gguf(source, out, undoable=True)
    assert [p.name for p in tmp_path.iterdir()] == [undoing.file_of(out).name]


def test_a_file_of_any_alignment_and_of_an_edited_last_tensor(tmp_path):
    """Nothing fills up its end; the last tensor is one that is edited."""
    path = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    rows = np.arange(36 * 3, dtype=np.float32).reshape(3, 36) / 100
    writer.add_tensor("first", rows[:, :5].copy())
    writer.add_tensor(NAMES[1], rows)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    whole = path.read_bytes()
    path.write_bytes(whole[: gguf_copies.layout(path).data_at + 64 + 36 * 3 * 4])
    factors = {SITES[1]: (torch.ones(36, 1).double(), torch.ones(1, 3).double())}
    edit = pl.Edit(factors, torch.float32, (FACT,), pl.PMET, pl.Hparams((2,)), ("{}",))
    edit.save_gguf(path, tmp_path / "out.gguf", "F16", undoable=True)
    assert np.allclose(tensors(tmp_path / "out.gguf")[NAMES[1]].data, rows + 1, atol=2e-3)
    undoing.restored(tmp_path / "out.gguf", tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == path.read_bytes()


def test_other_weights_are_refused_unless_told(source, edit, tmp_path):
    other = replace(edit, base=dict.fromkeys(SITES, "00"))
    with refused(r"'Q?F?\w+' with other weights at 1\.attn.*any_base=True", pl.EditError):
        other.save_gguf(source, tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())
    assert len(other.save_gguf(source, tmp_path / "out.gguf", any_base=True)) == 2


def test_a_base_in_half_precision_is_known_again(source, tmp_path):
    model = pl.load(source, dtype="bfloat16")
    edit = edit_of(model)
    table = edit.save_gguf(source, tmp_path / "out.gguf", "F32")
    assert table["rounded"].max() < 1e-5  # the factors are added to the file's own weights


def test_what_cannot_be_done_is_refused_in_words(source, edit, tmp_path, monkeypatch):
    out = tmp_path / "out.gguf"
    cases = {
        "is the source itself": (source, source),
        "There is no GGUF file 'nowhere.gguf'": ("nowhere.gguf", out),
        "does not end in .gguf": (source, tmp_path / "out.bin"),
    }
    (tmp_path / "text.gguf").write_text("not a model")
    cases["does not begin with GGUF"] = (tmp_path / "text.gguf", out)
    (tmp_path / "cut.gguf").write_bytes(source.read_bytes()[:-1000])
    cases["ends inside .*: the file is cut"] = (tmp_path / "cut.gguf", out)
    (tmp_path / "stub.gguf").write_bytes(source.read_bytes()[:300])
    cases["header of .*stub.gguf cannot be read"] = (tmp_path / "stub.gguf", out)
    (tmp_path / "link.gguf").symlink_to(source)
    cases["is the source itself, which"] = (source, tmp_path / "link.gguf")
    (tmp_path / "many").mkdir()
    for name in "ab":
        (tmp_path / "many" / f"{name}.gguf").write_bytes(b"GGUF")
    cases["several GGUF files"] = (tmp_path / "many", out)
    for words, (given, target) in cases.items():
        with refused(words, pl.EditError):
            edit.save_gguf(given, target)
        assert not out.exists()
    with refused("stored as F16, Q8_0, F32, BF16, not as 'Q4_K'", pl.EditError):
        edit.save_gguf(source, out, "Q4_K")
    deep = replace(edit, factors={pl.Site(9, "mlp"): edit.factors[SITES[1]]})
    with refused("changes 9.mlp, but .* has no tensor blk.9.ffn_down.weight", pl.EditError):
        deep.save_gguf(source, out)
    wide = replace(edit, factors={SITES[0]: edit.factors[SITES[1]]})
    with refused(r"\[32, 64\], but blk.1.attn_output.weight of .* is \[32, 32\]", pl.EditError):
        wide.save_gguf(source, out)
    left, right = edit.factors[SITES[1]]
    with refused("too large for F16", pl.EditError):
        replace(edit, factors={SITES[1]: (1e7 * left, right)}).save_gguf(source, out, "F16")
    (tmp_path / "file").write_text("")
    with refused("could not be written", pl.EditError):
        edit.save_gguf(source, tmp_path / "file" / "out.gguf")
    monkeypatch.setattr(fetched, "is_here", lambda name: False)
    with refused("'smollm2-135m' is not fetched", pl.EditError):
        edit.save_gguf("smollm2-135m", out)
    assert not out.exists()


def test_a_split_file_is_refused(source, edit, tmp_path):
    whole = source.read_bytes()
    at = gguf_copies.layout(source).listed_at
    count = struct.unpack("<Q", whole[16:24])[0] + 1
    pair = struct.pack("<Q", 11) + b"split.count" + struct.pack("<IH", 2, 3)
    part = whole[:16] + struct.pack("<Q", count) + whole[24:at] + pair + whole[at:]
    (tmp_path / "part.gguf").write_bytes(part)
    with refused("is one of 3 files of a model: merge them first", pl.EditError):
        edit.save_gguf(tmp_path / "part.gguf", tmp_path / "out.gguf")


def test_rows_that_q8_cannot_take_are_refused(tmp_path):
    path = tmp_path / "thin.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor(NAMES[1], np.ones((3, 20), dtype=np.float32))
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    factors = {SITES[1]: (torch.ones(20, 1).double(), torch.ones(1, 3).double())}
    edit = pl.Edit(factors, torch.float32, (FACT,), pl.PMET, pl.Hparams((2,)), ("{}",))
    with refused("rows of 20 weights, and Q8_0 takes them by 32", pl.EditError):
        edit.save_gguf(path, tmp_path / "out.gguf", "Q8_0")


def test_a_write_that_fails_leaves_nothing(source, edit, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(gguf_copies, "_copied", full)
    with refused("could not be written to .*no space left", pl.EditError):
        edit.save_gguf(source, tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())
