"""A model spread over two devices, as `device_map` spreads it: same numbers, nothing mixed up.

The second device is a pretended one (`pretend.py`): what would fail on two accelerators because
tensors lie apart fails here, too.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from pair import CONTEXTS, FACTS, HP
from pretend import OTHER, Remote, WrongDevice, move, second_device
from tiny import close, tiny_hf, tiny_tokenizer

import pmet_lens as pl
from pmet_lens.models.model import Model

torch.set_num_threads(1)
BOTH = pl.ABLATIONS["+ W_O"]
KNOWN = [pl.Fact(f.subject, f.prompt, None, f.target_true, relation=f.prompt) for f in FACTS]
_FT = pl.FineTuneHparams(layer=2, n_steps=3, lr=0.01)
BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers", "gptj": "transformer.h"}
"""Sequential blocks, sequential ones with rotary positions and shared keys, and parallel ones."""


NORMS = {"gpt2": "transformer.ln_f", "llama": "model.norm", "gptj": "transformer.ln_f"}


@pytest.fixture(params=BLOCKS)
def family(request) -> str:
    return request.param


def model_of(family: str, split: bool) -> Model:
    """The same model on one device, or with its upper half on the other."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    hf = tiny_hf(family, torch.float64)
    hf.config._attn_implementation = "eager"  # fused attention asks what kind of device it is on
    if split:
        blocks = list(hf.get_submodule(BLOCKS[family]))
        upper = [*blocks[2:], hf.get_submodule(NORMS[family])]
        for module in upper:
            move(module)
        # As accelerate's dispatch_model does: inputs follow the weights of what they enter.
        for module in [*blocks, upper[-1], hf.lm_head]:
            on = next(module.parameters()).device
            add_hook_to_module(module, AlignDevicesHook(execution_device=on))
    return pl.load(hf, tiny_tokenizer(), name=family)


def moments_of(model: Model):
    return pl.second_moments(model, itertools.islice(pl.texts(), 500), HP.layers, n_tokens=1000)


def held(value: torch.Tensor) -> torch.Tensor:
    return value.held if isinstance(value, Remote) else value


@pytest.mark.few("gptj")
def test_an_edit_over_two_devices_is_the_edit_of_one(family, tmp_path):
    one = model_of(family, split=False)
    wanted = pl.edit(one, FACTS, moments_of(one), BOTH, HP, CONTEXTS)
    with wanted.applied(one):
        told = pl.evaluate(one, FACTS)
    with second_device():
        model = model_of(family, split=True)
        weights = {site: model.weight(site) for site in wanted.factors}
        assert {w.device for w in weights.values()} == {torch.device("cpu"), OTHER}
        before = {site: held(w).clone() for site, w in weights.items()}
        edit = pl.edit(model, FACTS, moments_of(model), BOTH, HP, CONTEXTS)
        for site, delta in edit.deltas.items():
            assert delta.device == weights[site].device
            assert close(held(delta), wanted.deltas[site], 1e-9), site
        edit.save(tmp_path / "e.safetensors")
        again = pl.Edit.load(tmp_path / "e.safetensors", model)
        for one_of in (edit, again):
            with one_of.applied(model):
                found = pl.evaluate(model, FACTS)
                for column in ("nll_wanted", "nll_other", "correct"):
                    assert found[column].tolist() == pytest.approx(told[column].tolist(), abs=1e-9)
            for site, weight in weights.items():
                assert torch.equal(held(weight), before[site])


STUDY = {
    "causal_trace": lambda m: pl.causal_trace(m, KNOWN, samples=2)["recovered"],
    "lens": lambda m: pl.lens(m, KNOWN)["rank"],
    "component_similarity": lambda m: pl.component_similarity(m, KNOWN)["mean"],
    "attention_patterns": lambda m: pl.attention_patterns(m, KNOWN)["entropy"],
    "answer_gain": lambda m: _gain(m),
    "FT": lambda m: _change(pl.edit(m, FACTS, None, pl.FT_W, _FT)),
    "generate": lambda m: [float(ord(c)) for c in pl.generate(m, "The tower", length=12)],
}


@pytest.mark.few("lens", "generate")
@pytest.mark.parametrize("name", STUDY)
def test_what_else_looks_into_a_model_gives_the_same_over_two_devices(name):
    wanted = list(STUDY[name](model_of("gpt2", split=False)))
    with second_device():
        found = list(STUDY[name](model_of("gpt2", split=True)))
    assert found == pytest.approx(wanted, abs=1e-8, nan_ok=True)


def _change(edit: pl.Edit) -> list[float]:
    return [float(held(delta).norm()) for delta in edit.deltas.values()]


def _gain(model: Model) -> list[float]:
    targets = pl.optimise(model, FACTS, pl.PMET, HP, CONTEXTS)
    frame = pl.answer_gain(model, FACTS, targets)
    return frame.select_dtypes("number").to_numpy().ravel().tolist()


def test_the_pretended_device_refuses_what_a_real_one_would():
    with second_device() as other:
        there, here = torch.ones(3).to(other), torch.ones(3)
        with pytest.raises(WrongDevice, match="add"):
            there + here
        assert isinstance(torch.tensor([1.0], device=other), Remote)
        assert float((there + here.to(other)).cpu().sum()) == 6
