"""Data sets: the published record formats (and the bundled world in them) as lists of `Fact`.

A path of None means the bundled world. Its records go through the same parsers as the real files.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pmet_lens.data import downloads, progress, world
from pmet_lens.data.facts import Fact, FactError, ends_word

Record = dict[str, Any]
LARGEST = 1 << 30
"""Bytes of a data file that is read whole (CounterFact, the largest there is, has 45 MB)."""
LONGEST = 1 << 24
"""Characters of a text in a text file."""
NQ = "nq question: "
"""What the locality prompts of zsRE begin with: they are questions of Natural Questions."""


class DataError(ValueError):
    """A data file, or a record in it, that cannot be used; the message names it."""


def counterfact(
    path: str | Path | None = None,
    n: int | None = None,
    *,
    download: bool = False,
    multi: bool = False,
) -> list[Fact]:
    """The first `n` facts (None: all) of CounterFact or MultiCounterFact.

    `path`: a JSON file in the original schema (https://rome.baulab.info/data/dsets/), or None for
    the bundled world. `download`: the published 21,919 records instead (45 MB, once), with `multi`
    the 20,877 of MultiCounterFact, without contradictions; see `downloads.fetch`.

    Raises:
        DataError: for an unreadable or truncated file or a record without a needed field, naming
            the record.
        DownloadError: where the published file cannot be had.
    """
    chosen = _chosen(path, download, "multi_counterfact" if multi else "counterfact")
    return _facts(chosen, n, lambda: world.build().counterfact(), counterfact_fact)


def zsre(
    path: str | Path | None = None, n: int | None = None, *, download: bool = False
) -> list[Fact]:
    """The first `n` facts (None: all) of zsRE in the MEND format (`zsre_mend_eval.json`).

    The question is the prompt, `answers[0]` the new answer, `rephrase` the paraphrase, and the
    "nq question: …" with its answer the neighbour; `benchmark` is "zsre". See `counterfact` for
    `path`, `download` (19,086 records) and errors. A record without such a locality prompt and its
    answer is refused, too: specificity could not be measured on it.
    """
    return _facts(_chosen(path, download, "zsre"), n, lambda: world.build().zsre(), zsre_fact)


def knowns(
    path: str | Path | None = None, n: int | None = None, *, download: bool = False
) -> list[Fact]:
    """The first `n` statements (None: all) a model knows (`known_1000.json` of ROME): facts with
    `target_true` and nothing to edit. None: every fact of the world, each in one phrasing.
    `download`: the 1,209 published ones."""
    chosen = _chosen(path, download, "knowns")
    return _facts(chosen, n, lambda: world.build().knowns(), parse_known)


def _chosen(path: str | Path | None, download: bool, name: str) -> str | Path | None:
    """The path given, or that of the downloaded data set."""
    if not download:
        return path
    if path is not None:
        raise DataError(f"download fetches the published file; leave out the path {str(path)!r}.")
    with progress.line(f"download of {name}", "B") as tell:
        return downloads.fetch(downloads.HOMES[name], on_bytes=tell)


class WorldTexts(Iterator[str]):
    """Endless text about the bundled world, which fits no other model."""

    def __init__(self) -> None:
        self._texts = world.build().texts()

    def __next__(self) -> str:
        return next(self._texts)


def texts(path: str | Path | None = None, *, download: bool = False) -> Iterator[str]:
    """Texts for second moments, in order; None: endless text about the bundled world, for its
    models alone (`second_moments` refuses it for others).

    `path`: a text file, each line that holds text a text of its own, or a `.parquet` file with a
    column "text". `download`: paragraphs of English Wikipedia (the first half of WikiText-103 raw,
    about 160 MB, once; headings left out), as the released code takes Wikipedia for its moments.

    Raises:
        DataError: when the file cannot be read as UTF-8, or as parquet with such a column.
        DownloadError: where the published file cannot be had.
    """
    path = _chosen(path, download, "texts")
    if path is None:
        return WorldTexts()
    return _paragraphs(Path(path)) if Path(path).suffix == ".parquet" else _lines(Path(path))


def _paragraphs(path: Path) -> Iterator[str]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=["text"]):
                stripped = (text.strip() for text in batch.column("text").to_pylist() if text)
                yield from (text for text in stripped if text and not text.startswith("= "))
    # pyarrow raises KeyError for a column that is not there.
    except (OSError, ArrowException, KeyError, IndexError) as error:
        raise DataError(
            f'{path} cannot be read as parquet with a column "text": {error}'
        ) from error


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            while line := file.readline(LONGEST):
                if len(line) == LONGEST:
                    raise DataError(
                        f"{path} has a line of {LONGEST:,} characters or more; put every text on a "
                        "line of its own."
                    )
                if line.strip():
                    yield line.strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _facts(
    path: str | Path | None,
    n: int | None,
    bundled: Callable[[], list[Record]],
    parse: Callable[[Record], Fact],
) -> list[Fact]:
    if n is not None and (not isinstance(n, int) or n < 0):
        raise DataError(f"n must be a whole number ≥ 0 or None, not {n!r}.")
    records = bundled() if path is None else _read(Path(path))
    facts = []
    for i, record in enumerate(itertools.islice(records, n)):
        where = f"record {i}" + (f" of {path}" if path is not None else "")
        try:
            facts.append(parse(record))
        except FactError as error:
            raise DataError(f"{where} cannot be used: {error}") from error
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise DataError(
                f"{where} does not have the expected fields ({type(error).__name__}: {error}); "
                "check that this is the data set the loader is for."
            ) from error
    return facts


def _read(path: Path) -> list[Record]:
    try:
        check_size(path)
        records = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}).") from error
    except json.JSONDecodeError as error:
        whole = _whole_records(path.read_text(encoding="utf-8"))
        raise DataError(
            f"{path} is not valid JSON from line {error.lineno} on, in record {whole}; "
            f"{whole} records before it are whole. Was the file cut short? Fetch it again."
        ) from error
    if not isinstance(records, list):
        raise DataError(f"{path} holds a JSON {type(records).__name__}, not a list of records.")
    return records


def check_size(path: Path) -> None:
    """Refuse a file that is too large to be a list of facts, before it fills the memory."""
    size = path.stat().st_size
    if size > LARGEST:
        raise DataError(
            f"{path} has {size / 1e9:.1f} GB; a file of facts has at most {LARGEST / 1e9:.1f}. "
            "Is it the right one? Otherwise split it."
        )


def _whole_records(text: str) -> int:
    """How many complete records a damaged JSON list begins with."""
    decoder, at, count = json.JSONDecoder(), text.find("[") + 1, 0
    while at > 0:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        try:
            _, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            break
        count += 1
    return count


def counterfact_fact(record: Record) -> Fact:
    """One record of CounterFact as a `Fact`."""
    rewrite = record["requested_rewrite"]
    true = rewrite["target_true"]["str"]
    neighbours = [
        # Some editions give a neighbour its answer; elsewhere it is the record's true one.
        (prompt, true) if isinstance(prompt, str) else (prompt["prompt"], prompt["target"])
        for prompt in record.get("neighborhood_prompts", ())
    ]
    return Fact(
        subject=rewrite["subject"],
        prompt=rewrite["prompt"],
        target_new=rewrite["target_new"]["str"],
        target_true=true,
        paraphrases=tuple(record.get("paraphrase_prompts", ())),
        neighbours=tuple(neighbours),
        attributes=tuple(record.get("attribute_prompts", ())),
        generation=tuple(record.get("generation_prompts", ())),
        relation=rewrite.get("relation_id"),
        case_id=record["case_id"],
    )


def zsre_fact(record: Record) -> Fact:
    """One record of zsRE in the MEND format as a `Fact`."""
    subject = record["subject"]
    return Fact(
        subject=subject,
        prompt=marked(record["src"], subject),
        target_new=record["answers"][0],
        paraphrases=(record["rephrase"],),
        neighbours=(_locality(record),),
        benchmark="zsre",
    )


def _locality(record: Record) -> tuple[str, str]:
    """The locality prompt of a zsRE record, as the published evaluation writes it (with a question
    mark), and its answer."""
    prompt, answer = record.get("loc"), record.get("loc_ans")
    if not isinstance(prompt, str) or not prompt.removeprefix(NQ).strip(" ?"):
        raise FactError("it has no locality prompt: `loc` must be a question, 'nq question: …'.")
    if not prompt.startswith(NQ):
        raise FactError(f"its locality prompt `loc` is {prompt!r}; it must begin with {NQ!r}.")
    if not isinstance(answer, str) or not answer.strip():
        raise FactError(f"its locality prompt {prompt!r} has no answer in `loc_ans`.")
    return f"{prompt}?", answer


def parse_known(record: Record) -> Fact:
    """One record of `known_1000.json`'s schema as a `Fact`."""
    return Fact(
        subject=record["subject"],
        prompt=marked(record["prompt"], record["subject"]),
        target_true=record["attribute"],
        relation=record.get("relation_id"),
        case_id=record["known_id"],
    )


def marked(text: str, subject: str) -> str:
    """`text` with the first occurrence of the subject as whole words replaced by `{}`."""
    at = text.find(subject)
    if at < 0:
        raise FactError(f"the subject {subject!r} does not occur in {text!r}.")
    while at >= 0:
        stop = at + len(subject)
        if ends_word(text, at) and ends_word(text, stop):
            return f"{text[:at]}{{}}{text[stop:]}"
        at = text.find(subject, at + 1)
    raise FactError(
        f"the subject {subject!r} stands only inside a word of {text!r}; give the whole word as "
        "the subject."
    )
