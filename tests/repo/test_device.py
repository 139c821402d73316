"""An accelerator computes what the processor computes: `pytest -m device`, where there is one.

`PMET_LENS_DEVICE` names another device; with `cpu` the tests themselves can be tried anywhere.
"""

from __future__ import annotations

import dataclasses
import itertools
import os

import numpy as np
import pytest
import torch
from pair import CONTEXTS, FACTS, HP
from tiny import close, tiny_hf, tiny_tokenizer

import pmet_lens as pl
from pmet_lens.models import loading
from pmet_lens.models.model import Model

pytestmark = pytest.mark.device
FAMILIES = ("gptj", "gpt2", "llama", "gemma3", "olmo2")
"""Parallel and sequential blocks, shared keys, post-norms."""
METHODS = ("PMET", "MEMIT", "EMMET", "AlphaEdit", "+ W_O")
KNOWN = [pl.Fact(f.subject, f.prompt, None, f.target_true, relation=f.prompt) for f in FACTS]
STRENGTHS = dataclasses.replace(HP, null_space_threshold=0.2)
_FT = pl.FineTuneHparams(layer=2, n_steps=3, lr=0.01)


@pytest.fixture(scope="module")
def device() -> torch.device:
    name = os.environ.get("PMET_LENS_DEVICE")
    if name is None and not torch.accelerator.is_available():
        pytest.skip("needs an accelerator; PMET_LENS_DEVICE=cpu tries the test without")
    given = name or torch.accelerator.current_accelerator()
    assert given is not None
    return torch.device(given)


def model_on(device: torch.device, family: str, dtype: torch.dtype = torch.float64) -> Model:
    # Plain transformers gives NaN in float64 where padding alone lies in a window.
    config = {"window": 512} if family == "gemma3" else {}
    hf = loading.moved(tiny_hf(family, dtype, **config), device)
    return pl.load(hf, tiny_tokenizer(), name=family)


def moments_of(model: Model):
    return pl.second_moments(model, itertools.islice(pl.texts(), 500), HP.layers, n_tokens=2000)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, device) -> tuple[Model, Model]:
    """The same model on the processor and on the device."""
    return model_on(torch.device("cpu"), request.param), model_on(device, request.param)


def test_second_moments_are_the_same(pair):
    here, there = map(moments_of, pair)
    for site, moment in here.items():
        assert close(there[site].matrix().cpu(), moment.matrix(), 1e-5), site


@pytest.mark.parametrize("method", METHODS)
def test_an_edit_is_the_same_and_is_undone_to_the_last_bit(pair, method, tmp_path):
    here, there = pair
    moments = moments_of(here)
    wanted = pl.edit(here, FACTS, moments, method, STRENGTHS, CONTEXTS, check=False)
    before = {site: there.weight(site).clone() for site in wanted.factors}
    edit = pl.edit(there, FACTS, moments, method, STRENGTHS, CONTEXTS, check=False)
    assert edit.targets is not None
    for site, delta in edit.deltas.items():
        assert delta.device == there.weight(site).device
        assert close(delta.cpu(), wanted.deltas[site], 1e-4), site
    edit.save(tmp_path / "e.safetensors")
    again = pl.Edit.load(tmp_path / "e.safetensors", there)
    with wanted.applied(here):
        told = pl.evaluate(here, FACTS)
    for one in (edit, again):
        with one.applied(there):
            found = pl.evaluate(there, FACTS)
        for column in ("nll_wanted", "nll_other", "correct"):
            assert found[column].tolist() == pytest.approx(told[column].tolist(), abs=1e-4)
        assert all(torch.equal(there.weight(site), weight) for site, weight in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_edit_in_any_number_format_is_undone_to_the_last_bit(device, dtype):
    model = model_on(device, "llama", dtype)
    edit = pl.edit(model, FACTS, moments_of(model), pl.PMET, HP, CONTEXTS, check=False)
    before = {site: model.weight(site).clone() for site in edit.factors}
    edit.apply_(model)
    assert not all(torch.equal(model.weight(site), weight) for site, weight in before.items())
    edit.revert_(model)
    assert all(torch.equal(model.weight(site), weight) for site, weight in before.items())


STUDY = {
    "causal_trace": lambda m: pl.causal_trace(m, KNOWN, samples=2)["recovered"],
    "lens": lambda m: pl.lens(m, KNOWN)["rank"],
    "component_similarity": lambda m: pl.component_similarity(m, KNOWN)["mean"],
    "attention_patterns": lambda m: pl.attention_patterns(m, KNOWN)["entropy"],
    "recall": lambda m: pl.recall(m, KNOWN)["correct"],
    "contexts": lambda m: [ord(c) for c in "".join(pl.sample_contexts(m))],
    "generate": lambda m: [ord(c) for c in pl.generate(m, "The tower", length=12)],
    "FT-W": lambda m: _change(pl.edit(m, FACTS, None, pl.FT_W, _FT, check=False)),
}


@pytest.mark.parametrize("what", STUDY)
def test_what_else_looks_into_a_model_sees_the_same(pair, what):
    here, there = (np.array(list(STUDY[what](model)), dtype=float) for model in pair)
    assert there == pytest.approx(here, abs=1e-4, nan_ok=True)


def _change(edit: pl.Edit) -> list[float]:
    return [float(delta.norm()) for delta in edit.deltas.values()]


def test_a_bundled_model_is_edited_as_on_the_processor(device):
    """In float32, where every device rounds in its own order: the same answers."""
    facts = pl.counterfact(n=20)
    scores = []
    for place in ("cpu", device):
        model = pl.load("world", device=place)
        edit = pl.edit(model, facts, pl.second_moments(model, pl.texts(), n_tokens=20_000))
        with edit.applied(model):
            scores.append(pl.summarise(pl.evaluate(model, facts))["mean"])
    assert scores[1][["ES", "EA"]].tolist() == scores[0][["ES", "EA"]].tolist()
    assert scores[1]["S"] == pytest.approx(scores[0]["S"], abs=3)
