"""Agreement with numbers computed by the released PMET and MEMIT code (see golden/README.md).

`gpt2` (sequential blocks, Conv1D weights) is held to 1e-10 on targets and 1e-6 on deltas (the
released code passes written updates through float32), `gptj` to 1e-3 (its attention computes in
float32 inside, and the optimisation amplifies that).
"""

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file

import pmet_lens as pl
from pmet_lens.editing import keys as keys_module

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = {"gpt2": (1e-10, 1e-6), "gptj": (1e-3, 1e-3)}
CASES = [(m, s) for m in ("gpt2", "gptj") for s in ("paper_like", "loose", "eased")]
MODULE = {"mlp": "mlp", "attn": "attn"}


@lru_cache
def golden(arch):
    record = json.loads((GOLDEN / f"{arch}.json").read_text())
    tensors = load_file(GOLDEN / f"{arch}.safetensors")
    config = transformers.AutoConfig.for_model(**record["config"])
    hf = transformers.AutoModelForCausalLM.from_config(config).double()
    state = {k[len("model.") :]: v for k, v in tensors.items() if k.startswith("model.")}
    missing, _unexpected = hf.load_state_dict(state, strict=False)
    assert not [k for k in missing if not k.endswith((".bias", ".masked_bias"))], missing
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(GOLDEN / "tokenizer")
    model = pl.load(hf, tokenizer, name=f"golden-{arch}")
    facts = [
        pl.Fact(r["subject"], r["prompt"], r["target_new"]["str"], r["target_true"]["str"])
        for r in record["requests"]
    ]
    return record, tensors, model, facts


def module(record, site):
    return record["module_names"][MODULE[site.projection]].format(site.layer)


def moments_of(record, tensors, layers):
    sites = [pl.Site(n, p) for n in layers for p in ("attn", "mlp")]
    return {s: tensors[f"cov.{module(record, s)}"] for s in sites}


def settings(record, name, memit=False):
    s = record["settings"][name]
    hp = pl.Hparams(
        layers=tuple(s["layers"]),
        n_steps=s["v_num_grad_steps"],
        lr=s["v_lr"],
        weight_decay=s["v_weight_decay"],
        clamp=s["clamp_norm_factor"],
        kl_weight=s["kl_factor"],
        nll_weight=s["nll_loss_factor"],
        second_moment_weight=s["mom2_update_weight"],
    )
    return replace(hp, kl_weight=record["memit_kl_factor"], easing=1.0) if memit else hp


def contexts_of(record):
    return [c for group in record["contexts"] for c in group]


def relative(got, want):
    return float((got - want).abs().max() / want.abs().max())


@lru_cache
def run(arch, name, method_name):
    record, tensors, model, facts = golden(arch)
    method = {"both": pl.ABLATIONS["+ W_O"], "PMET": pl.PMET, "MEMIT": pl.MEMIT}[method_name]
    hp = settings(record, name, memit=method_name == "MEMIT")
    moments = moments_of(record, tensors, hp.layers)
    seen = {}
    original = keys_module.Reader.keys

    def spy(reader, site):
        seen[site] = original(reader, site)
        return seen[site]

    keys_module.Reader.keys = spy
    try:
        edit = pl.edit(model, facts, moments, method, hp, contexts_of(record))
    finally:
        keys_module.Reader.keys = original
    return edit, seen


def delta_in_row_convention(record, tensors, model, prefix, site):
    want = tensors[f"{prefix}.delta.{module(record, site)}.weight"]
    stored = model.parameter(site)
    is_row = (
        stored.shape == model.weight(site).shape and stored.stride() == model.weight(site).stride()
    )
    if ".memit" in prefix or site.projection == "mlp":
        return want if want.shape == model.weight(site).shape else want.T
    return want if is_row else want.T


@pytest.mark.few("*-paper_like")
@pytest.mark.parametrize(("arch", "name"), CASES)
def test_pmet_targets(arch, name):
    _record, tensors, _model, _ = golden(arch)
    targets = run(arch, name, "PMET")[0].targets
    for stream, key in (("attn_out", "z_attn"), ("mlp_out", "z_mlp")):
        error = relative(targets.values[stream], tensors[f"{name}.pmet.{key}"])
        assert error < TOLERANCE[arch][0], (stream, error)


@pytest.mark.few("*-paper_like")
@pytest.mark.parametrize(("arch", "name"), CASES)
def test_memit_targets(arch, name):
    _record, tensors, _model, _ = golden(arch)
    targets = run(arch, name, "MEMIT")[0].targets
    assert relative(targets.values["resid_post"], tensors[f"{name}.memit.z"]) < TOLERANCE[arch][0]


@pytest.mark.few("*-paper_like", "gpt2-loose")
@pytest.mark.parametrize(("arch", "name"), CASES)
def test_keys(arch, name):
    record, tensors, _, _ = golden(arch)
    for site, keys in run(arch, name, "PMET")[1].items():
        want = tensors[f"{name}.pmet.keys.{module(record, site)}"]
        assert relative(keys, want) < TOLERANCE[arch][1], site


@pytest.mark.few("*-paper_like-*", "gpt2-loose-PMET", "gptj-eased-MEMIT")
@pytest.mark.parametrize("method", ["PMET", "MEMIT", "both"])
@pytest.mark.parametrize(("arch", "name"), CASES)
def test_deltas(arch, name, method):
    if method == "both" and arch == "gpt2":
        pytest.skip("the released code adds the square W_O update of Conv1D models untransposed")
    record, tensors, model, _ = golden(arch)
    prefix = f"{name}.{ {'PMET': 'pmet', 'MEMIT': 'memit', 'both': 'pmet_both'}[method] }"
    edit, _ = run(arch, name, method)
    for site, delta in edit.deltas.items():
        want = delta_in_row_convention(record, tensors, model, prefix, site)
        assert relative(delta, want) < TOLERANCE[arch][1], site


@pytest.mark.parametrize("arch", ["gpt2", "gptj"])
def test_second_moments(arch):
    record, tensors, model, _ = golden(arch)
    ids = tensors["cov_input_ids"]
    layers = record["settings"]["loose"]["layers"]

    class Ready:
        """Stands in for a tokenizer: the texts are row numbers of the ids."""

        pad_token_id = 0

        def __call__(self, text):
            return {"input_ids": ids[int(text)].tolist()}

    tokenizer, model.tokenizer = model.tokenizer, Ready()
    try:
        moments = pl.second_moments(model, map(str, range(len(ids))), layers, batch_tokens=200)
    finally:
        model.tokenizer = tokenizer
    for site, moment in moments.items():
        want = tensors[f"cov.{module(record, site)}"]
        assert moment.count == ids.numel()
        assert relative(moment.value, want) < (1e-10 if arch == "gpt2" else 1e-6), site
