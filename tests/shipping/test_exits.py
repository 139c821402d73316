"""One edit, three ways out, one answer; and what is written beside it."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from cases import bits, unchanged
from safetensors.torch import load_file, save_file
from small_gguf import written
from tiny import refused

import pmet_lens as pl
from pmet_lens.editing.edit_files import origin
from pmet_lens.shipping import cards, checkpoints, undoing

torch.set_num_threads(1)
FACTS = (
    pl.Fact("Mira Tolan", "{} plays the sport of", "rugby", "tennis"),
    pl.Fact("Ilmar", "The tower of {} stands in the city of", "Ostria"),
)
ASKED = [fact.text for fact in FACTS] + ["Danel Orrin, whose mother tongue is"]
SITES = (pl.Site(1, "attn"), pl.Site(2, "mlp"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return written(tmp_path_factory.mktemp("exits") / "small.gguf", "F32")


@pytest.fixture(scope="module")
def model(source) -> pl.Model:
    return pl.load(source)


@pytest.fixture(scope="module")
def edit(model) -> pl.Edit:
    """Of rank two at both kinds of site, strong, and without an optimisation."""
    generator = torch.Generator().manual_seed(0)
    how = {"generator": generator, "dtype": torch.float64}
    factors = {
        site: (torch.randn(model.d_in(site), 2, **how), torch.randn(2, model.d_model, **how))
        for site in SITES
    }
    made_on = origin(model, SITES)
    return pl.Edit(factors, model.dtype, FACTS, pl.PMET, pl.Hparams((1, 2)), ("{}",), **made_on)


def greedy(hf, tokenizer, prompt: str) -> str:
    """By plain transformers, and nothing of ours."""
    asked = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    out = hf.generate(**asked, max_new_tokens=6, do_sample=False)
    return tokenizer.decode(out[0, asked["input_ids"].shape[1] :])


def plain(directory):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = AutoModelForCausalLM.from_pretrained(directory)
    return hf.eval(), AutoTokenizer.from_pretrained(directory)


def test_one_edit_says_the_same_through_every_exit(model, edit, source, tmp_path):
    from peft import PeftModel

    before = bits(model)
    clean = [greedy(model.hf, model.tokenizer, prompt) for prompt in ASKED]
    with edit.applied(model):
        wanted = [greedy(model.hf, model.tokenizer, prompt) for prompt in ASKED]
    assert all(a != b for a, b in zip(wanted[:2], clean, strict=False))

    edit.save_model(model, tmp_path / "merged")
    edit.to_peft(tmp_path / "adapter")
    edit.save_gguf(source, tmp_path / "edited.gguf", "F32")
    assert unchanged(model, before)

    merged, tokenizer = plain(tmp_path / "merged")
    assert [greedy(merged, tokenizer, prompt) for prompt in ASKED] == wanted
    model.hf.save_pretrained(tmp_path / "base")
    model.tokenizer.save_pretrained(tmp_path / "base")
    base, tokenizer = plain(tmp_path / "base")
    served = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert [greedy(served, tokenizer, prompt) for prompt in ASKED] == wanted
    again = pl.load(tmp_path / "edited.gguf")
    assert [greedy(again.hf, again.tokenizer, prompt) for prompt in ASKED] == wanted


# -- the checkpoint -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_checkpoint_is_whole_and_of_the_same_dtype(source, edit, dtype, tmp_path):
    model = pl.load(source, dtype=str(dtype).removeprefix("torch."))
    model.hf.generation_config.repetition_penalty = 1.25
    small = {"max_shard_size": "40KB", "any_base": True}
    edit.save_model(model, tmp_path / "out", **small)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {*index["weight_map"].values()}
    assert len(files) > 1
    assert all((tmp_path / "out" / name).is_file() for name in files)
    merged, tokenizer = plain(tmp_path / "out")
    assert merged.dtype == dtype
    assert merged.generation_config.repetition_penalty == 1.25
    assert tokenizer.get_vocab() == model.tokenizer.get_vocab()
    with edit.applied(model):
        assert all(torch.equal(v, merged.state_dict()[k]) for k, v in model.hf.state_dict().items())


def test_only_this_edit_goes_into_the_checkpoint(model, edit, tmp_path):
    other = replace(edit, facts=edit.facts[:1])
    before = bits(model)
    with other.applied(model):
        edit.save_model(model, tmp_path / "out")
    assert unchanged(model, before)
    merged, _ = plain(tmp_path / "out")
    with edit.applied(model):
        assert unchanged(model, merged.state_dict())


@pytest.mark.parametrize("shards", ("5GB", "40KB"))
def test_a_checkpoint_is_taken_back(model, edit, shards, tmp_path):
    how = {"max_shard_size": shards}
    edit.save_model(model, tmp_path / "out", undoable=True, **how)
    assert len(undoing.restored(tmp_path / "out", tmp_path / "back")) == 2
    back, _ = plain(tmp_path / "back")
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in model.hf.state_dict().items())
    assert not (tmp_path / "back" / "README.md").exists()
    with refused("back is there already and not empty", pl.EditError):
        undoing.restored(tmp_path / "out", tmp_path / "back")
    changed = next((tmp_path / "out").glob("*.safetensors"))
    weights = {name: weight + 1 for name, weight in load_file(changed).items()}
    save_file(weights, changed, {"format": "pt"})
    if shards == "5GB":
        with refused("was changed since it was edited", pl.EditError):
            undoing.restored(tmp_path / "out", tmp_path / "other")
        assert not (tmp_path / "other").exists()


def test_a_checkpoint_is_refused_in_words(model, edit, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with refused("full is there already and not empty", pl.EditError):
        edit.save_model(model, tmp_path / "full")
    other = replace(edit, base=dict.fromkeys(edit.base, "00"))
    with refused("any_base=True", pl.EditError):
        other.save_model(model, tmp_path / "out")
    other.save_model(model, tmp_path / "out", any_base=True)
    (tmp_path / "file").write_text("")
    with refused("could not be written", pl.EditError):
        edit.save_model(model, tmp_path / "file" / "out")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoints, "write", full)
    before = bits(model)
    with refused("could not be written to .*no space left", pl.EditError):
        edit.save_model(model, tmp_path / "none")
    assert unchanged(model, before)
    assert {p.name for p in tmp_path.iterdir()} == {"full", "out", "file"}
    with refused("has no undo.safetensors", pl.EditError):
        undoing.restored(tmp_path / "out", tmp_path / "back")  # it was not asked for


# -- the card -------------------------------------------------------------------------------------


def test_the_card_tells_what_was_done(model, edit, source, tmp_path):
    import yaml

    receipt = edit.receipt(model)
    effects = {"Text": pl.general_ability(model, edit, texts=["One."], prompts=["A"], others=[])}
    edit.save_gguf(source, tmp_path / "out.gguf", receipt=receipt, effects=effects)
    text = (tmp_path / "out.gguf.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["base_model"] == "small"
    assert head["library_name"] == "gguf"
    assert "license" not in head
    said = int(receipt.facts["said"].sum())
    for words in (
        "2 facts of `small` changed",
        "| Mira Tolan plays the sport of | rugby | tennis |",
        "| settings | Hparams(layers=(1, 2)",
        f"{said} of 2 facts are answered as wanted",
        "### Text",
        "| perplexity |",
        "| blk.2.ffn\\_down.weight | 2.mlp | F32 | F32 |",
        "Licence of the base: not known: see the base model.",
        edit.base[pl.Site(2, "mlp")],
    ):
        assert words in text, words
    plain_card = cards.text(vars(edit), "A thing:", "peft")
    assert plain_card.count("Not measured.") == 2


def test_a_card_is_one_table_row_per_fact_up_to_a_number(edit):
    nasty = pl.Fact("a|b", "{} <b>is\nin_the", "*c*")
    many = {**vars(edit), "facts": (nasty,) * (cards.FACTS + 3)}
    text = cards.text(many, "A thing:", "peft")
    row = r"| a\|b \<b\>is in\_the | \*c\* |  |"
    assert text.count(row) == cards.FACTS
    assert "… and 3 more." in text


@pytest.mark.parametrize(
    ("name", "stated", "licence", "head"),
    [
        ("smollm2-135m", "", "Apache-2.0", "apache-2.0"),
        ("gemma-3-270m", "", "Gemma Terms of Use", "gemma"),
        ("world", "", "MIT", "mit"),
        ("somebody's", "cc-by-4.0", "cc-by-4.0", "cc-by-4.0"),
        ("somebody's", "", "not known: see the base model", None),
    ],
)
def test_the_licence_of_the_base(edit, name, stated, licence, head):
    import yaml

    text = cards.text({**vars(edit), "model": name}, "A thing:", "peft", stated=stated)
    assert f"Licence of the base: {licence}." in text
    assert yaml.safe_load(text.split("---")[1]).get("license") == head
    assert ("Prohibited Use Policy" in text) == name.startswith("gemma")


def test_a_card_of_somebody_else_is_left_alone(model, edit, tmp_path):
    folder = tmp_path / "adapter"
    edit.to_peft(folder)
    assert cards.MARK in (folder / "README.md").read_text()
    edit.to_peft(folder)  # ours is written again
    assert not (folder / "EDIT.md").exists()
    (folder / "README.md").write_text("mine")
    edit.to_peft(folder, receipt=edit.receipt(model, 1))
    assert (folder / "README.md").read_text() == "mine"
    text = (folder / "EDIT.md").read_text()
    assert re.search(r"of 1 facts are answered .* 1 more were not asked about", text)


def test_a_configuration_that_names_its_licence():
    class Config:
        license = "apache-2.0"

    class Holder:
        config = Config()

    assert cards.stated_by(Holder()) == "apache-2.0"
    assert cards.stated_by(object()) == ""
