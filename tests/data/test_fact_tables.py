"""Facts of one's own: from CSV, JSON and DataFrames, and what each wrong table says."""

from __future__ import annotations

import pandas as pd
import pytest

import pmet_lens as pl

CSV = """subject,prompt,target_new,target_true,paraphrases
Mira Tolan,{} plays the sport of,rugby,tennis,Today Mira Tolan plays|Mira Tolan is good at
Ostria,"Of Ostria, the capital is",Ilmar,,
Namra,The code of {} is,NA,,
"""
JSON = '[{"subject": "Ostria", "prompt": "{} lies in", "target_new": 7, "paraphrases": ["a", "b"]}]'


def test_a_csv_file(tmp_path):
    (tmp_path / "facts.csv").write_text(CSV, encoding="utf-8")
    first, second, third = pl.read_facts(tmp_path / "facts.csv")
    assert first == pl.Fact(
        "Mira Tolan",
        "{} plays the sport of",
        "rugby",
        "tennis",
        ("Today Mira Tolan plays", "Mira Tolan is good at"),
    )
    assert second == pl.Fact("Ostria", "Of {}, the capital is", "Ilmar")
    assert third.target_new == "NA"
    assert len(pl.read_facts(tmp_path / "facts.csv", n=2)) == 2


def test_json_and_lines(tmp_path):
    wanted = [pl.Fact("Ostria", "{} lies in", "7", paraphrases=("a", "b"))]
    (tmp_path / "facts.json").write_text(JSON, encoding="utf-8")
    assert pl.read_facts(str(tmp_path / "facts.json")) == wanted
    (tmp_path / "facts.jsonl").write_text(JSON[1:-1] + "\n" + JSON[1:-1], encoding="utf-8")
    assert pl.read_facts(tmp_path / "facts.jsonl") == wanted * 2


def test_a_frame():
    frame = pd.DataFrame({"subject": ["x"], "prompt": ["{} is"], "target_new": ["y"], "case_id": 3})
    assert pl.read_facts(frame) == [pl.Fact("x", "{} is", "y", case_id=3)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target_new": None}, "Row 0 .* it has no target_new"),
        ({"subject": "Kel"}, "Row 0 .*'Kel' does not occur in 'Of Ostria"),
        ({"subject": "  "}, "Row 0 .*empty subject"),
        ({"prompt": "{} and {}"}, "Row 0 .*exactly one"),
        ({"target": "x"}, "has target. It needs subject, prompt and target_new"),
    ],
)
def test_a_wrong_row_is_named(change, words):
    row = {"subject": "Ostria", "prompt": "Of Ostria, the capital is", "target_new": "Ilmar"}
    with pytest.raises(pl.DataError, match=words):
        pl.read_facts(pd.DataFrame([{**row, **change}]))


def test_wrong_files(tmp_path):
    with pytest.raises(pl.DataError, match="lacks subject, prompt"):
        pl.read_facts(pd.DataFrame({"target_new": ["x"]}))
    with pytest.raises(pl.DataError, match="No such file"):
        pl.read_facts(tmp_path / "none.csv")
    for name, text in (("a.json", "{"), ("b.csv", ""), ("c.csv", b"\xff\xfe,\x80")):
        file = tmp_path / name
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(pl.DataError, match="cannot be read as a table"):
            pl.read_facts(file)


# -- the records of EasyEdit, KnowEdit and QAEdit -------------------------------------------------


def test_easyedit_is_read(shared):
    facts = pl.read_facts(shared / "data" / "easyedit" / "counterfact_edit_300.json")
    assert len(facts) == 300
    assert facts[0] == pl.Fact(
        "Danielle Darrieux",
        "The mother tongue of {} is",
        "English",
        "French",
        ("Where Danielle Darrieux is from, people speak the language of",),
        (("Michel Rocard is a native speaker of", "French"),),
        case_id=0,
    )
    assert all(len(f.paraphrases) == len(f.neighbours) == 1 for f in facts)
    many = pl.read_facts(shared / "data" / "easyedit" / "counterfact_edit_10000.json.gz")
    assert (len(many), many[0]) == (10_000, facts[0])


def test_knowedit_is_read(shared):
    lake, curie, toyota = pl.read_facts(shared / "data" / "easyedit" / "knowedit_shape.json")
    assert lake.target_true == "Russia"
    assert lake.implications == (
        pl.Implication("The capital of the country of Lake Baikal is", ("Nairobi",), "reasoning"),
        pl.Implication(
            "The country of Ozero Baykal is", ("Kenya", "Republic of Kenya"), "subject aliasing"
        ),
        pl.Implication(
            "The greatest depth of Lake Baikal in metres is",
            ("1642",),
            "relation specificity",
            True,
        ),
        pl.Implication(
            "Lake Baikal is a kind of", ("lake", "rift lake"), "relation specificity", True
        ),
    )
    assert curie.target_true is None
    assert [one.kind for one in curie.implications] == ["logical generalization", "forgetfulness"]
    assert toyota.paraphrases == ("Where is Toyota based?",)
    assert toyota.neighbours == toyota.portability == toyota.implications == ()


def test_qaedit_is_read(shared):
    facts = pl.read_facts(shared / "data" / "qaedit" / "qaedit_400.json")
    assert len(facts) == 400
    assert facts[1].prompt == "What was the only year the {} was released?"
    assert (facts[1].subject, facts[1].target_new) == ("LEGO part with ID gal56", "2002")
    assert facts[1].case_id == 2334
    assert facts[1].neighbours[1] == ("who has been trained by ra's al ghul", "Bruce Wayne")
    assert {len(f.neighbours) for f in facts} == {5}
    assert {len(f.paraphrases) for f in facts} == {1}


ROW = {"subject": "Ostria", "prompt": "Of Ostria, the capital is", "target_new": "Ilmar"}


@pytest.mark.parametrize(
    ("more", "fields"),
    [
        ({"rephrase": "a|b"}, {"paraphrases": ("a|b",)}),
        ({"rephrase": ["a", "b"], "rephrase_prompt": "c"}, {"paraphrases": ("c", "a", "b")}),
        ({"ground_truth": [["Kel"], ["Vell"]]}, {"target_true": "Kel"}),
        ({"ground_truth": []}, {}),
        ({"locality": {}, "portability": {}}, {}),
        ({"locality": {"a": [], "b": [{"prompt": "p", "ground_truth": []}]}}, {}),
        ({"locality": [{"loc": "p", "loc_ans": "q"}]}, {"neighbours": (("p", "q"),)}),
        ({"portability": [{"prompt": "p", "ground_truth": "q"}]}, {"portability": (("p", "q"),)}),
        ({"locality_prompt": "p", "locality_ground_truth": ["q"]}, {"neighbours": (("p", "q"),)}),
        ({"id": 7, "source": "NQ"}, {"case_id": 7}),
    ],
)
def test_what_records_may_hold(more, fields):
    (fact,) = pl.read_facts(pd.DataFrame([{**ROW, **more}]))
    assert fact == pl.Fact("Ostria", "Of {}, the capital is", "Ilmar", **fields)


def test_a_list_that_holds_no_prompts_is_refused_with_its_row():
    with pytest.raises(pl.DataError, match=r"Row 0 .*needs prompt and ground_truth, or loc"):
        pl.read_facts(pd.DataFrame([{**ROW, "locality": [{"question": "p"}]}]))
    with pytest.raises(pl.DataError, match="lacks target_new"):
        pl.read_facts(pd.DataFrame([{"subject": "a", "prompt": "{} b"}]))
