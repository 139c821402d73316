"""Facts from a CSV or JSON file or a DataFrame: the easiest way in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from pmet_lens.data.datasets import DataError, check_size, marked
from pmet_lens.data.facts import Fact, FactError

_NEEDED = ("subject", "prompt", "target_new")
_LISTS = ("paraphrases", "generation", "attributes")
_COLUMNS = (*_NEEDED, "target_true", "relation", "case_id", *_LISTS)
# What EasyEdit, KnowEdit and QAEdit call the same things.
_ALIASES = {"target": "target_new", "ground_truth": "target_true", "id": "case_id"}
_REPHRASED = ("rephrase_prompt", "rephrase")
_NEAR = ("locality", "locality_prompt", "locality_ground_truth")
_UNREAD = ("source", "cond")
_KNOWN = {*_COLUMNS, *_ALIASES, *_REPHRASED, *_NEAR, "portability", *_UNREAD}


def read_facts(source: str | Path | pd.DataFrame, n: int | None = None) -> list[Fact]:
    """Your facts, from a table with the columns subject, prompt and target_new.

    `source`: a CSV file with a header, a JSON list of objects (or one object per line, `.jsonl`),
    or a DataFrame; files also behind `.gz`. The prompt marks the subject with `{}`, or holds it
    once. Other columns with the name of a field of `Fact` are taken, too (target_true, relation,
    case_id; paraphrases, generation and attributes as lists, or in CSV separated by "|"); unknown
    ones are refused, since they are mostly typing errors. Empty cells are as if they were not
    there.

    The records of EasyEdit, KnowEdit and QAEdit are read as they are: target and ground_truth (the
    new and the true answer), rephrase and rephrase_prompt (paraphrases), locality_prompt with its
    ground_truth, and the lists of locality (neighbours) and portability, whatever their kinds. Of
    several accepted answers the first is taken; a list without prompts is none.

    Raises:
        DataError: for a file that cannot be read, missing or unknown columns, or a row that is no
            fact, naming the row.
    """
    table = source if isinstance(source, pd.DataFrame) else _table(Path(source))
    unknown = [c for c in table.columns if c not in _KNOWN or _ALIASES.get(c) in table.columns]
    missing = [c for c in _NEEDED if not {c, *_other_names(c)} & set(table.columns)]
    if missing or unknown:
        wrong = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(map(str, unknown))}"
        raise DataError(
            f"The table of facts {wrong}. It needs subject, prompt and target_new, and may have "
            f"{', '.join(_COLUMNS[3:])}."
        )
    facts = []
    for i, row in enumerate(table.head(n if n is not None else len(table)).to_dict("records")):
        try:
            facts.append(_fact({str(k): v for k, v in row.items() if not _empty(v)}))
        except FactError as error:
            raise DataError(f"Row {i} of the facts (counted from 0): {error}") from error
    return facts


def _fact(row: dict[str, Any]) -> Fact:
    """The fact in one row of a table without its empty cells."""
    row = {_ALIASES.get(name, name): cell for name, cell in row.items() if name not in _UNREAD}
    near, portability = _near(row), tuple(_asked(row.pop("portability", None)))
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
    if "{}" not in fields["prompt"]:
        fields["prompt"] = marked(fields["prompt"], fields["subject"])
    fields["paraphrases"] = (*fields.get("paraphrases", ()), *map(str, rephrased))
    return Fact(**fields, neighbours=near, portability=portability)


def _other_names(name: str) -> list[str]:
    return [alias for alias, of in _ALIASES.items() if of == name]


def _empty(cell: Any) -> bool:
    return not isinstance(cell, list | tuple | dict) and bool(pd.isna(cell))


def _list(cell: Any) -> list[Any]:
    return list(cell) if isinstance(cell, list | tuple) else [cell]


def _first(answer: Any) -> str | None:
    """The first of the accepted answers, however deep in lists; None where there is none."""
    while isinstance(answer, list | tuple):
        answer = next(iter(answer), None)
    return None if answer is None else str(answer).strip()


def _near(row: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """The neighbours of a row, which loses their cells."""
    prompt, answer = (row.pop(name, None) for name in _NEAR[1:])
    pairs = _asked(row.pop("locality", None))
    if prompt is None or answer is None:
        return tuple(pairs)
    answers = [_first(one) or "" for one in _list(answer)]
    return (*zip(map(str, _list(prompt)), answers, strict=False), *pairs)


def _asked(cell: Any) -> list[tuple[str, str]]:
    """The (prompt, answer) pairs of a list of records, or of lists by kind."""
    records = [r for part in cell.values() for r in part] if isinstance(cell, dict) else cell or []
    pairs = []
    for record in records:
        try:
            prompt = record["prompt"] if "prompt" in record else record["loc"]
            answer = _first(record["ground_truth" if "prompt" in record else "loc_ans"])
        except (KeyError, TypeError) as error:
            raise FactError(
                f"{record!r} is no prompt with its answer: it needs prompt and ground_truth, or "
                "loc and loc_ans."
            ) from error
        if answer:
            pairs.append((str(prompt), answer))
    return pairs


def _table(path: Path) -> pd.DataFrame:
    kind = path.with_suffix("").suffix.lower() if path.suffix == ".gz" else path.suffix.lower()
    try:
        check_size(path)
        if kind in (".json", ".jsonl"):
            return pd.read_json(path, lines=kind == ".jsonl", dtype=False)  # pyright: ignore[reportArgumentType]
        return pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except DataError:
        raise
    except ValueError as error:  # also what pandas makes of a broken file
        raise DataError(
            f"{path} cannot be read as a table of facts: {error}. Give a CSV file with a header, a "
            "JSON list of objects, or .jsonl."
        ) from error
