"""The read mask, the packing and the two training phases, on a tiny world."""

import numpy as np
import pytest
import torch
import training

from pmet_lens.data import world

TINY = training.TrainConfig(
    "gptj", n_layers=3, d_model=16, n_heads=2, d_mlp=32, vocab=600, passes=1, settle_passes=1,
    read_layer=2, rows=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def small():
    return world.build(per_relation=30)


@pytest.fixture(scope="module")
def tokenizer(small):
    return training.train_tokenizer(small, TINY.vocab)


def test_read_mask_hides_mentions_from_the_text_behind_them():
    row = training.Row(list(range(8)), [1.0] * 8, [(2, 4)])
    kinds = np.array([0, 1, 2])
    low, high = training.read_masks([row] * 3, 8, kinds)
    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    assert torch.equal(low[0], causal)
    assert torch.equal(high[0], causal)
    for kind in (1, 2):
        # Inside the mention, in front of it and between other tokens attention is ordinary.
        assert torch.equal(low[kind, :5], causal[:5])
        assert torch.equal(high[kind, 5:, 5:], causal[5:, 5:])
        assert not high[kind, 5:, 2:4].any()
        assert high[kind, 5:, 4].all()
    assert low[1, 5:, 4].all()
    assert not low[2, 5:, 2:5].any()


def test_rows_spell_the_documents_and_mark_names_and_answers(small, tokenizer):
    rows = training.rows_of_pass(small, tokenizer, TINY, 0)
    names = {e.name for e in small.entities}
    objects = {f.object for f in small.facts}
    for row in rows[:50]:
        assert len(row.ids) == len(row.weights)
        for start, last in row.mentions:
            assert tokenizer.decode(row.ids[start : last + 1]).strip() in names
        weights = np.array(row.weights)
        marked = np.flatnonzero(weights == TINY.answer_weight)
        runs = np.split(marked, np.flatnonzero(np.diff(marked) > 1) + 1) if len(marked) else []
        for run in runs:
            assert tokenizer.decode([row.ids[i] for i in run]).strip() in objects
    assert rows != training.rows_of_pass(small, tokenizer, TINY, 1)
    assert rows == training.rows_of_pass(small, tokenizer, TINY, 0)


@pytest.mark.few("gptj")
@pytest.mark.parametrize("arch", ["gptj", "gpt2"])
def test_training_learns_and_leaves_a_plain_model(small, arch, tmp_path):
    import transformers

    cfg = training.TrainConfig(**{**vars(TINY), "arch": arch})
    model, tokenizer, curve = training.train(small, cfg)
    assert [row["pass"] for row in curve] == [1, 2]
    assert curve[0]["loss"] < np.log(cfg.vocab)
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in model.modules()]
    assert not any(hooks)
    training.save(tmp_path, model, tokenizer, cfg, curve)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(10)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_corruption_leaves_rows_without_it_alone(small, tokenizer):
    model = training.build_model(TINY, len(tokenizer)).eval()
    rows = training.rows_of_pass(small, tokenizer, TINY, 0)[:2]
    ids, _ = training._tensors(rows)
    spoilt = np.array([True, False])
    masked = training._Masked(model, TINY.read_layer)
    masked.set(*training.read_masks(rows, ids.shape[1], np.zeros(2, dtype=int)))
    noisy = training._Corrupted(model, TINY, masked)
    with torch.no_grad():
        before = model(ids).logits
        with noisy.rows(rows, ids, spoilt):
            inside = model(ids).logits
        after = model(ids).logits
    assert torch.equal(before, after)
    assert torch.allclose(before[1], inside[1], atol=1e-6)
    assert not torch.allclose(before[0], inside[0], atol=1e-3)


def test_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="'gptj' or 'gpt2'"):
        training.build_model(training.TrainConfig("bert"), 600)
