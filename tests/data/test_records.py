"""The records of benchmarks: each shape is recognised, says how it was read, and bad rows are told.

The records are written here, in the published shapes."""

from __future__ import annotations

import copy
import gzip
import json
import warnings

import numpy as np
import pandas as pd
import pytest

import pmet_lens as pl
from pmet_lens import Implication


def query(prompt: str, *answers: str, subject: str = "Q1", aliases: tuple[str, ...] = ()) -> dict:
    return {
        "prompt": prompt,
        "answers": [{"value": one, "aliases": list(aliases)} for one in answers],
        "query_type": "regular",
        "subject_id": subject,
        "relation": "MOTHER",
        "phrase": None,
    }


def check(*queries: dict, when: tuple[dict, ...] = ()) -> dict:
    return {"test_queries": [*queries], "test_condition": "OR", "condition_queries": [*when]}


RIPPLE = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the country of citizenship of Mira Tolan is New Ostria.",
        "subject_id": "Q1",
        "relation": "COUNTRY_OF_CITIZENSHIP",
        "target_id": "Q2",
        "original_fact": {
            "prompt": "The name of the country of citizenship of Mira Tolan is New Vell.",
            "subject_id": "Q1",
            "relation": "COUNTRY_OF_CITIZENSHIP",
            "target_id": "Q3",
        },
    },
    "Relation_Specificity": [
        check(query("The name of the mother of Mira Tolan is", "Elna", aliases=("Elna Tolan",))),
        check(query("The gender of Mira Tolan is")),  # nobody knows
    ],
    "Logical_Generalization": [],
    "Subject_Aliasing": [
        check(query("The name of the country of citizenship of M. Tolan is", "New Ostria"))
    ],
    "Compositionality_I": [
        check(
            query("The name of the capital city of the country of Mira Tolan is", "Ilmar"),
            when=(query("The name of the capital city of New Ostria is", "Ilmar", subject="Q2"),),
        )
    ],
    "Forgetfulness": [check(query("The name of the country Mira Tolan left is", "Kel"))],
}
MQUAKE = {
    "case_id": 5,
    "requested_rewrite": [
        {
            "prompt": "{} is a citizen of",
            "relation_id": "P27",
            "target_new": {"str": "Ostria", "id": "Q2"},
            "target_true": {"str": "Vell", "id": "Q3"},
            "subject": "Mira Tolan",
            "question": "Which country is Mira Tolan a citizen of?",
        },
        {
            "prompt": "The capital of {} is",
            "relation_id": "P36",
            "target_new": {"str": "Kel", "id": "Q4"},
            "target_true": {"str": "Ilmar", "id": "Q5"},
            "subject": "Ostria",
            "question": "What is the capital of Ostria?",
        },
    ],
    "questions": ["Where does the government of Mira Tolan's country sit?", "Which capital …?"],
    "answer": "Vellton",
    "answer_alias": [],
    "new_answer": "Kel",
    "new_answer_alias": ["Kel City"],
    "single_hops": [],
    "new_single_hops": [
        {
            "question": "Which country is Mira Tolan a citizen of?",
            "cloze": "Mira Tolan is a citizen of",
            "answer": "Ostria",
            "answer_alias": ["Republic of Ostria"],
        },
        {
            "question": "What is the capital of Ostria?",
            "cloze": "The capital of Ostria is",
            "answer": "Kel",
            "answer_alias": ["Kel City"],
        },
        {
            "question": "Which river flows through Kel?",
            "cloze": "The river of Kel is",
            "answer": "Tol",
            "answer_alias": [],
        },
    ],
    "orig": {"triples": []},
}
COUNTERFACT = {
    "case_id": 3,
    "pararel_idx": 1,
    "requested_rewrite": {
        "prompt": "{} plays the sport of",
        "relation_id": "P641",
        "target_new": {"str": "rugby", "id": "Q1"},
        "target_true": {"str": "tennis", "id": "Q2"},
        "subject": "Mira Tolan",
    },
    "paraphrase_prompts": ["Mira Tolan is good at"],
    "neighborhood_prompts": ["Ilmar plays"],
}
ZSRE = {
    "subject": "Mira Tolan",
    "src": "Which sport does Mira Tolan play?",
    "pred": "golf",
    "rephrase": "What is Mira Tolan's sport?",
    "alt": "rugby",
    "answers": ["tennis"],
    "loc": "nq question: where is ilmar",
    "loc_ans": "Ostria",
    "cond": "golf >> rugby || Which sport does Mira Tolan play?",
}
HOP = {"Recalled Relation": "…", "New Question": "With what does Mira Tolan play?",
       "New Answer": "an oval ball"}  # fmt: skip
QAEDIT = {
    "id": 1,
    "source": "NQ",
    "prompt": "which sport does Mira Tolan play?",
    "target": "rugby",
    "subject": "Mira Tolan",
    "rephrase": "What does Mira Tolan play?",
    "locality": [{"loc": "where is ilmar", "loc_ans": "Ostria"}],
}
KNOWEDIT = {
    "subject": "Mira Tolan",
    "prompt": "The sport of Mira Tolan is",
    "target_new": [["rugby"], ["rugger"]],
    "ground_truth": "tennis",
    "portability": {"Reasoning": [{"prompt": "Her ball is", "ground_truth": [["oval"], ["egg"]]}]},
    "locality": {"Forgetfulness": [], "Relation_Specificity": [
        {"prompt": "Her brother is", "ground_truth": [["Danel"]]}]},
}  # fmt: skip


# -- each shape -----------------------------------------------------------------------------------


def test_rippleedits():
    (fact,) = facts = pl.read_facts([RIPPLE])
    assert fact == pl.Fact(
        "Mira Tolan",
        "The name of the country of citizenship of {} is",
        "New Ostria",
        "New Vell",
        relation="COUNTRY_OF_CITIZENSHIP",
        implications=(
            Implication("The name of the mother of Mira Tolan is", ("Elna", "Elna Tolan"),
                        "relation specificity", True),
            Implication("The name of the country of citizenship of M. Tolan is", ("New Ostria",),
                        "subject aliasing"),
            Implication("The name of the capital city of the country of Mira Tolan is", ("Ilmar",),
                        "compositionality i"),
            Implication("The name of the country Mira Tolan left is", ("Kel",), "forgetfulness",
                        True),
        ),
    )  # fmt: skip
    assert facts.read_as.startswith("RippleEdits: the statement")
    assert "left out: condition queries" in facts.read_as


def test_rippleedits_without_the_fact_of_before():
    record = copy.deepcopy(RIPPLE)
    del record["edit"]["original_fact"]
    (fact,) = pl.read_facts([record])
    assert (fact.target_new, fact.target_true) == ("New Ostria", None)
    # As its readme spells the field.
    record["edit"]["previous_fact"] = RIPPLE["edit"]["original_fact"]
    assert pl.read_facts([record]) == pl.read_facts([RIPPLE])


def test_rippleedits_finds_the_subject_or_says_that_it_does_not():
    record = copy.deepcopy(RIPPLE)
    edit = record["edit"] = {**RIPPLE["edit"], "relation": "NATIONALITY"}
    # The questions about the same subject share its name.
    assert pl.read_facts([record])[0].subject == "Mira Tolan"
    record["Relation_Specificity"][0] = check(query("The mother of M. Tolan is", "Elna"))
    with pytest.raises(pl.DataError, match=r"Row 0 .*known by its Wikidata number alone"):
        pl.read_facts([record])
    edit["subject_label"] = "Mira Tolan"  # of the extended edition
    assert pl.read_facts([record])[0].subject == "Mira Tolan"
    edit["prompt"] = "Mira Tolan, New Ostria."
    with pytest.raises(pl.DataError, match=r"Row 0 .*no ' is ' or ' are ' before the answer"):
        pl.read_facts([record])


def test_mquake():
    one, two = facts = pl.read_facts([MQUAKE])
    assert one == pl.Fact(
        "Mira Tolan", "{} is a citizen of", "Ostria", "Vell",
        ("Which country is Mira Tolan a citizen of?",), relation="P27", case_id=5,
        aliases=("Republic of Ostria",),
        implications=(
            Implication(MQUAKE["questions"][0], ("Kel", "Kel City"), "multi-hop"),
            Implication(MQUAKE["questions"][1], ("Kel", "Kel City"), "multi-hop"),
            Implication("Which river flows through Kel?", ("Tol",), "single hop", True),
        ),
    )  # fmt: skip
    assert (two.subject, two.target_new, two.case_id) == ("Ostria", "Kel", 5)
    assert two.implications == ()
    assert facts.read_as.startswith("MQuAKE: a fact per requested_rewrite")


def test_counterfact_and_zsre_are_those_of_their_loaders(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps([COUNTERFACT]))
    (tmp_path / "z.json").write_text(json.dumps([ZSRE]))
    assert pl.read_facts(tmp_path / "c.json") == pl.counterfact(tmp_path / "c.json")
    assert pl.read_facts(tmp_path / "z.json") == pl.zsre(tmp_path / "z.json")
    known = [{"known_id": 1, "subject": "Kel", "prompt": "Kel is in", "attribute": "Ostria"}]
    (tmp_path / "k.json").write_text(json.dumps(known))
    assert pl.read_facts(tmp_path / "k.json") == pl.knowns(tmp_path / "k.json")


def test_easyedits_zsre_edits_its_alternative():
    (fact,) = pl.read_facts([{**ZSRE, "portability": HOP}])
    assert (fact.target_new, fact.target_true) == ("rugby", "tennis")
    assert fact.implications == (Implication(HOP["New Question"], ("an oval ball",), "reasoning"),)
    assert pl.read_facts([ZSRE])[0].target_new == "tennis"


def test_knowedit():
    (fact,) = facts = pl.read_facts([KNOWEDIT])
    assert (fact.target_new, fact.aliases, fact.target_true) == ("rugby", ("rugger",), "tennis")
    assert fact.implications == (
        Implication("Her ball is", ("oval", "egg"), "reasoning"),
        Implication("Her brother is", ("Danel",), "relation specificity", True),
    )
    assert "ground_truth as target_true" in facts.read_as


def test_qaedit():
    (fact,) = facts = pl.read_facts([QAEDIT])
    assert (fact.target_new, fact.case_id) == ("rugby", 1)
    assert fact.neighbours == (("where is ilmar", "Ostria"),)
    assert "target as target_new" in facts.read_as
    assert facts.read_as.endswith("left out: source.")


@pytest.mark.parametrize(
    "name", ["counterfact/counterfact_500.json", "zsre/zsre_mend_eval_500.json",
             "knowns/known_1000.json", "easyedit/counterfact_edit_300.json",
             "easyedit/knowedit_shape.json", "qaedit/qaedit_400.json"],
)  # fmt: skip
def test_every_shape_at_hand_is_read(name, shared):
    facts = pl.read_facts(shared / "data" / name)
    assert len(facts) >= 3
    assert facts.read_as.endswith(".")
    assert facts.left_out == ()
    assert len(pl.read_facts(shared / "data" / name, n=2)) == 2


# -- where they come from -------------------------------------------------------------------------


@pytest.mark.parametrize("record", [KNOWEDIT, MQUAKE, RIPPLE, QAEDIT])
def test_every_source_gives_the_same_facts(record, tmp_path):
    facts = pl.read_facts([record])
    (tmp_path / "a.json").write_text(json.dumps([record]))
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n\n")
    with gzip.open(tmp_path / "a.json.gz", "wt") as file:
        file.write(json.dumps([record]))
    whole = {k: v for k, v in record.items() if v}  # arrow knows no empty structs
    pd.DataFrame([whole]).to_parquet(tmp_path / "a.parquet")
    for name in ("a.json", "a.jsonl", "a.json.gz", "a.parquet"):
        assert pl.read_facts(tmp_path / name) == facts, name
    assert pl.read_facts(pd.DataFrame([record])) == facts
    # As pandas reads parquet: arrays in cells, and None for kinds that are missing.
    assert pl.read_facts(pd.read_parquet(tmp_path / "a.parquet")) == facts
    assert pl.read_facts(iter([record])) == facts


def test_a_hugging_face_dataset_is_read():
    datasets = pytest.importorskip("datasets")
    set_ = datasets.Dataset.from_list([MQUAKE, MQUAKE])
    assert pl.read_facts(set_, n=1) == pl.read_facts([MQUAKE])
    with pytest.raises(
        pl.DataError, match=r"not from one DatasetDict; choose one of its parts train"
    ):
        pl.read_facts(datasets.DatasetDict({"train": set_}))


def test_arrays_and_missing_kinds_in_cells():
    row = {
        **{k: KNOWEDIT[k] for k in ("subject", "prompt")},
        "target_new": np.array(["rugby"], dtype=object),
        "portability": {"Reasoning": None, "Subject_Aliasing": np.array(
            [{"prompt": "p", "ground_truth": np.array(["q"], dtype=object)}], dtype=object)},
        "locality": None,
    }  # fmt: skip
    (fact,) = pl.read_facts(pd.DataFrame([row]))
    assert fact.implications == (Implication("p", ("q",), "subject aliasing"),)
    assert fact.neighbours == ()


# -- bad rows -------------------------------------------------------------------------------------

GOOD = {"subject": "Kel", "prompt": "Kel is in", "target_new": "Ostria"}
BAD = {
    "a table": ({**GOOD, "subject": "Vell"}, "'Vell' does not occur in 'Kel is in'"),
    "no answer": ({**GOOD, "target_new": []}, "target_new"),
    "MQuAKE": ({**MQUAKE, "requested_rewrite": [{"prompt": "{} is"}]}, "expected fields"),
    "MQuAKE without questions": ({**MQUAKE, "questions": None}, "expected fields"),
    "an empty answer": ({**MQUAKE, "new_answer": " ", "new_answer_alias": []}, "no accepted"),
    "RippleEdits": ({**RIPPLE, "edit": {"prompt": "Kel"}}, "no ' is ' or ' are '"),
    "CounterFact": ({**COUNTERFACT, "case_id": None}, "expected fields .*case_id"),
    "zsRE": ({**ZSRE, "loc": "where"}, "must begin with 'nq question: '"),
    "EasyEdit's zsRE": ({**ZSRE, "portability": {"New Question": "q"}}, "New Answer"),
}  # fmt: skip
FIRST = {"a table": GOOD, "no answer": GOOD, "MQuAKE": MQUAKE, "MQuAKE without questions": MQUAKE,
         "an empty answer": MQUAKE, "RippleEdits": RIPPLE, "CounterFact": COUNTERFACT, "zsRE": ZSRE,
         "EasyEdit's zsRE": {**ZSRE, "portability": HOP}}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_an_error_that_names_it_or_is_left_out_and_listed(name):
    record, words = BAD[name]
    rows = [FIRST[name], record, FIRST[name]]
    with pytest.raises(pl.DataError, match=rf"^Row 1 of the facts .*{words}"):
        pl.read_facts(rows)
    with pytest.warns(UserWarning, match=r"1 of 3 rows are left out .*Row 1"):
        facts = pl.read_facts(rows, skip=True)
    assert facts == pl.read_facts([rows[0], rows[2]])
    (line,) = facts.left_out
    assert line.startswith("Row 1 of the facts (counted from 0): ")


def test_nothing_is_said_where_nothing_is_left_out():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pl.read_facts([GOOD], skip=True).left_out == ()
    assert pl.read_facts([GOOD]).read_as == "A table of facts: as named."
    assert pl.read_facts([]) == []


def test_what_is_no_list_of_records_is_said(tmp_path):
    (tmp_path / "dict.json").write_text('{"data": []}')
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{')
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    for source, words in (
        (tmp_path / "dict.json", "JSON dict, not a list"),
        (tmp_path / "bad.jsonl", "cannot be read as a table"),
        (tmp_path / "bad.parquet", "cannot be read as a table"),
        (tmp_path / "none.parquet", "No such file"),
        ([GOOD, "Kel"], "Row 1 of the facts is a str"),
        (7, "not from one int"),
    ):
        with pytest.raises(pl.DataError, match=words):
            pl.read_facts(source)
    with pytest.raises(pl.DataError, match="whole number"):
        pl.read_facts([GOOD], n=-1)
