"""Published records become facts, bundled ones take the same way, and bad ones are named."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import random

import jaxtyping
import pytest
import torch
from kept import bundled
from tiny import tiny_model

from pmet_lens.data import world
from pmet_lens.data.datasets import DataError, counterfact, knowns, texts, zsre
from pmet_lens.data.fact_tables import read_facts
from pmet_lens.data.facts import Fact, FactError, check_editable
from pmet_lens.models.tokens import Prompt, encode

torch.set_num_threads(1)

COUNTERFACT = {
    "case_id": 20952,
    "pararel_idx": 5151,
    "requested_rewrite": {
        "prompt": "{} is located in",
        "relation_id": "P30",
        "target_new": {"str": "Antarctica", "id": "Q51"},
        "target_true": {"str": "Africa", "id": "Q15"},
        "subject": "Angola",
    },
    "paraphrase_prompts": ["Last updated on 4 February. Angola is a part of"],
    "neighborhood_prompts": ["Ghana is in", "Côte d'Ivoire is located in"],
    "attribute_prompts": ["Ross Island is located in"],
    "generation_prompts": ["People around Angola speak the language of"],
}
ZSRE = {
    "subject": "Call the Doctor",
    "src": "What artist created Call the Doctor?",
    "pred": "Riders in the Sky",
    "rephrase": "Which artist created Call the Doctor?",
    "alt": "The X-Files",
    "answers": ["Sleater-Kinney"],
    "loc": "nq question: who sang the theme song",
    "loc_ans": "Tina",
    "cond": "Riders in the Sky >> The X-Files || What artist created Call the Doctor?",
}
KNOWN = {
    "known_id": 7,
    "subject": "Vinson Massif",
    "attribute": "Antarctica",
    "template": "{} is located in the continent",
    "prediction": " of Antarctica. It is the largest",
    "prompt": "Vinson Massif is located in the continent of",
    "relation_id": "P30",
}
LOADERS = {
    "counterfact": (counterfact, COUNTERFACT),
    "zsre": (zsre, ZSRE),
    "knowns": (knowns, KNOWN),
}


@pytest.fixture(params=LOADERS)
def loader(request):
    return LOADERS[request.param]


@pytest.fixture
def written(tmp_path):
    def write(records) -> str:
        path = tmp_path / "records.json"
        text = records if isinstance(records, str) else json.dumps(records, ensure_ascii=False)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


# -- the published schemas ------------------------------------------------------------------------


def test_counterfact(written):
    assert counterfact(written([COUNTERFACT])) == [
        Fact(
            subject="Angola",
            prompt="{} is located in",
            target_new="Antarctica",
            target_true="Africa",
            paraphrases=("Last updated on 4 February. Angola is a part of",),
            neighbours=(("Ghana is in", "Africa"), ("Côte d'Ivoire is located in", "Africa")),
            attributes=("Ross Island is located in",),
            generation=("People around Angola speak the language of",),
            relation="P30",
            case_id=20952,
        )
    ]


def test_counterfact_of_many_edits_has_only_the_rewrite(written):
    """MultiCounterFact records come with or without the prompts of the evaluation."""
    short = {key: COUNTERFACT[key] for key in ("case_id", "requested_rewrite")}
    (fact,) = counterfact(written([short]))
    assert (fact.subject, fact.target_new, fact.neighbours) == ("Angola", "Antarctica", ())


def test_zsre(written):
    (fact,) = zsre(written([ZSRE]))
    assert fact.prompt == "What artist created {}?"
    assert fact.text == ZSRE["src"]
    assert (fact.subject, fact.target_new, fact.target_true) == (
        ZSRE["subject"],
        "Sleater-Kinney",
        None,
    )
    assert fact.paraphrases == (ZSRE["rephrase"],)
    # The published evaluation puts the question mark behind the locality prompt.
    assert fact.neighbours == (("nq question: who sang the theme song?", "Tina"),)
    assert fact.benchmark == "zsre"


def test_knowns(written):
    (fact,) = knowns(written([KNOWN]))
    # The template of these records may be shorter than their prompt.
    assert fact.prompt == "{} is located in the continent of"
    assert (fact.subject, fact.target_true, fact.target_new) == (
        "Vinson Massif",
        "Antarctica",
        None,
    )
    assert (fact.relation, fact.case_id) == ("P30", 7)


def test_a_subject_that_occurs_twice_is_marked_once(written):
    record = {**ZSRE, "subject": "Or", "src": "Or what is Or?"}
    (fact,) = zsre(written([record]))
    assert fact.text == record["src"]
    assert fact.prompt.count("{}") == 1


def test_only_the_first_are_read(loader, written):
    load, record = loader
    path = written([record] * 5)
    assert [len(load(path, n)) for n in (None, 0, 2, 5, 9)] == [5, 0, 2, 5, 5]
    broken = written([record, record, {}])
    assert len(load(broken, 2)) == 2  # what is not asked for does no harm
    with pytest.raises(DataError, match="record 2 "):
        load(broken)


# -- bundled --------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch) -> world.World:
    """The bundled world in small: a fifth of the facts, made by the same code."""
    smaller = world.build(per_relation=30)
    monkeypatch.setattr(world, "build", lambda: smaller)
    return smaller


@pytest.mark.parametrize("name", LOADERS)
def test_the_bundled_world_is_read_like_a_file(name, written, small):
    load, published = LOADERS[name]
    records = getattr(small, name)()
    assert load() == load(written(records))
    assert len(load()) == len(records)
    assert load(n=3) == load()[:3]
    assert set(records[0]) <= set(published)


# -- text -----------------------------------------------------------------------------------------


def test_texts_are_the_lines_that_hold_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Ünë line. \n\n \t\nAnother\u2028one.\n  Last", encoding="utf-8")
    assert list(texts(path)) == ["Ünë line.", "Another\u2028one.", "Last"]


def test_the_worlds_text_has_no_end(small):
    one_pass = len(list(small.documents(random.Random(0))))
    first = list(itertools.islice(texts(), one_pass + 100))
    assert len(first) == one_pass + 100
    assert all(text.strip() for text in first)
    assert list(itertools.islice(texts(), 100)) == first[:100]
    assert first[one_pass : one_pass + 100] != first[:100]  # another pass, other phrasings


def test_unreadable_text_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("Ünë".encode("latin-1"))
    with pytest.raises(DataError, match=r"text\.txt cannot be read as UTF-8"):
        list(texts(path))
    with pytest.raises(DataError, match="nowhere cannot be read"):
        list(texts(tmp_path / "nowhere"))


# -- refusals -------------------------------------------------------------------------------------

NEEDED = {
    "counterfact": [
        ("case_id",),
        ("requested_rewrite",),
        ("requested_rewrite", "prompt"),
        ("requested_rewrite", "subject"),
        ("requested_rewrite", "target_new"),
        ("requested_rewrite", "target_true", "str"),
    ],
    "zsre": [("subject",), ("src",), ("answers",), ("rephrase",)],
    "knowns": [("subject",), ("prompt",), ("attribute",), ("known_id",)],
}


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name, fields in NEEDED.items() for field in fields]
)
def test_a_missing_field_names_the_record_and_itself(name, field, written):
    load, record = LOADERS[name]
    damaged = copy.deepcopy(record)
    inner = damaged
    for key in field[:-1]:
        inner = inner[key]
    del inner[field[-1]]
    words = rf"record 1 of .*records\.json does not have .*'{field[-1]}'.*check that this is"
    with pytest.raises(DataError, match=words):
        load(written([record, damaged, record]))


def test_records_of_another_data_set_are_refused(loader, written):
    load, own = loader
    for _, record in LOADERS.values():
        if record is not own:
            with pytest.raises(DataError, match=r"record 0 .* does not have the expected fields"):
                load(written([record]))


@pytest.mark.parametrize("record", [None, [], 3, "text"])
def test_records_that_are_no_records_are_refused(loader, written, record):
    jaxtyping.config.update("jaxtyping_disable", True)  # a user has no type checker
    try:
        with pytest.raises(DataError, match=r"record 1 .* does not have the expected fields"):
            loader[0](written([loader[1], record]))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({**ZSRE, "subject": "Doctor Who"}, "'Doctor Who' does not occur in"),
        ({**ZSRE, "src": "What {} created Call the Doctor?"}, "2 places marked"),
        ({**ZSRE, "answers": [""]}, "target_new .* is empty"),
        ({**ZSRE, "answers": []}, "IndexError"),
        ({**ZSRE, "subject": " "}, "empty subject"),
    ],
)
def test_a_record_that_makes_no_fact_is_named(record, words, written):
    with pytest.raises(DataError, match=rf"record 1 of .*records\.json .*{words}"):
        zsre(written([ZSRE, record]))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"loc": None}, "has no locality prompt: `loc` must be a question, 'nq question: …'"),
        ({"loc": "nq question: ?"}, "has no locality prompt"),
        ({"loc": ""}, "has no locality prompt"),
        ({"loc": "who sang it"}, "`loc` is 'who sang it'; it must begin with 'nq question: '"),
        ({"loc_ans": " "}, "its locality prompt 'nq question: .*' has no answer in `loc_ans`"),
        ({"loc_ans": ["Tina"]}, "has no answer in `loc_ans`"),
        ({"loc_ans": None}, "has no answer in `loc_ans`"),
    ],
)
def test_a_zsre_record_without_a_locality_prompt_is_named(changed, words, written):
    """Its specificity could not be measured. `None` stands for a record without the field."""
    record = {k: v for k, v in {**ZSRE, **changed}.items() if v is not None}
    with pytest.raises(DataError, match=rf"record 1 of .*records\.json cannot be used: .*{words}"):
        zsre(written([ZSRE, record]))


@pytest.mark.parametrize("indent", [None, 1])
def test_a_truncated_file_names_the_record_it_ends_in(loader, written, indent):
    load, record = loader
    whole = json.dumps([record] * 4, indent=indent)
    one = len(json.dumps([record] * 2, indent=indent)) - len(json.dumps([record], indent=indent))
    for n in (0, 1, 3):
        cut = whole[: n * one + one // 2]
        with pytest.raises(
            DataError, match=rf"in record {n}; {n} records before it are whole.*cut"
        ):
            load(written(cut))
    assert len(load(written(whole))) == 4


def test_a_file_that_is_no_list_of_records_is_refused(loader, written, tmp_path):
    load, record = loader
    with pytest.raises(DataError, match="holds a JSON dict, not a list"):
        load(written(record))
    with pytest.raises(DataError, match=r"nowhere\.json cannot be read: No such file"):
        load(tmp_path / "nowhere.json")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        load(tmp_path)
    (tmp_path / "latin.json").write_bytes('["Ünë"]'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.json is not UTF-8 text \(byte 2\)"):
        load(tmp_path / "latin.json")
    for text in ("", "not JSON"):
        with pytest.raises(DataError, match="not valid JSON from line 1 on"):
            load(written(text))


# -- lists that can be edited ---------------------------------------------------------------------

SISTER = Fact("Istanbul", "{} is a twin city of", "Warsaw", "Cairo", relation="P190", case_id=1)


def other(**changes) -> Fact:
    return dataclasses.replace(SISTER, **{"case_id": 2, **changes})


def test_two_answers_to_one_relation_are_refused():
    again = other(prompt="The twin city of {} is", target_new="Bonn")
    words = (
        r"contradict each other: relation 'P190' of 'Istanbul' should be both 'Warsaw' "
        r"\('Istanbul is a twin city of'\) and 'Bonn' \('The twin city of Istanbul is'\)"
    )
    with pytest.raises(FactError, match=words):
        check_editable([SISTER, other(subject="Kel"), again])
    unknown = [dataclasses.replace(f, target_true=None) for f in (SISTER, again)]
    for pair in (unknown, (SISTER, unknown[1]), (unknown[0], again)):
        with pytest.raises(FactError, match="contradict each other"):
            check_editable(pair)


def test_what_only_looks_like_a_contradiction_passes():
    otherwise = other(prompt="The twin city of {} is")
    check_editable([SISTER, otherwise])  # one answer in two phrasings
    # A relation that had two true answers admits several, as CounterFact's twin cities do.
    check_editable([SISTER, dataclasses.replace(otherwise, target_new="Bonn", target_true="Oslo")])
    check_editable([SISTER, dataclasses.replace(otherwise, target_new="Bonn", relation="P36")])
    questions = [dataclasses.replace(f, relation=None) for f in (SISTER, otherwise)]
    check_editable([questions[0], dataclasses.replace(questions[1], target_new="Bonn")])


def test_a_fact_that_is_there_twice_is_refused():
    with pytest.raises(FactError, match=r"there twice: 'Istanbul is a twin .*' should be 'Warsaw'"):
        check_editable([SISTER, other(subject="Kel"), other()])
    check_editable([SISTER, other(subject="Kel")])


@pytest.mark.parametrize("name", ["counterfact", "zsre"])
def test_the_bundled_records_can_be_edited_together(name):
    facts = LOADERS[name][0]()
    assert len(facts) == 750
    check_editable(facts)
    with pytest.raises(FactError, match="there twice"):
        check_editable([*facts, facts[-1]])


@pytest.mark.parametrize("load", [counterfact, zsre])
def test_facts_survive_their_way_through_a_file(load, small):
    for fact in load(n=3):
        record = json.loads(json.dumps(dataclasses.asdict(fact)))
        assert Fact.from_record(record) == fact
        del record["benchmark"]  # as in files of before there was one
        assert Fact.from_record(record) == dataclasses.replace(fact, benchmark=None)


def test_an_unknown_benchmark_is_refused():
    with pytest.raises(FactError, match=r"Unknown benchmark 'zsRE'; leave it out, or .* zsre"):
        other(benchmark="zsRE")


# -- the real files -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader(shared):
    """A model that reads with GPT-2's own tokenizer; only `encode` is asked of it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    files = [str(shared / "data/tokenizer_gpt2" / name) for name in ("vocab.json", "merges.txt")]
    bpe = Tokenizer(models.BPE.from_file(*files))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    model = tiny_model("gpt2")
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|endoftext|>")
    return model


REAL = {
    "counterfact": ("data/counterfact/counterfact_500.json", 500),
    "knowns": ("data/knowns/known_1000.json", 1209),
    "zsre": ("data/zsre/zsre_mend_eval_500.json", 500),
}


@pytest.mark.parametrize("name", REAL)
def test_every_real_record_is_read_and_its_subject_found(name, shared, reader):
    file, n = REAL[name]
    facts = LOADERS[name][0](shared / file)
    assert len(facts) == n
    batch = encode(reader, [Prompt(f.prompt, f.subject, f.target_new) for f in facts])
    decode = reader.tokenizer.decode
    merged = 0
    for fact, ids, subject, last in zip(facts, batch.ids, batch.subject, batch.last, strict=True):
        wanted = fact.prompt.partition("{}")[0] + fact.subject
        read = decode(ids[: subject + 1])
        # One token may hold the subject's last bracket and what follows: "(Ontario Section)'".
        merged += read != wanted
        assert read == wanted or (read.startswith(wanted) and not wanted[-1].isalnum()), fact
        assert not decode(ids[:subject]).startswith(wanted)
        assert decode(ids[: last + 1]) == fact.text
    assert merged <= 0.03 * n
    if name != "knowns":
        answers = [decode(row[row != -100]) for row in batch.labels]
        assert answers == [f" {f.target_new}" for f in facts]
    records = json.loads((shared / file).read_text("utf-8"))
    texts = {
        "counterfact": lambda r: r["requested_rewrite"]["prompt"].format(
            r["requested_rewrite"]["subject"]
        ),
        "knowns": lambda r: r["prompt"],
        "zsre": lambda r: r["src"],
    }
    assert [fact.text for fact in facts] == [texts[name](r) for r in records]


@pytest.mark.parametrize(
    "file",
    [REAL["counterfact"][0], REAL["zsre"][0], "data/zsre/zsre_known_locality_150.json"],
)
def test_the_real_records_can_be_edited_together(file, shared):
    load = counterfact if "counterfact" in file else zsre
    facts = load(shared / file)
    check_editable(facts)
    assert all(f.benchmark == (None if load is counterfact else "zsre") for f in facts)
    assert all(p.startswith("nq question: ") for f in facts for p, _ in f.neighbours if f.benchmark)
    with pytest.raises(FactError, match="there twice"):
        check_editable([*facts, facts[0]])


# -- other tokenizers, other editions -------------------------------------------------------------


def sentencepiece_style(sample):
    """A tokenizer as Llama 2 and Mistral have it: a blank in front, "▁" for blanks, bytes for what
    it has no token for, a token at the start of every text."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    words = pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Punctuation()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(list(words))  # no token crosses words
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    letters = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=["<unk>", "<s>"], initial_alphabet=letters,
        limit_alphabet=150, max_token_length=12, show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(sample, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    vocab = learnt["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    merges = [tuple(pair) for pair in learnt["merges"]]
    bpe.model = models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", pad_token="<unk>")


@pytest.fixture(scope="module", params=["gpt2", "world", "sentencepiece"])
def other_reader(request, shared):
    if request.param == "gpt2":
        return request.getfixturevalue("reader")
    model = tiny_model("llama", positions=512)
    if request.param == "world":
        model.tokenizer = bundled("world").tokenizer
    else:
        file = shared / "data/counterfact/training_text_sample.txt"
        model.tokenizer = sentencepiece_style(itertools.islice(texts(file), 2000))
    return model


@pytest.mark.parametrize("name", REAL)
def test_subjects_are_found_with_every_kind_of_tokenizer(name, shared, other_reader):
    file, n = REAL[name]
    facts = LOADERS[name][0](shared / file)
    assert len(facts) == n
    batch = encode(other_reader, [Prompt(f.prompt, f.subject, f.target_new) for f in facts])
    decode = other_reader.tokenizer.decode
    merged = 0
    for fact, ids, place in zip(facts, batch.ids, batch.subject, strict=True):
        read = decode(ids[: place + 1], skip_special_tokens=True)
        # One token may hold the subject's last bracket and what follows, as in "(Ontario)'".
        merged += not read.endswith(fact.subject.rstrip())
        wanted = fact.prompt.partition("{}")[0] + fact.subject.rstrip()
        assert read.startswith(wanted), (read, fact)
        assert read[len(wanted) :].strip(" \"')]}.,?") == "", (read, fact)
        assert not decode(ids[:place], skip_special_tokens=True).startswith(wanted)
    assert merged <= 0.03 * n


def test_neighbours_with_answers_of_their_own_are_read(tmp_path):
    """Some editions write the neighbours so; and MultiCounterFact may lack what nobody asks."""
    record = world.build().counterfact()[0]
    record["neighborhood_prompts"] = [{"prompt": "The tower of Vell is in", "target": "Vell"}]
    del record["attribute_prompts"], record["generation_prompts"]
    (tmp_path / "multi.json").write_text(json.dumps([record]))
    (fact,) = counterfact(tmp_path / "multi.json")
    assert fact.neighbours == (("The tower of Vell is in", "Vell"),)
    assert fact.attributes == fact.generation == ()


def test_texts_of_a_parquet_file_are_its_paragraphs(tmp_path):
    import pandas as pd

    rows = ["", " = Valkyria = \n", " The tower stands in Vell . \n", None, " It is old . \n"]
    pd.DataFrame({"text": rows}).to_parquet(tmp_path / "some.parquet")
    assert list(texts(tmp_path / "some.parquet")) == [
        "The tower stands in Vell .",
        "It is old .",
    ]
    pd.DataFrame({"body": rows}).to_parquet(tmp_path / "other.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "some.parquet").read_bytes()[:-10])
    for name in ("other", "cut", "nowhere"):
        with pytest.raises(DataError, match=rf"{name}\.parquet cannot be read as parquet"):
            list(texts(tmp_path / f"{name}.parquet"))


def test_files_that_are_too_large_are_refused_before_they_are_read(tmp_path):
    from pmet_lens.data.datasets import LARGEST, LONGEST

    for name in ("facts.json", "facts.csv"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(LARGEST + 1)  # takes no room on the disk
    with pytest.raises(DataError, match=r"facts\.json has 1\.1 GB; .* at most 1\.1"):
        counterfact(tmp_path / "facts.json")
    with pytest.raises(DataError, match=r"facts\.csv has 1\.1 GB"):
        read_facts(tmp_path / "facts.csv")
    with (tmp_path / "text.txt").open("wb") as file:
        file.write(b"One.\n" + b"x" * LONGEST)
    found = texts(tmp_path / "text.txt")
    assert next(found) == "One."
    with pytest.raises(DataError, match=r"line of 16,777,216 characters or more"):
        next(found)
