"""Facts to token batches: where the subject ends, where the answer is predicted, what is padding.

Text is tokenised once and whole, and positions are found by character offsets; nothing is counted
by tokenising pieces, so that accents, repeated subjects and merges at the seams do no harm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pmet_lens.data.facts import Fact, FactError
from pmet_lens.models.model import Model

Position = Literal["last_subject", "first_subject", "last"]
"""A token of a prompt: the last and the first of the subject, the last before the answer."""

PLAIN = "{}"
KL_PROMPT = "{} is a"
"""The prompt on which the edit should change nothing (released code: `compute_z.py`)."""


@dataclass(frozen=True)
class Prompt:
    """A template with one `{}` for `subject`, and the answer that is to be predicted, if any.

    A complete text without a marked subject has `subject=None`.
    """

    template: str
    subject: str | None = None
    target: str | None = None
    blank: bool | None = None
    """As `Fact.blank`."""

    @property
    def text(self) -> str:
        """The prompt without its target."""
        if self.subject is None:
            return self.template
        return self.template.replace("{}", self.subject, 1)


@dataclass(frozen=True)
class Batch:
    """Right-padded rows. Of a target all tokens but the last are in `ids` (teacher forcing)."""

    ids: Int[Tensor, "row token"]
    mask: Int[Tensor, "row token"]
    subject: Int[Tensor, " row"]
    """Position of the last subject token; of the last prompt token where no subject is marked."""
    first: Int[Tensor, " row"]
    """Position of the first subject token; as `subject` where none is marked."""
    last: Int[Tensor, " row"]
    """Position of the last prompt token, which predicts the first target token."""
    labels: Int[Tensor, "row token"]
    """The target token predicted at each position, -100 where none is."""

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, rows: Tensor) -> Batch:
        """The chosen rows (indices or boolean mask), columns that hold only padding cut off."""
        mask = self.mask[rows]
        width = max(1, int(mask.sum(1).max())) if len(mask) else 1
        places = self.subject[rows], self.first[rows], self.last[rows]
        return Batch(self.ids[rows, :width], mask[:, :width], *places, self.labels[rows, :width])

    def after(self, start: Int[Tensor, " row"]) -> tuple[Batch, Int[Tensor, "row token"]]:
        """The tokens from `start` on as a batch, and the column in this batch that each of its
        places came from."""
        rest = self.mask.sum(1) - start
        column = start[:, None] + torch.arange(int(rest.max()), device=start.device)
        inside = (column - start[:, None]) < rest[:, None]
        column = column.clamp(max=self.ids.shape[1] - 1)
        labels = self.labels.gather(1, column).masked_fill(~inside, -100)
        places = self.subject - start, self.first - start, self.last - start
        return Batch(self.ids.gather(1, column), inside.long(), *places, labels), column

    def up_to(self, position: Position) -> Batch:
        """The tokens up to `position`, which nothing later can change; without labels."""
        place = self.at(position)
        mask = self.mask * (torch.arange(self.ids.shape[1], device=place.device) <= place[:, None])
        cut = replace(self, mask=mask, labels=torch.full_like(self.labels, -100))
        return cut[torch.arange(len(self), device=place.device)]

    def at(self, position: Position) -> Int[Tensor, " row"]:
        """Where `position` lies in each row."""
        places = {"last_subject": self.subject, "first_subject": self.first, "last": self.last}
        return places[position]

    @property
    def scored(self) -> Bool[Tensor, "row token"]:
        """Where a target token is predicted."""
        return self.labels != -100


def with_context(context: str, template: str) -> str:
    """The template after a context such as "I am. {}"."""
    return context.replace("{}", template, 1)


def chunks(
    lengths: Sequence[int],
    budget: int,
    then: Sequence[int] | None = None,
    *,
    reads: Sequence[int] | None = None,
    readable: int = 0,
    padding: int | None = None,
) -> list[list[int]]:
    """The numbers of the rows that share a batch: sorted by length (those of one length by `then`),
    as many as `budget` tokens allow with the padding to the longest (one at least).

    `reads`: at how many tokens the logits of each row are read; of a batch at most at `readable`
    (`likelihood.readable`: they are as wide as the vocabulary). `padding`: as pad at most so many
    tokens (None: any number).
    """
    batches: list[list[int]] = []
    second, read, pad = lengths if then is None else then, 0, 0
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], second[i])):
        more = 0 if reads is None else reads[i]
        # Sorted: the newest is the longest, so all are padded to it.
        fits = batches and (len(batches[-1]) + 1) * lengths[i] <= budget
        if fits:
            pad += len(batches[-1]) * (lengths[i] - lengths[batches[-1][-1]])
        if fits and read + more <= readable and (padding is None or pad <= padding):
            batches[-1].append(i)
            read += more
        else:
            batches.append([i])
            read, pad = more, 0
    return batches


def pad(
    model: Model, rows: Sequence[Sequence[int]]
) -> tuple[Int[Tensor, "row token"], Int[Tensor, "row token"]]:
    """Token ids padded on the right to the longest row, and the mask (1 where there is a token), on
    the model's device."""
    ids = _stack(model, rows, int(model.tokenizer.pad_token_id))
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    return ids, (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()


def _stack(model: Model, rows: Sequence[Sequence[int]], fill: int) -> Int[Tensor, "row token"]:
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=fill).to(model.device)


def encode(model: Model, prompts: Sequence[Prompt]) -> Batch:
    """Tokenise `prompts` into one batch on the model's device.

    Raises:
        FactError: if a subject is not found in the tokens, a prompt or target has no token, or
            a text is longer than the model's context.
    """
    frame = model.frame
    texts = [
        frame.around(p.text) if p.target is None else frame.answered(p.text, p.target, p.blank)
        for p in prompts
    ]
    # A chat template writes the special tokens itself.
    encoded = model.tokenizer(texts, return_offsets_mapping=True, add_special_tokens=not frame)
    limit = model.n_positions
    rows, labels, places = [], [], []
    for prompt, text, ids, offsets in zip(
        prompts, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        if len(ids) > limit:
            raise FactError(
                f"{text[:60]!r}… has {len(ids)} tokens, but the model reads at most {limit}; "
                "shorten it."
            )
        end = len(frame.around(prompt.text))
        ids, offsets = _without_end(ids, offsets)
        if prompt.target is not None and any(a < end < b for a, b in offsets):
            ids, offsets = _in_two(model, text, end)
        # Special tokens have the empty span (0, 0); a token may carry the space before its word.
        answer = [i for i, (a, b) in enumerate(offsets) if b > end and b > a]
        first = answer[0] if answer else len(ids)
        if prompt.target is not None and not answer:
            raise FactError(f"The target {prompt.target!r} of {prompt.text!r} has no token.")
        if first == 0:
            raise FactError(f"The prompt {prompt.text!r} has no token before its answer.")
        subject = _subject_tokens(model, prompt, ids, offsets, first)
        target = ids[first:]
        rows.append(ids[:-1] if target else ids)
        labels.append([-100] * (first - 1) + (target or [-100]))
        places.append((*subject, first - 1))
    ids, mask = pad(model, rows)
    subject_first, subject_last, last = torch.tensor(places, device=model.device).T
    return Batch(ids, mask, subject_last, subject_first, last, _stack(model, labels, -100))


_Tokens = tuple[list[int], list[tuple[int, int]]]


def _without_end(ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> _Tokens:
    """The tokens without the special ones behind the text, which some tokenizers put there (T5, or
    `add_eos_token=True`): nothing of a text goes on after its end. What stands before it stays."""
    stop = max((i + 1 for i, (a, b) in enumerate(offsets) if b > a), default=1)
    return list(ids[:stop]), list(offsets[:stop])


def _in_two(model: Model, text: str, seam: int) -> _Tokens:
    """The tokens of `text[:seam]`, as the model is asked it, and then those of the rest: without a
    blank in between some tokenizers would make one token of the end of a prompt and the beginning
    of its answer, which no model says after the prompt."""
    special = not model.frame
    ids, offsets = plain_ids(model, text[:seam], special)
    more, places = plain_ids(model, text[seam:], False)
    shifted = [(a + seam, b + seam) for a, b in places]
    # A blank that the tokenizer puts before any text (Llama's "▁").
    if len(more) > 1 and not model.tokenizer.decode(more[:1]).strip():
        more, shifted = more[1:], shifted[1:]
    return ids + more, offsets + shifted


def plain_ids(model: Model, text: str, special: bool) -> _Tokens:
    """The tokens of one text and their places in it, with the special tokens before it (if
    `special`) and none behind."""
    encoded = model.tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
    return _without_end(encoded["input_ids"], encoded["offset_mapping"])


def prompt_ids(model: Model, prompts: Sequence[str]) -> list[list[int]]:
    """The tokens of the prompts, inside the chat template where there is one (which writes special
    tokens itself). Raises `FactError` for a prompt without a token."""
    rows = []
    for prompt in prompts:
        rows.append(plain_ids(model, model.frame.around(prompt), not model.frame)[0])
        if not rows[-1]:
            raise FactError(f"The prompt {prompt!r} has no token to continue.")
    return rows


def _subject_tokens(
    model: Model, prompt: Prompt, ids: Sequence[int], offsets: Sequence[tuple[int, int]], first: int
) -> tuple[int, int]:
    """First and last token of the subject; `first`: the first token of the answer."""
    if prompt.subject is None:
        return first - 1, first - 1
    start = len(model.frame.head) + prompt.template.index("{}")
    stop = start + len(prompt.subject.rstrip())
    inside = [i for i, (a, b) in enumerate(offsets[:first]) if a < stop and b > start and b > a]
    if not inside:
        raise FactError(
            f"The subject {prompt.subject!r} was not found in the tokens of {prompt.text!r}; "
            "check that it is spelt as in the prompt and can be written by this tokenizer."
        )
    # A blank that the tokenizer puts before the text (Llama's "▁") has the first letter's span.
    while len(inside) > 1 and not model.tokenizer.decode([ids[inside[0]]]).strip():
        inside.pop(0)
    return inside[0], inside[-1]


def shown(model: Model, fact: Fact) -> tuple[Batch, list[str]]:
    """The prompt of one fact as a batch of one row without a target, and the text of its tokens."""
    batch = encode(model, [Prompt(fact.prompt, fact.subject)])
    return batch, [model.tokenizer.decode([token]) for token in batch.ids[0].tolist()]


def prompts_of(fact: Fact, contexts: Sequence[str], target: str | None = None) -> list[Prompt]:
    """The fact's prompt plain, then after each context prefix."""
    prefixed = [c for c in contexts if c != PLAIN]
    templates = [with_context(c, fact.prompt) for c in (PLAIN, *prefixed)]
    return [Prompt(template, fact.subject, target, fact.blank) for template in templates]


def twins(model: Model, facts: Sequence[Fact], position: Position = "last_subject") -> str:
    """In words, the first two facts that are the same tokens up to the edited one, where every
    layer therefore sees the same; "" where there are none."""
    rows = encode(model, [prompts_of(fact, ())[0] for fact in facts])
    seen: dict[tuple[int, ...], int] = {}
    for i, end in enumerate(rows.at(position).tolist()):
        ids = tuple(rows.ids[i, : end + 1].tolist())
        if (first := seen.setdefault(ids, i)) < i:
            pair = " and ".join(repr(facts[k].text) for k in (first, i))
            return f"{pair} (facts {first} and {i}) are the same up to the edited token."
    return ""
