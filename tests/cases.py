"""Three facts, the strengths that edit them on a tiny model, and what a test asks of an edit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import pmet_lens as pl
from pmet_lens.editing import keys
from pmet_lens.editing.locate_and_edit import Edit
from pmet_lens.models.model import Model, Site
from pmet_lens.models.tail import Tail

FACTS = [
    pl.Fact("Mira Tolan", "{} plays the sport of", "rugby", "tennis", neighbours=(("A", "b"),)),
    pl.Fact("Danel Orrin", "The mother tongue of {} is", "Dutch", "French", case_id=7),
    pl.Fact("Ilmar", "The tower of {} stands in the city of", "Ostria", paraphrases=("x", "y")),
]
CONTEXTS = ["{}", "The city is. {}"]
HP = pl.Hparams(layers=(1, 2), n_steps=2, clamp=4.0, second_moment_weight=1.0)
BOTH = pl.ABLATIONS["+ W_O"]
SITES = [Site(layer, projection) for layer in (1, 2) for projection in ("attn", "mlp")]


def some_moments(model: Model) -> dict[Site, torch.Tensor]:
    """A well-conditioned second moment for every site: what they hold does not matter here."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for site in SITES:
        size = model.d_in(site)
        text = torch.randn(4 * size, size, generator=generator, dtype=torch.float64)
        found[site] = text.T @ text / len(text)
    return found


def left_over(
    model: Model, facts: list[pl.Fact], moments: dict[Site, torch.Tensor], way: pl.Method, hp
) -> float:
    """Of what the targets asked for at the last critical layer, the share that the written model
    lacks; the largest of its streams."""
    layer = hp.layers[-1]
    targets = pl.optimise(model, facts, way, hp, ["{}"])
    reader = keys.Reader(model, facts)
    wanted = keys.wanted(reader, targets, way)
    before = {s: reader.values(layer, s) for s in wanted}
    with pl.edit(model, facts, moments, way, hp, ["{}"], targets).applied(model):
        reader = keys.Reader(model, facts)
        after = {s: reader.values(layer, s) for s in wanted}
    return max(float((v - after[s]).norm() / (v - before[s]).norm()) for s, v in wanted.items())


def bits(model: Model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}


def unchanged(model: Model, before: dict[str, torch.Tensor]) -> bool:
    now = model.hf.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in now)


def same_deltas(one: Edit, other: Edit) -> bool:
    assert list(one.deltas) == list(other.deltas)
    return all(torch.equal(one.deltas[site], other.deltas[site]) for site in one.deltas)


def delta(factor, K, R):
    """The weight change that a solver's factor gives for keys and residuals."""
    left, right = factor.factors(K, R)
    return left @ right


def nll_of(model: Model, text: str, target: str) -> float:
    """Mean −log P per target token, from the user's own model and nothing of ours."""
    prompt = model.tokenizer(text)["input_ids"]
    answer = model.tokenizer(f"{text} {target}")["input_ids"][len(prompt) :]
    with torch.no_grad():
        logits = model.hf(input_ids=torch.tensor([prompt + answer])).logits[0]
    logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return -float(logp[range(len(answer)), answer].mean())


@pytest.fixture(scope="module", autouse=True)
def one_tail() -> Iterator[None]:
    """The shortened model, which shares the weights, is made once for all tests of a model."""
    kept: dict[tuple[Model, int], Tail] = {}
    real = Model.from_layer

    def from_layer(self: Model, first: int) -> Tail:
        if (self, first) not in kept:
            kept[self, first] = real(self, first)
        return kept[self, first]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "from_layer", from_layer)
        yield
