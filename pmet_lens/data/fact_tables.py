"""Facts from the files people have: tables of one's own, and the records of the benchmarks, which
are recognised by their fields."""

from __future__ import annotations

import gzip
import itertools
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from pmet_lens.data.datasets import DataError, Record, check_size, marked
from pmet_lens.data.facts import Fact, FactError, Implication
from pmet_lens.data.records import SHAPES, Shape, every, kind_of

_NEEDED = ("subject", "prompt", "target_new")
_LISTS = ("paraphrases", "generation", "attributes", "aliases")
_COLUMNS = (*_NEEDED, "target_true", "relation", "case_id", *_LISTS)
# What EasyEdit, KnowEdit and QAEdit call the same things.
_ALIASES = {"target": "target_new", "ground_truth": "target_true", "id": "case_id"}
_REPHRASED = ("rephrase_prompt", "rephrase")
_NEAR = ("locality", "locality_prompt", "locality_ground_truth")
_UNREAD = ("source", "cond")
_KNOWN = {*_COLUMNS, *_ALIASES, *_REPHRASED, *_NEAR, "portability", *_UNREAD}
_READ_AS = {
    **_ALIASES,
    **dict.fromkeys(_REPHRASED, "paraphrases"),
    "locality": "neighbours, by kind as implications that stay",
    "locality_prompt": "neighbours",
    "portability": "portability, by kind as implications",
}


class FactList(list[Fact]):
    """What `read_facts` read: a list that says what was read as what, and what was left out."""

    read_as: str = ""
    """One sentence: the shape that was recognised, and what of it is where in a `Fact`."""
    left_out: tuple[str, ...] = ()
    """With `skip`: a sentence for each row that could not be used."""


def read_facts(
    source: str | Path | pd.DataFrame | Iterable[Mapping[str, Any]],
    n: int | None = None,
    *,
    skip: bool = False,
) -> FactList:
    """Your facts, or those of a benchmark, from the first `n` rows (None: all). The list that comes
    back has the attributes `read_as`, a sentence on what was read as what and what was left out,
    and `left_out`.

    `source`: a CSV file with a header, a JSON list of objects (or one object per line, `.jsonl`),
    a `.parquet` file, a DataFrame, a `datasets.Dataset` or another iterable of records; CSV and
    JSON also behind `.gz`.

    A table of one's own has the columns subject, prompt and target_new. The prompt marks the
    subject with `{}`, or holds it once. Other columns with the name of a field of `Fact` are taken,
    too (target_true, relation, case_id; paraphrases, generation, attributes and aliases as lists,
    or in CSV separated by "|"); unknown ones are refused, since they are mostly typing errors.
    Empty cells are as if they were not there.

    Read as they are, recognised by the fields of the first row: CounterFact, zsRE (the answer that
    is edited is `answers[0]`; of EasyEdit's zsRE, which has a portability question, `alt`), known
    statements, RippleEdits, MQuAKE (one fact per edit of a case; its questions belong to the first
    of them), EasyEdit's CounterFact, KnowEdit and QAEdit (target and ground_truth: the new and the
    true answer; rephrase: a paraphrase; portability and locality by kind: `implications`, whatever
    kinds there are, and as plain lists: portability and neighbours). Where several answers are
    accepted, a neighbour has the first and an implication all.

    `skip`: rows that cannot be used are left out, with a warning, and listed in `left_out`.

    Raises:
        DataError: for a file that cannot be read, missing or unknown columns, or (without `skip`) a
            row that is no fact, naming the row.
    """
    if n is not None and (not isinstance(n, int) or n < 0):
        raise DataError(f"n must be a whole number ≥ 0 or None, not {n!r}.")
    rows = _rows(source, n)
    first = _filled(rows[0]) if rows else {}
    shape = next((shape for shape in SHAPES if shape.fits(first)), None) or _table(rows)
    found, left_out = FactList(), []
    for i, row in enumerate(rows):
        try:
            try:
                found += shape.facts(_filled(row))
            except (KeyError, TypeError, IndexError, AttributeError) as error:
                raise FactError(
                    f"it does not have the expected fields ({type(error).__name__}: {error})."
                ) from error
        except FactError as error:
            left_out.append(f"Row {i} of the facts (counted from 0): {error}")
            if not skip:
                raise DataError(left_out[0]) from error
    found.read_as, found.left_out = shape.read_as, tuple(left_out)
    if left_out:
        warnings.warn(
            f"{len(left_out)} of {len(rows)} rows are left out (listed in left_out); the first: "
            f"{left_out[0]}",
            stacklevel=2,
        )
    return found


# -- where rows come from -------------------------------------------------------------------------


def _rows(source: Any, n: int | None) -> list[Record]:
    if isinstance(source, str | Path):
        return _of_file(Path(source))[:n]
    if isinstance(source, pd.DataFrame):
        records: list[Any] = source.head(len(source) if n is None else n).to_dict("records")
    elif (splits := isinstance(source, Mapping)) or not isinstance(source, Iterable):
        parts = f"; choose one of its parts {', '.join(map(str, source))}" if splits else ""
        raise DataError(
            "Facts are read from a file, a DataFrame or a list of records, not from one "
            f"{type(source).__name__}{parts}."
        )
    else:
        records = list(itertools.islice(source, n))
    if wrong := [i for i, row in enumerate(records) if not isinstance(row, Mapping)]:
        kind = type(records[wrong[0]]).__name__
        raise DataError(f"Row {wrong[0]} of the facts is a {kind}, not a record with fields.")
    return [{str(k): v for k, v in row.items()} for row in records]


def _of_file(path: Path) -> list[Record]:
    packed = path.suffix == ".gz"
    kind = (path.with_suffix("") if packed else path).suffix.lower()
    try:
        check_size(path)
        if kind == ".parquet":
            from pyarrow import parquet

            return parquet.read_table(path).to_pylist()
        if kind not in (".json", ".jsonl"):
            table = pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])
            return _rows(table, None)
        data = path.read_bytes()
        text = (gzip.decompress(data) if packed else data).decode("utf-8")
        if kind == ".json":
            records = json.loads(text)
            if isinstance(records, list):
                return _rows(records, None)
            raise ValueError(f"it holds a JSON {type(records).__name__}, not a list")
        return _rows([json.loads(line) for line in text.splitlines() if line.strip()], None)
    except DataError:
        raise
    except (OSError, EOFError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read: {why}.") from error
    except ValueError as error:  # also what pandas, pyarrow and json make of a broken file
        raise DataError(
            f"{path} cannot be read as a table of facts: {error}. Give a CSV file with a header, a "
            "JSON list of objects, .jsonl or .parquet."
        ) from error


def _filled(value: Any) -> Any:
    """The same without empty cells, at any depth; arrays as lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        cells = ((str(k), _filled(v)) for k, v in value.items())
        return {k: v for k, v in cells if not _empty(v)}
    if isinstance(value, list | tuple):
        return [one for one in map(_filled, value) if not _empty(one)]
    return value


def _empty(cell: Any) -> bool:
    return not isinstance(cell, list | dict) and bool(pd.isna(cell))


# -- tables of one's own, and EasyEdit's, KnowEdit's and QAEdit's records -------------------------


def _table(rows: list[Record]) -> Shape:
    """The shape of a table with these rows; refuses columns that are missing or unknown."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    unknown = [c for c in columns if c not in _KNOWN or _ALIASES.get(c) in columns]
    missing = [c for c in _NEEDED if rows and not {c, *_other_names(c)} & {*columns}]
    if missing or unknown:
        wrong = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(unknown)}"
        raise DataError(
            f"The table of facts {wrong}. It needs subject, prompt and target_new, and may have "
            f"{', '.join(_COLUMNS[3:])}."
        )
    told = [f"{name} as {_READ_AS[name]}" for name in columns if name in _READ_AS]
    unread = [name for name in columns if name in _UNREAD]
    told += [f"left out: {', '.join(unread)}"] if unread else []
    return Shape(lambda _: True, _of_table, f"A table of facts: {'; '.join(told or ['as named'])}.")


def _of_table(row: Record) -> list[Fact]:
    row = {_ALIASES.get(name, name): cell for name, cell in row.items() if name not in _UNREAD}
    near = _near(row)
    locality, portability = (row.pop(name, None) for name in ("locality", "portability"))
    rephrased = [text for name in _REPHRASED for text in _list(row.pop(name, []))]
    for name in _NEEDED:
        if name not in row:
            raise FactError(f"it has no {name}.")
    fields: dict[str, Any] = {"case_id": row.pop("case_id", None)}
    for name, cell in row.items():
        if name in _LISTS:
            parts = cell.split("|") if isinstance(cell, str) else _list(cell)
            fields[name] = tuple(str(part).strip() for part in parts)
        elif (text := _first(cell)) is not None:
            fields[name] = text
    fields["target_new"], *more = every(row["target_new"]) or [""]
    if "{}" not in fields["prompt"]:
        fields["prompt"] = marked(fields["prompt"], fields["subject"])
    fields["paraphrases"] = (*fields.get("paraphrases", ()), *map(str, rephrased))
    fields["aliases"] = (*fields.get("aliases", ()), *more)
    follow = [*_bykind_of(portability, False), *_bykind_of(locality, True)]
    return [
        Fact(
            **fields,
            neighbours=(*near, *_pairs(locality)),
            portability=_pairs(portability),
            implications=tuple(follow),
        )
    ]


def _other_names(name: str) -> list[str]:
    return [alias for alias, of in _ALIASES.items() if of == name]


def _list(cell: Any) -> list[Any]:
    return list(cell) if isinstance(cell, list | tuple) else [cell]


def _first(answer: Any) -> str | None:
    if isinstance(answer, list | tuple):
        return next(iter(every(answer)), None)
    return None if answer is None else str(answer).strip()


def _near(row: Record) -> list[tuple[str, str]]:
    """The neighbours in EasyEdit's two columns, which the row loses."""
    prompt, answer = (row.pop(name, None) for name in _NEAR[1:])
    if prompt is None or answer is None:
        return []
    answers = [_first(one) or "" for one in _list(answer)]
    return list(zip(map(str, _list(prompt)), answers, strict=False))


def _pairs(cell: Any) -> tuple[tuple[str, str], ...]:
    """(prompt, first answer) of a plain list of records."""
    asked = [] if isinstance(cell, Mapping) else _asked(cell)
    return tuple((prompt, answers[0]) for prompt, answers in asked)


def _bykind_of(cell: Any, stays: bool) -> list[Implication]:
    """What lists of records by kind ask."""
    kinds = cell if isinstance(cell, Mapping) else {}
    return [
        Implication(prompt, tuple(answers), kind_of(name), stays)
        for name, records in kinds.items()
        for prompt, answers in _asked(records)
    ]


def _asked(records: Any) -> list[tuple[str, list[str]]]:
    """The prompt and the accepted answers of each record that has an answer."""
    found = []
    for record in records or []:
        try:
            prompt = record["prompt"] if "prompt" in record else record["loc"]
            answers = every(record["ground_truth" if "prompt" in record else "loc_ans"])
        except (KeyError, TypeError) as error:
            raise FactError(
                f"{record!r} is no prompt with its answer: it needs prompt and ground_truth, or "
                "loc and loc_ans."
            ) from error
        if answers:
            found.append((str(prompt), answers))
    return found
