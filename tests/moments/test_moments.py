"""A second moment is E[k kᵀ] over exactly the tokens of the texts, however they are batched."""

from __future__ import annotations

import itertools

import pytest
import torch
from kept import shared_model
from safetensors.torch import save_file
from tiny import tiny_model

import pmet_lens as pl
from pmet_lens.models.model import Model, Site
from pmet_lens.moments.moment import SiteSum
from pmet_lens.moments.moment_files import load_moments, save_moments
from pmet_lens.moments.second_moments import Moment, MomentError, second_moments

torch.set_num_threads(1)
TEXTS = (
    "Mira Tolan plays the sport of tennis.",
    "Kel",
    "The tower of Ilmar stands in the harbour city of Vell.",
    "x y",
    "The mother tongue of Danel Orrin is French.",
)
TIGHT = 1e-12


@pytest.fixture(scope="module", params=["gpt2", "gptj", "llama"])
def model(request) -> Model:
    return shared_model(request.param, torch.float64)


@pytest.fixture(scope="module")
def gpt2() -> Model:
    return shared_model("gpt2", torch.float64)


def off(got: Moment, want) -> float:
    return float((got.value - want).abs().max() / want.abs().max())


def keys_of(model: Model, text: str, site: Site, length: int = 128):
    """The keys of all tokens of one text, by a forward pass of its own."""
    ids = torch.tensor([model.tokenizer(text)["input_ids"][:length]])
    kept = []
    with torch.no_grad():
        model.forward(ids, torch.ones_like(ids), hooks=[(model.key_hook(site), kept.append)])
    return kept[0][0]


def naive(model: Model, texts, site: Site, length: int = 128):
    keys = torch.cat([keys_of(model, text, site, length) for text in texts]).double()
    return sum(torch.outer(k, k) for k in keys) / len(keys), len(keys)


# -- the value ------------------------------------------------------------------------------------


def test_it_is_the_mean_outer_product_of_the_keys(model):
    found = second_moments(model, TEXTS, [2, 0])
    # The families that compute parts in float32 round differently in batches of another shape.
    tolerance = TIGHT if model.name == "gpt2" else 1e-6
    assert list(found) == [Site(n, p) for n in (0, 2) for p in ("attn", "mlp")]
    for site, moment in found.items():
        value, count = naive(model, TEXTS, site)
        assert moment.count == count
        assert off(moment, value) < tolerance
        assert off(moment, naive(model, TEXTS[:-1], site)[0]) > 1e-3
        assert off(moment, moment.value.T) < TIGHT
        assert torch.linalg.eigvalsh(moment.value).min() > -TIGHT


def test_only_what_is_asked_for_is_collected(gpt2):
    assert set(second_moments(gpt2, TEXTS, [1], projections=["mlp"])) == {Site(1, "mlp")}
    assert set(second_moments(gpt2, TEXTS, (3, 1, 3))) == {
        Site(n, p) for n in (1, 3) for p in ("attn", "mlp")
    }


def test_layers_are_those_of_the_models_settings(gpt2, monkeypatch):
    monkeypatch.setattr(gpt2, "name", "planted")
    monkeypatch.setitem(pl.HPARAMS, "planted", {"PMET": pl.Hparams(layers=(1, 2))})
    assert {site.layer for site in second_moments(gpt2, TEXTS)} == {1, 2}


@pytest.mark.parametrize("batch_tokens", [1, 7, 40, 10_000])
def test_neither_batches_nor_order_matter(gpt2, batch_tokens):
    site = Site(1, "mlp")
    value, count = naive(gpt2, TEXTS, site)
    for order in (TEXTS, TEXTS[::-1]):
        found = second_moments(gpt2, order, [1], batch_tokens=batch_tokens)[site]
        assert found.count == count
        assert off(found, value) < TIGHT


def test_samples_can_be_merged(gpt2):
    whole = second_moments(gpt2, TEXTS, [1])
    parts = [second_moments(gpt2, texts, [1]) for texts in (TEXTS[:2], TEXTS[2:])]
    for site, moment in whole.items():
        merged = parts[0][site] + parts[1][site]
        assert merged.count == moment.count
        assert off(merged, moment.value) < TIGHT
        assert off(parts[1][site] + parts[0][site], merged.value) < TIGHT
        unweighted = (parts[0][site].value + parts[1][site].value) / 2
        assert off(moment, unweighted) > 1e-3  # the samples differ in size


def test_text_may_be_endless_and_the_budget_is_kept_to_the_token(gpt2):
    site = Site(0, "mlp")
    lengths = [len(gpt2.tokenizer(text)["input_ids"]) for text in TEXTS]
    for n in (1, lengths[0], lengths[0] + 1, sum(lengths), 3 * sum(lengths) + 5):
        for batch_tokens in (16, 2048):
            found = second_moments(
                gpt2, itertools.cycle(TEXTS), [0], n_tokens=n, batch_tokens=batch_tokens
            )
            assert found[site].count == n
    # The tokens are the first ones of the stream, the last text cut.
    n = lengths[0] + 5
    keys = [keys_of(gpt2, TEXTS[0], site)]
    keys.append(keys_of(gpt2, "Kel", site))
    keys.append(keys_of(gpt2, TEXTS[2], site, n - lengths[0] - lengths[1]))
    first = torch.cat(keys)
    found = second_moments(gpt2, TEXTS, [0], n_tokens=n)[site]
    assert off(found, first.T @ first / n) < TIGHT


def test_no_budget_takes_all_and_a_larger_one_what_there_is(gpt2):
    site = Site(0, "mlp")
    for n in (None, 10**6):
        assert (
            second_moments(gpt2, TEXTS, [0], n_tokens=n)[site].count == naive(gpt2, TEXTS, site)[1]
        )


def test_long_texts_are_cut(gpt2):
    site, long = Site(1, "mlp"), "the tower of Ilmar " * 20
    value, count = naive(gpt2, [long], site, 9)
    found = second_moments(gpt2, [long], [1], max_length=9)[site]
    assert (found.count, count) == (9, 9)
    assert off(found, value) < TIGHT
    assert second_moments(gpt2, [long], [1])[site].count == gpt2.n_positions


def test_progress_is_told(gpt2):
    told = []
    second_moments(
        gpt2, TEXTS, [0], n_tokens=30, batch_tokens=8, on_tokens=lambda *args: told.append(args)
    )
    assert [total for _, total in told] == [30] * len(told)
    done = [n for n, _ in told]
    assert len(done) > 1
    assert done == sorted(set(done))
    assert done[-1] == 30


# -- files ----------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(gpt2, tmp_path):
    path = tmp_path / "moments.safetensors"
    moments = second_moments(gpt2, TEXTS, [0, 2])
    save_moments(moments, path, gpt2.name)
    loaded = load_moments(path)
    assert list(loaded) == list(moments)
    for site, moment in moments.items():
        assert loaded[site].count == moment.count
        assert torch.equal(loaded[site].total, moment.total)


def test_files_that_hold_no_moments_are_refused(gpt2, tmp_path):
    path = tmp_path / "moments.safetensors"
    save_moments(second_moments(gpt2, TEXTS, [0]), path)
    whole = path.read_bytes()
    for kept in (0, 5, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(MomentError, match=r"moments\.safetensors cannot be read as second"):
            load_moments(path)
    path.write_bytes(b"not a safetensors file at all")
    with pytest.raises(MomentError, match=r"cannot be read as second moments"):
        load_moments(path)
    with pytest.raises(MomentError, match=r"nowhere.* cannot be read"):
        load_moments(tmp_path / "nowhere")
    for metadata in (None, {"pmet_lens": '{"format": "another 1"}'}):
        save_file({"0.mlp": torch.eye(2)}, path, metadata)
        with pytest.raises(MomentError, match="not second moments saved by pmet_lens"):
            load_moments(path)


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_texts_without_a_token_are_refused(gpt2, texts):
    with pytest.raises(MomentError, match="hold no token; pass an iterable of non-empty strings"):
        second_moments(gpt2, texts, [0])


@pytest.mark.parametrize("neuron", [0, 5])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_keys_that_are_not_finite_are_refused(neuron, value):
    broken = tiny_model("gpt2", torch.float64)
    broken.hf.transformer.h[1].mlp.c_fc.bias.data[neuron] = value
    assert second_moments(broken, TEXTS, [0])
    with pytest.raises(MomentError, match=r"keys at site 1\.mlp are not finite"):
        second_moments(broken, TEXTS, [0, 1])


def test_layers_that_do_not_exist_are_refused(gpt2):
    with pytest.raises(pl.ModelError, match="layers 0 to 3"):
        second_moments(gpt2, TEXTS, [4])


def test_one_string_is_not_read_letter_by_letter():
    with pytest.raises(MomentError, match="one string"):
        second_moments(shared_model("gpt2"), "The tower of Ilmar", [0])


# -- how good it is -------------------------------------------------------------------------------


def noise(n: int, d: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.1, 2, d, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * scale


def sampled(keys: torch.Tensor, shard: int) -> Moment:
    """The moment of keys that come in shards of `shard` tokens."""
    total = SiteSum(Site(0, "mlp"), keys.shape[1], torch.float64, keys.device)
    for rows in keys.split(shard):
        total.add(rows)
        total.end_shard(len(rows))
    return total.moment(128)


def test_the_error_told_is_the_error_there_is():
    """Over many samples of known keys the mean estimate meets the mean distance to the truth."""
    d, n = 20, 400
    truth = torch.diag(torch.linspace(0.1, 2, d, dtype=torch.float64) ** 2)
    found = [sampled(noise(n, d, seed), 20) for seed in range(60)]
    real = sum(float((m.value - truth).norm() / truth.norm()) ** 2 for m in found) / len(found)
    told = sum(m.error**2 for m in found) / len(found)
    assert told == pytest.approx(real, rel=0.15)
    # A quarter of the error in sixteen times the text, also where samples are merged.
    longer = sum((sampled(noise(n, d, 100 + i), 20) for i in range(16)), start=found[0])
    assert longer.error == pytest.approx(found[0].error / 17**0.5, rel=0.3)
    assert longer.shards == 17 * found[0].shards


def test_texts_of_one_piece_have_no_known_error(gpt2):
    site = Site(1, "mlp")
    assert second_moments(gpt2, TEXTS, [1])[site].error != pytest.approx(0)
    assert torch.tensor(second_moments(gpt2, TEXTS, [1])[site].error).isnan()
    many = second_moments(gpt2, TEXTS * 4, [1], batch_tokens=8)[site]
    assert many.shards > 4
    assert 0 < many.error < 1
    assert torch.tensor((many + Moment(many.total, many.count)).error).isnan()


def test_reading_stops_when_it_is_good_enough(gpt2):
    stream = itertools.cycle(TEXTS)
    many = second_moments(gpt2, stream, [1], n_tokens=2000, batch_tokens=16)
    wanted = 4 * max(m.error for m in many.values())
    fewer = second_moments(
        gpt2, itertools.cycle(TEXTS), [1], n_tokens=2000, batch_tokens=16, precision=wanted
    )
    counts = {m.count for m in fewer.values()}
    assert len(counts) == 1
    assert 64 <= counts.pop() < 2000
    assert max(m.error for m in fewer.values()) == pytest.approx(wanted, rel=0.5)
    with pytest.raises(MomentError, match="precision must be greater than 0"):
        second_moments(gpt2, TEXTS, [1], precision=0.0)


def test_sums_may_be_of_single_precision(gpt2):
    exact = second_moments(gpt2, TEXTS, [1])
    single = second_moments(gpt2, TEXTS, [1], dtype=torch.float32)
    for site, moment in single.items():
        assert (moment.total.dtype, exact[site].total.dtype) == (torch.float32, torch.float64)
        assert 0 < off(moment, exact[site].value.float()) < 1e-5
    with pytest.raises(MomentError, match="float32 or float64"):
        second_moments(gpt2, TEXTS, [1], dtype=torch.float16)


# -- on disk --------------------------------------------------------------------------------------


def test_a_file_keeps_what_a_moment_knows(gpt2, tmp_path):
    path = tmp_path / "m.safetensors"
    moments = second_moments(gpt2, TEXTS * 4, [1], batch_tokens=8, max_length=9)
    save_moments(moments, path)
    for site, loaded in load_moments(path).items():
        own = moments[site]
        assert loaded.max_length == own.max_length == 9
        assert (loaded.shards, loaded.error) == (own.shards, own.error)


def test_moments_on_disk_are_read_by_site_and_keep_their_factor(gpt2, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    site = Site(1, "mlp")
    keys = noise(600, gpt2.d_in(site), 3)
    moments = {site: Moment(keys.T @ keys, 600), Site(2, "mlp"): Moment(2 * keys.T @ keys, 600)}
    save_moments(moments, path)
    stored = pl.open_moments(path)
    assert set(stored) == set(moments)
    assert stored[site].shape == (len(keys.T), len(keys.T))
    assert not list(tmp_path.glob("*.factor.*"))
    assert torch.equal(stored[site].matrix(), moments[site].value)
    first = stored[site].cholesky()
    assert [p.name for p in tmp_path.glob("*.factor.*")] == ["m.1.mlp.factor.safetensors"]
    assert torch.equal(first, moments[site].cholesky())

    def fails(_):
        raise AssertionError("computed a second time")

    with monkeypatch.context() as patch:
        patch.setattr("pmet_lens.editing.solvers.cholesky", fails)
        assert torch.equal(pl.open_moments(path)[site].cholesky(), first)
    # The factor of another moment under the same name is not taken for this one's.
    save_moments({site: Moment(3 * keys.T @ keys, 600)}, path)
    third = pl.open_moments(path)[site].cholesky()
    assert torch.allclose(third, 3**0.5 * first)
    with pytest.raises(MomentError, match="cannot be read"):
        pl.open_moments(tmp_path / "nowhere")


def test_a_factor_that_cannot_be_kept_is_used_all_the_same(gpt2, tmp_path, monkeypatch):
    path, site = tmp_path / "m.safetensors", Site(1, "mlp")
    keys = noise(600, gpt2.d_in(site), 3)
    moment = Moment(keys.T @ keys, 600)
    save_moments({site: moment}, path)

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("pmet_lens.data.file_format.save_file", full)
    with pytest.warns(UserWarning, match=r"No space left.*next edit computes it again"):
        assert torch.equal(pl.open_moments(path)[site].cholesky(), moment.cholesky())


def test_an_edit_from_disk_is_that_from_memory(gpt2, tmp_path):
    site, path = Site(1, "mlp"), tmp_path / "m.safetensors"
    keys = noise(600, gpt2.d_in(site), 3)
    moments = {site: Moment(keys.T @ keys, 600)}
    save_moments(moments, path)
    facts = [pl.Fact("Mira Tolan", "{} plays the sport of", "rugby", "tennis")]
    hp = pl.Hparams(layers=(1,), n_steps=3)
    for method in (pl.PMET, pl.EMMET, pl.ALPHAEDIT):
        settings = {"null_space_threshold": 1e9} if method is pl.ALPHAEDIT else {}
        own = pl.Hparams(layers=hp.layers, n_steps=hp.n_steps, **settings)
        wanted = pl.edit(gpt2, facts, moments, method, own, ["{}"])
        for _ in range(2):
            found = pl.edit(gpt2, facts, pl.open_moments(path), method, own, ["{}"])
            difference = (found.deltas[site] - wanted.deltas[site]).abs().max()
            assert difference <= 1e-9 * wanted.deltas[site].abs().max()
    wrong = {site: Moment(torch.eye(5, dtype=torch.float64), 5)}
    save_moments(wrong, path)
    with pytest.raises(pl.SettingsError, match="belongs to another model"):
        pl.edit(gpt2, facts, pl.open_moments(path), pl.PMET, hp, ["{}"])
