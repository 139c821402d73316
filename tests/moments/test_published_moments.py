"""The published files of second moments: written as ROME reads them, read as ROME writes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kept import shared_model

import pmet_lens as pl
from pmet_lens.models.model import Site

torch.set_num_threads(1)
TEXTS = ["The tower of Ilmar stands in the harbour.", "Mira Tolan plays the sport of tennis."] * 9


@pytest.fixture(scope="module", params=["gpt2", "gptj", "llama"])
def model(request):
    return shared_model(request.param)


def test_a_file_as_rome_writes_it(model, tmp_path):
    """Raw float32 sum and count, null-boxed arguments beside them, the module in the name."""
    site = Site(2, "mlp")
    module = model.parameter_name(site).removesuffix(".weight")
    generator = np.random.default_rng(0)
    keys = generator.standard_normal((300, model.d_in(site))).astype("float32")
    np.savez(
        tmp_path / f"{module}_float32_mom2_100000.npz",
        **{
            "mom2.constructor": "util.runningstats.SecondMoment()",
            "mom2.count": 300,
            "mom2.mom2": keys.T @ keys,
            "sample_size": 100000,
        },
    )
    (tmp_path / "other_float32_mom2_1.npz").write_bytes(b"not read")
    (moment,) = pl.import_moments(model, tmp_path).values()
    assert moment.count == 300
    assert torch.allclose(moment.value, torch.from_numpy(keys.T @ keys) / 300)
    assert list(pl.import_moments(model, tmp_path / f"{module}_float32_mom2_100000.npz")) == [site]


def test_there_and_back(model, tmp_path):
    moments = pl.second_moments(model, TEXTS, (1, 2))
    written = pl.export_moments(moments, tmp_path, model, 100)
    assert [path.name.endswith("_float32_mom2_100.npz") for path in written] == [True] * 4
    again = pl.import_moments(model, tmp_path)
    assert list(again) == sorted(moments)
    for site, moment in moments.items():
        assert again[site].count == moment.count
        assert torch.equal(again[site].total, moment.total.float())
    with np.load(written[0], allow_pickle=False) as content:
        assert sorted(content) == ["mom2.constructor", "mom2.count", "mom2.mom2", "sample_size"]
        assert content["mom2.constructor"] == "util.runningstats.SecondMoment()"


def test_wrong_files_say_why(model, tmp_path):
    name = model.parameter_name(Site(1, "mlp")).removesuffix(".weight") + "_float32_mom2_7.npz"
    path = tmp_path / name
    with pytest.raises(pl.MomentError, match="holds no published moments"):
        pl.import_moments(model, tmp_path)
    with pytest.raises(pl.MomentError, match="cannot be read"):
        pl.import_moments(model, path)
    for content, words in (
        ({"mom2.count": 3}, "cannot be read"),
        ({"mom2.count": 3, "mom2.mom2": np.eye(5)}, "another model"),
        ({"mom2.count": 3, "mom2.mom2": np.array({"x": 1})}, "cannot be read"),  # a pickle
        ({"mom2.count": 0, "mom2.mom2": np.eye(model.d_in(Site(1, "mlp")))}, "of 0 keys"),
        (
            {"mom2.count": 3, "mom2.mom2": np.full((model.d_in(Site(1, "mlp")),) * 2, np.nan)},
            "not finite",
        ),
    ):
        np.savez(path, **content)
        with pytest.raises(pl.MomentError, match=words):
            pl.import_moments(model, tmp_path)
    path.write_bytes(b"cut short")
    with pytest.raises(pl.MomentError, match="cannot be read"):
        pl.import_moments(model, [path])
    with pytest.raises(pl.MomentError, match="names no module"):
        pl.import_moments(model, [tmp_path / "elsewhere_float32_mom2_7.npz"])
    (tmp_path / "file").write_text("")
    moments = pl.second_moments(model, TEXTS, (1,))
    with pytest.raises(pl.MomentError, match="could not be written"):
        pl.export_moments(moments, tmp_path / "file", model, 7)
