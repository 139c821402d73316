"""A second moment is E[k kᵀ] over exactly the tokens of the texts, however they are batched."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_model

import pmet_lens as pl
from pmet_lens.adapter import Model, Site
from pmet_lens.moments import Moment, MomentError, load_moments, save_moments, second_moments

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
    return tiny_model(request.param, torch.float64)


@pytest.fixture(scope="module")
def gpt2() -> Model:
    return tiny_model("gpt2", torch.float64)


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
        second_moments(tiny_model("gpt2"), "The tower of Ilmar", [0])
