"""Components built to copy, to negate and to turn what they read measure as just that."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kept import shared_model
from tiny import refused, tiny_config, tiny_model, tiny_tokenizer
from torch import Tensor

import pmet_lens as pl
from pmet_lens.evaluation import metrics
from pmet_lens.interp import similarity
from pmet_lens.interp.similarity import component_similarity, jaccard
from pmet_lens.models.activations import Activations
from pmet_lens.models.model import Model

torch.set_num_threads(1)
FACTS = [
    pl.Fact("Mira Tolan", "{} plays the sport of", target_true="tennis"),
    pl.Fact("Danel Orrin", "The mother tongue of {} is", target_true="French"),
    pl.Fact("Ilmar", "The tower of {} stands in the city of", target_true="Vell"),
]
UNIT = torch.eye(32, dtype=torch.float64)
TURN = torch.block_diag(*16 * [torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double()])  # x · xJ = 0
CELL = ["layer", "component", "position", "measure"]


@pytest.fixture(scope="module", autouse=True)
def few_resamples():
    """Intervals are tested in test_metrics; here they would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "pmet_lens.evaluation.intervals.bootstrap", partial(metrics.bootstrap, n_resamples=50)
        )
        yield


def writer(written: Tensor) -> Model:
    """A GPT-2 by hand whose attention and MLP both write `x @ written` where they read `x`.

    Its one head looks only at the token itself (q = k = 30 x, and normed vectors are longest
    along themselves); its MLP is gelu(x) − gelu(−x) = x.
    """
    from transformers import AutoModelForCausalLM

    config = tiny_config("gpt2")
    config.n_head = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf = AutoModelForCausalLM.from_config(config).double().eval()
    for block in hf.transformer.h:
        none = torch.zeros(32, 64, dtype=torch.float64)
        block.attn.c_attn.weight.data = torch.cat([30 * UNIT, 30 * UNIT, UNIT], dim=1)
        block.attn.c_proj.weight.data = written.clone()
        block.mlp.c_fc.weight.data = torch.cat([UNIT, -UNIT, none], dim=1)
        block.mlp.c_proj.weight.data = torch.cat([written, -written, none.T])
    return pl.load(hf, tiny_tokenizer(), name="by hand")


@pytest.mark.parametrize("vocabulary", ["embedding", "unembedding"])
@pytest.mark.parametrize("written, cosine", [(UNIT, 1), (-UNIT, -1), (TURN, 0)])
def test_components_built_by_hand(written, cosine, vocabulary):
    frame = component_similarity(writer(written), FACTS, layers=(0, 3), vocabulary=vocabulary)
    assert len(frame) == 2 * 2 * 2 * 2
    assert (frame["n"] == len(FACTS)).all()
    values = frame.groupby("measure")["mean"]
    assert values.get_group("cosine").to_numpy() == pytest.approx(cosine, abs=1e-6)
    jaccards = values.get_group("jaccard").to_numpy()
    if cosine:
        assert (jaccards == (1 if cosine == 1 else 0)).all()
    else:
        assert ((jaccards >= 0) & (jaccards < 0.5)).all()
        assert jaccards.any()


def planted(monkeypatch, n: int, same: tuple[tuple[str, str], ...]) -> None:
    """`probe` finds unrelated random vectors; at `same` (stream, position) one and the same."""
    generator = torch.Generator().manual_seed(0)

    def probe(_model, facts, streams, layers, positions) -> Activations:
        values = {
            (s, p): torch.randn(n, 1, 32, generator=generator) for s in streams for p in positions
        }
        for key in same[1:]:
            values[key] = values[same[0]]
        return Activations(values, tuple(facts), (2,), "planted")

    monkeypatch.setattr(similarity, "probe", probe)


def test_unrelated_vectors_have_nothing_in_common(monkeypatch):
    planted(monkeypatch, 400, ())
    frame = component_similarity(shared_model("gpt2"), FACTS[:1] * 400)
    means = frame.set_index(CELL)["mean"]
    assert means.xs("cosine", level="measure").abs().max() < 4 / (400 * 32) ** 0.5
    assert means.xs("jaccard", level="measure").max() < 0.2
    assert (frame["ci_low"] <= frame["mean"]).all()
    assert (frame["mean"] <= frame["ci_high"]).all()


@pytest.mark.parametrize("component, place", [("MHSA", "last"), ("FFN", "last_subject")])
def test_each_component_is_compared_with_its_own_input(monkeypatch, component, place):
    streams = {"MHSA": ("attn_in", "attn_added"), "FFN": ("mlp_in", "mlp_added")}[component]
    planted(monkeypatch, 3, tuple((s, place) for s in streams))
    means = component_similarity(shared_model("gpt2"), FACTS).set_index(CELL)["mean"]
    alike = means[means > 0.999].index.to_list()
    assert sorted(alike) == [(2, component, place, m) for m in ("cosine", "jaccard")]
    assert len(means) == 8


def test_jaccard_by_hand():
    one = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]])
    other = torch.tensor([[3, 1, 2], [4, 5, 6], [3, 4, 5], [2, 9, 1]])
    assert jaccard(one, other).tolist() == [1, 0, 1 / 5, 2 / 4]
    assert torch.equal(jaccard(other, one), jaccard(one, other))


def test_the_two_vocabularies_differ():
    model = tiny_model("gpt2")
    frames = [
        component_similarity(model, FACTS, layers=(1,), positions=("last",), vocabulary=v)
        for v in ("embedding", "unembedding")
    ]
    one, other = (f.set_index(CELL)["mean"].unstack("measure") for f in frames)
    assert (one["cosine"] == other["cosine"]).all()
    assert (one["jaccard"] != other["jaccard"]).any()
    with refused("unknown vocabulary 'words'; choose embedding or unembedding"):
        component_similarity(model, FACTS, vocabulary="words")
