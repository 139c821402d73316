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
