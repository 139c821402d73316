"""What an edit is about: a subject, a prompt with one `{}` for it, and the answer wanted."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from pmet_lens.data import markup
from pmet_lens.data.words import ends_word as ends_word
from pmet_lens.data.words import writes_blanks as writes_blanks

BENCHMARKS = ("zsre",)
"""Benchmarks that are scored in their own way; see `Fact.benchmark`."""
_OPTIONAL = ("target_new", "target_true", "relation", "benchmark")
_TEXTS = ("paraphrases", "attributes", "generation", "aliases")
_PAIRS = ("neighbours", "portability")
_LATER = ("portability", "blank", "aliases", "implications")


class FactError(ValueError):
    """A fact, or a list of facts, that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Implication:
    """A prompt that an edit has consequences for: its answer follows from the new one, or has to
    stay. Immutable; validated when built."""

    prompt: str
    """Complete text that ends right before the answer."""
    answers: tuple[str, ...]
    """Each of them is right; the first is the usual name. At least one."""
    kind: str = "second hop"
    """What links it to the edit, in the words of RippleEdits (arXiv 2307.12976) where they fit:
    "subject aliasing", "logical generalization", "compositionality i", "relation specificity",
    "forgetfulness". Metrics are also given per kind."""
    stays: bool = False
    """Whether the answer is that of before, which an edit must keep (locality); False: it follows
    from the new answer (portability)."""

    def __post_init__(self) -> None:
        for name in ("prompt", "kind"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise FactError(f"{name} of an implication takes one text, not {value!r}.")
            object.__setattr__(self, name, value.rstrip())
        given = self.answers
        if not isinstance(given, list | tuple) or not all(isinstance(one, str) for one in given):
            raise FactError(f"answers of {self.prompt!r} takes a list of texts, not {given!r}.")
        known = tuple(dict.fromkeys(one.strip() for one in given if one.strip()))
        if not known:
            raise FactError(f"{self.prompt!r} has no accepted answer; leave it out.")
        object.__setattr__(self, "answers", known)


@dataclass(frozen=True)
class Fact:
    """One statement about one subject. Immutable; validated when built.

    Targets are written without the leading space; it is put before them when they are tokenised,
    unless the script writes none (`blank`). Prompts other than `prompt` are complete texts that end
    right before the answer. Blanks around subject and answers and behind prompts are taken off,
    and lists become tuples.
    """

    subject: str
    prompt: str
    """Template with exactly one `{}`, where the subject goes: "{} plays the sport of"."""
    target_new: str | None = None
    """The answer an edit should produce. `None` for statements that are only studied."""
    target_true: str | None = None
    """The answer before the edit, where it is known; needed by comparisons such as ES."""
    paraphrases: tuple[str, ...] = ()
    """Other phrasings of the prompt, subject included."""
    neighbours: tuple[tuple[str, str], ...] = ()
    """(prompt, answer) pairs about other subjects; the answers must survive the edit."""
    attributes: tuple[str, ...] = ()
    """Prompts about subjects for which `target_new` is true (CounterFact's attribute prompts)."""
    generation: tuple[str, ...] = ()
    """Prompts that invite free text about the subject."""
    relation: str | None = None
    """Name of the relation, a Wikidata property id in CounterFact."""
    case_id: int | str | None = None
    """Identifier of the record in its data set."""
    benchmark: str | None = None
    """"zsre" for facts that `summarise` also scores as zsRE does; None for all others."""
    portability: tuple[tuple[str, str], ...] = ()
    """(prompt, answer) pairs whose answer follows from `target_new`, such as a second hop; with a
    kind or several accepted answers: `implications`."""
    blank: bool | None = None
    """Whether a blank stands between prompt and answer. None: as the prompt's script has it
    (`writes_blanks`): not in Chinese, Japanese, Thai, Lao, Khmer, Burmese and Tibetan."""
    aliases: tuple[str, ...] = ()
    """Other names of `target_new`, right as well where an answer is free ("USA" for "the United
    States"). An edit does not read them."""
    implications: tuple[Implication, ...] = ()
    """What follows from the new answer, and what must stay, each with its kind."""

    def __post_init__(self) -> None:
        self._take_types()
        if not self.subject.strip():
            raise FactError(f"The fact with prompt {self.prompt!r} has an empty subject.")
        holes = self.prompt.count("{}")
        if holes != 1:
            raise FactError(
                f"The prompt {self.prompt!r} has {holes} places marked {{}}; it needs exactly one, "
                "where the subject goes."
            )
        place = self.prompt.index("{}") + len(self.subject)
        if not ends_word(self.text, place):
            raise FactError(
                f"The subject {self.subject!r} ends inside a word of {self.text!r}; give the whole "
                "word as the subject, or spell it as the prompt does."
            )
        for name in ("target_new", "target_true"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise FactError(
                    f"{name} of {self.text!r} is empty; give the answer's text, or None when there "
                    "is none."
                )
        if self.target_new is None and self.target_true is None:
            raise FactError(f"{self.text!r} has neither target_new nor target_true; give one.")
        if self.benchmark is not None and self.benchmark not in BENCHMARKS:
            raise FactError(
                f"Unknown benchmark {self.benchmark!r}; leave it out, or choose from "
                f"{', '.join(BENCHMARKS)}."
            )

    def _take_types(self) -> None:
        """Refuse what a field does not take; take off blanks that change tokens and no meaning."""
        for name in ("subject", "prompt", *_OPTIONAL):
            value = getattr(self, name)
            if not (isinstance(value, str) or (value is None and name in _OPTIONAL)):
                none = " or None" if name in _OPTIONAL else ""
                raise FactError(f"{name} takes one text{none}, not {value!r}.")
            if value is not None and name != "relation":
                whole = value.rstrip() if name == "prompt" else value.strip()
                object.__setattr__(self, name, whole)
        for name in _TEXTS:
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        for name in _PAIRS:
            object.__setattr__(self, name, _pairs(name, getattr(self, name)))
        given: Any = self.implications
        if not isinstance(given, list | tuple) or not all(
            isinstance(i, Implication) for i in given
        ):
            raise FactError(f"implications takes a list of pl.Implication, not {given!r}.")
        object.__setattr__(self, "implications", tuple(given))

    def record(self) -> dict[str, Any]:
        """The fields as JSON takes them. Those that came later are there only where they say
        something, so that facts without them keep their hashes."""
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        record["implications"] = tuple(asdict(one) for one in self.implications)
        return {k: v for k, v in record.items() if k not in _LATER or v not in ((), None)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Fact:
        """The inverse of `record`, also after JSON, which turns tuples into lists. Fields that came
        later than the record (`benchmark`) take their defaults."""
        listed = {k: tuple(v) for k, v in record.items() if isinstance(v, list)}
        pairs = {k: tuple(tuple(pair) for pair in record.get(k, ())) for k in _PAIRS}
        follow = tuple(Implication(**one) for one in record.get("implications", ()))
        return cls(**{**record, **listed, **pairs, "implications": follow})

    def _repr_html_(self) -> str:
        neighbours = [f"{prompt} → {answer}" for prompt, answer in self.neighbours]
        shown = {
            "prompt": self.text,
            "new answer": self.target_new,
            "true answer": self.target_true,
            "relation": self.relation,
            "paraphrases": markup.listed(self.paraphrases),
            "portability": markup.listed([f"{p} → {answer}" for p, answer in self.portability]),
            "neighbours": markup.listed(neighbours),
            "implications": markup.listed(
                [f"{one.prompt} → {one.answers[0]} ({one.kind})" for one in self.implications]
            ),
        }
        return markup.pairs({k: v for k, v in shown.items() if v}, f"Fact about {self.subject}")

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)


def listed(facts: object) -> list[Fact]:
    """The facts as a list, whether one or several are given.

    Raises:
        FactError: for anything else than facts.
    """
    if isinstance(facts, Fact):
        return [facts]
    several: list[Any] = list(facts) if isinstance(facts, Iterable) else [facts]
    wrong = [type(fact).__name__ for fact in several if not isinstance(fact, Fact)]
    if wrong:
        raise FactError(
            f"facts must be a Fact or a list of them, not {wrong[0]}; make one with "
            "pl.Fact(subject, prompt, target_new), or read a table with pl.read_facts."
        )
    return several


def with_answer(facts: object, answer: str, needed_by: str) -> dict[int, Fact]:
    """The facts that have this `answer` ("target_true", "target_new"), by their place in the list;
    the others are left out, with a warning.

    Raises:
        FactError: where none has, or for anything else than facts.
    """
    if answer not in ("target_true", "target_new"):
        raise FactError(f"answer must be target_true or target_new, not {answer!r}.")
    several = listed(facts)
    usable = {i: f for i, f in enumerate(several) if getattr(f, answer) is not None}
    if not usable:
        raise FactError(f"{needed_by} needs facts with {answer}; there are none.")
    if left_out := len(several) - len(usable):
        warnings.warn(
            f"{left_out} of {len(several)} facts have no {answer} and are left out of {needed_by}.",
            stacklevel=3,
        )
    return usable


def _texts(name: str, value: Any) -> tuple[str, ...]:
    """A list of texts; one text in its place would be taken letter by letter."""
    if isinstance(value, list | tuple) and all(isinstance(text, str) for text in value):
        return tuple(text.rstrip() for text in value)
    raise FactError(f"{name} takes a list of texts, not {value!r}; put one text into a list.")


def _pairs(name: str, value: Any) -> tuple[tuple[str, str], ...]:
    if isinstance(value, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        for pair in value
    ):
        return tuple((prompt.rstrip(), answer.strip()) for prompt, answer in value)
    raise FactError(f"{name} takes a list of (prompt, answer) pairs of texts, not {value!r}.")


def check_editable(facts: Sequence[Fact]) -> None:
    """Refuse fact lists that no edit can satisfy, or that say one thing twice.

    Two facts contradict each other if they ask for different answers to one prompt about a subject,
    or to one relation of it in other words, unless that had different true answers: then it admits
    several (Istanbul has more than one twin city in CounterFact). Two facts are the same if at most
    their `case_id` differs; one answer in several phrasings is no repetition.

    Raises `FactError` for an empty list, and the first of `refused`; the message names the facts.
    """
    if not facts:
        raise FactError("There are no facts to edit; pass at least one Fact.")
    for _, error in refused(facts):
        raise error


def refused(facts: Iterable[Fact]) -> Iterator[tuple[int, FactError]]:
    """The number of each fact without `target_new`, that contradicts one before it, or is there
    already, and why in words; it counts as not there for those after it."""
    seen: set[str] = set()
    asked: dict[tuple[str, str], Fact] = {}
    related: dict[tuple[str, str | None], list[Fact]] = {}
    for number, fact in enumerate(facts):
        same = related.setdefault((fact.subject, fact.relation), [])
        try:
            if fact.target_new is None:
                raise FactError(f"{fact.text!r} has no target_new; an edit needs the new answer.")
            first = asked.get((fact.subject, fact.prompt), fact)
            if first.target_new != fact.target_new:
                both = f"{fact.text!r} should be both {first.target_new!r} and {fact.target_new!r}."
                raise FactError(f"Two facts contradict each other: {both} Keep one of them.")
            for other in same if fact.relation is not None else ():
                _check_agree(other, fact)
            if (one := repr(replace(fact, case_id=None))) in seen:
                told = f"{fact.text!r} should be {fact.target_new!r}. Keep one."
                raise FactError(f"A fact is there twice: {told}")
        except FactError as error:
            yield number, error
        else:
            asked[fact.subject, fact.prompt] = fact
            same.append(fact)
            seen.add(one)


def _check_agree(first: Fact, second: Fact) -> None:
    """Refuse two answers to one relation of one subject, unless it is known to have several."""
    several = None not in (first.target_true, second.target_true) and (
        first.target_true != second.target_true
    )
    if first.target_new != second.target_new and not several:
        raise FactError(
            f"Two facts contradict each other: relation {first.relation!r} of {first.subject!r} "
            f"should be both {first.target_new!r} ({first.text!r}) and {second.target_new!r} "
            f"({second.text!r}). Keep one of them."
        )
