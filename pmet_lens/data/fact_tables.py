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


def read_facts(source: str | Path | pd.DataFrame, n: int | None = None) -> list[Fact]:
    """Your facts, from a table with the columns subject, prompt and target_new.

    `source`: a CSV file with a header, a JSON list of objects (or one object per line, `.jsonl`),
    or a DataFrame. The prompt marks the subject with `{}`, or holds it once. Other columns with the
    name of a field of `Fact` are taken, too (target_true, relation, case_id; paraphrases,
    generation and attributes as lists, or in CSV separated by "|"); unknown ones are refused, since
    they are mostly typing errors. Empty cells are as if they were not there.

    Raises:
        DataError: for a file that cannot be read, missing or unknown columns, or a row that is no
            fact, naming the row.
    """
    table = source if isinstance(source, pd.DataFrame) else _table(Path(source))
    unknown = [c for c in table.columns if c not in _COLUMNS]
    missing = [c for c in _NEEDED if c not in table.columns]
    if missing or unknown:
        wrong = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(map(str, unknown))}"
        raise DataError(
            f"The table of facts {wrong}. It needs subject, prompt and target_new, and may have "
            f"{', '.join(_COLUMNS[3:])}."
        )
    facts = []
    for i, row in enumerate(table.head(n if n is not None else len(table)).to_dict("records")):
        given = {str(k): v for k, v in row.items() if isinstance(v, list | tuple) or not pd.isna(v)}
        try:
            facts.append(_fact(given))
        except FactError as error:
            raise DataError(f"Row {i} of the facts (counted from 0): {error}") from error
    return facts


def _fact(row: dict[str, Any]) -> Fact:
    """The fact in one row of a table without its empty cells."""
    for name in _NEEDED:
        if name not in row:
            raise FactError(f"it has no {name}.")
    fields: dict[str, Any] = {"case_id": row.pop("case_id", None)}
    for name, cell in row.items():
        if name in _LISTS:
            parts = cell.split("|") if isinstance(cell, str) else cell
            fields[name] = tuple(part.strip() for part in parts)
        else:
            fields[name] = str(cell).strip()
    if "{}" not in fields["prompt"]:
        fields["prompt"] = marked(fields["prompt"], fields["subject"])
    return Fact(**fields)


def _table(path: Path) -> pd.DataFrame:
    kind = path.suffix.lower()
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
