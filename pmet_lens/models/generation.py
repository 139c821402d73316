"""Text from a model, with transformers' own `generate` (keys and values are kept) on a copy that
shares the weights, edits included: many prompts at once, each as if it were alone."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pmet_lens.data.facts import FactError
from pmet_lens.data.progress import Tell, line, shown
from pmet_lens.models.likelihood import readable
from pmet_lens.models.model import Model
from pmet_lens.models.sites import ModelError
from pmet_lens.models.tokens import PLAIN, chunks, plain_ids

Choose = Callable[[Sequence[int], Tensor], Sequence[int]]
"""The next token of each of these rows, from their logits `[row, vocab]` (float32, on the CPU)."""
SEEDS = ("The", "Therefore", "Because", "I", "You")
"""First words of the context prefixes (released code: `util/generate.py` callers, PMET main)."""
_OPENERS = (
    "The In A It He This As At On For She When After One During They Although From With Many Since "
    "Most By An There While Some His According Its Both Her Until Two Each Despite Because Between"
)
_SPARE = 1.06
OPENERS = tuple(_OPENERS.split(" "))
"""Words that English sentences begin with."""


def generate(model: Model, prompt: str, length: int = 100, top_k: int = 5, seed: int = 0) -> str:
    """`prompt` continued to `length` tokens in all, top-k sampled (1: greedy); stops at the
    end-of-text token. Deterministic in `seed`. Of a chat model: the prompt and the assistant's
    answer; the chat template around them is left out and not counted. Raises as `generate_batch`
    does."""
    if not isinstance(prompt, str):
        raise FactError(f"generate takes one prompt, not {prompt!r}; see generate_batch.")
    return generate_batch(model, [prompt], [seed], length, top_k)[0]


@shown("generation", "text", "on_prompts")
def generate_batch(
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    length: int = 100,
    top_k: int = 5,
    *,
    batch_tokens: int = 4096,
    on_prompts: Tell | None = None,
) -> list[str]:
    """Every prompt continued as `generate` does it alone, many in one forward pass.

    A text follows from its prompt and its seed (every prompt has its generator), not from what else
    is in the batch, as far as rounding does not decide between two tokens.
    `on_prompts`: called with (texts so far, all).

    Raises:
        ModelError: for a tokenizer without an end-of-text token, which no text could end with.
        FactError: for a prompt without a token, one string in place of a list, another number of
            seeds than of prompts, or `top_k` below 1.
    """
    check_end(model)
    if isinstance(prompts, str) or isinstance(seeds, int):
        raise FactError("prompts and seeds are lists; for one prompt call generate.")
    if len(prompts) != len(seeds) or top_k < 1:
        raise FactError(
            f"{len(prompts)} prompts need as many seeds, not {len(seeds)}, and top_k at least 1, "
            f"not {top_k}."
        )
    rows, limits = _begun(model, prompts, length)
    starts = [len(row) for row in rows]
    choose = None if top_k == 1 else _sampling(seeds, top_k)
    done = 0
    once, most = [1] * len(rows), readable(model)
    for chunk in chunks(limits, batch_tokens, starts, reads=once, readable=most):
        _extend(model, rows, chunk, limits, choose, model.tokenizer.eos_token_id)
        done += len(chunk)
        if on_prompts is not None:
            on_prompts(done, len(rows))
    return _whole(model, prompts, rows, starts)


def sampled_texts(
    model: Model,
    seed: int = 0,
    length: int = 100,
    batch_tokens: int = 16_000,
    *,
    n_tokens: int | None = None,
) -> Iterator[str]:
    """Text in the model's own words, for second moments where no other text is at hand: every text
    begins with one of `OPENERS` and goes on to `length` tokens (or as many as the model reads),
    sampled from the whole distribution of the model as it is now. Deterministic in `seed`. It ends
    as soon as the texts have `n_tokens` tokens together; None: never. `batch_tokens`: tokens of the
    texts that are written at once.

    Measured: MEMIT on SmolLM2-135M, 20 real facts at once, moments of 16,000 tokens: S 88.7 (NS
    80.7) with this text, 86.4 and 85.9 (NS 75.3 and 74.0) with two parts of Wikipedia; KL on other
    prompts 0.13 against 0.08 and 0.09, so Wikipedia protects a little better.

    Raises `ModelError` for a tokenizer without an end-of-text token, which no text could end with.
    """
    check_end(model)
    length = min(length, model.n_positions)
    first, made = seed << 32, 0
    while n_tokens is None or made < n_tokens:
        missing = batch_tokens if n_tokens is None else min(batch_tokens, n_tokens - made)
        # A few texts end early, and so many more steps for what then is missing cost far more.
        count = readable(model, round(_SPARE * missing / length))
        numbers = range(first, first + count)
        prompts = [OPENERS[n % len(OPENERS)] for n in numbers]
        rows, limits = _begun(model, prompts, length)
        starts = [len(row) for row in rows]
        choose, end = _sampling(numbers, len(model.tokenizer)), model.tokenizer.eos_token_id
        with line("sampling text", "token") as tell:
            _extend(model, rows, range(len(rows)), limits, choose, end, tell)
        first, made = numbers.stop, made + sum(map(len, rows))
        yield from _whole(model, prompts, rows, starts)


def contexts_of(model: Model, given: Sequence[str] | None) -> list[str]:
    """The context prefixes that were given; None: those the model samples. Raises `FactError` for
    one string in place of a list."""
    if isinstance(given, str):
        raise FactError(f"contexts takes a list of templates, not {given!r}; put it into a list.")
    return sample_contexts(model) if given is None else list(given)


def sample_contexts(model: Model, seed: int = 0, length: int = 10, top_k: int = 5) -> list[str]:
    """Context prefixes in the model's own words: one continuation of `length` tokens in all for
    each of `SEEDS`, top-k sampled, braces removed, then `". {}"`. Deterministic in `seed`.

    Source: 1–2 of the released `get_context_templates` (n_gen 1, length 10).
    """
    rows = [plain_ids(model, word, True)[0] for word in SEEDS]
    one, generators = torch.Generator().manual_seed(seed), []
    blank = torch.ones(min(top_k, len(model.embedding)))
    for row in rows:
        # All words are continued at once, each from where one after the other would have begun.
        generators.append(torch.Generator().set_state(one.get_state()))
        for _ in range(length - len(row)):
            torch.multinomial(blank, 1, generator=one)
    every, end = range(len(rows)), None  # a text that ended begins anew, as released
    _extend(model, rows, every, [length] * len(rows), _sampling(generators, top_k), end)
    texts = (model.tokenizer.decode(row, skip_special_tokens=True) for row in rows)
    return [PLAIN, *(" ".join(re.sub("[{}]", " ", text).split()) + ". {}" for text in texts)]


def answers(model: Model, prompts: Sequence[str], n_tokens: int = 6) -> list[str]:
    """What the model says next, greedily: up to `n_tokens` tokens after each prompt, cut at the end
    of the sentence or line, without blanks around. Raises `FactError` for a prompt without a
    token."""
    rows = _prompt_ids(model, prompts)
    starts = [len(row) for row in rows]
    limits = [min(n + n_tokens, model.n_positions) for n in starts]
    size, end = readable(model, len(rows)), model.tokenizer.eos_token_id
    for start in range(0, len(rows), size):
        _extend(model, rows, range(len(rows))[start : start + size], limits, None, end)
    return [re.split(r"[.!?](?:\s|$)|\n", t)[0].strip() for t in _decoded(model, rows, starts)]


def _prompt_ids(model: Model, prompts: Sequence[str]) -> list[list[int]]:
    """The tokens of the prompts, inside the chat template where there is one (which writes special
    tokens itself)."""
    rows = []
    for prompt in prompts:
        text, special = model.frame.around(prompt), not model.frame
        rows.append(plain_ids(model, text, special)[0])
        if not rows[-1]:
            raise FactError(f"The prompt {prompt!r} has no token to continue.")
    return rows


def _sampling(seeds: Sequence[int | torch.Generator], top_k: int) -> Choose:
    """Sampling from the `top_k` likeliest tokens, each row with its own generator."""
    generators = [
        torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed for seed in seeds
    ]

    def choose(rows: Sequence[int], logits: Tensor) -> list[int]:
        if top_k >= logits.shape[1]:  # one number per row instead of one per token
            sums = logits.sub_(logits.amax(1, keepdim=True)).exp_().cumsum(1)
            drawn = [torch.rand((), generator=generators[i]) for i in rows]
            place = torch.stack(drawn)[:, None] * sums[:, -1:]
            found = torch.searchsorted(sums, place, right=True)[:, 0]
            return found.clamp(max=logits.shape[1] - 1).tolist()  # rounding can reach the end
        values, ids = logits.topk(top_k)
        picked = [
            torch.multinomial(p, 1, generator=generators[i])
            for i, p in zip(rows, values.softmax(1), strict=True)
        ]
        return ids.gather(1, torch.stack(picked))[:, 0].tolist()

    return choose


def _begun(model: Model, prompts: Sequence[str], length: int) -> tuple[list[list[int]], list[int]]:
    """The tokens of the prompts, and how many their texts may have; what a chat template adds is
    not counted in `length`."""
    rows = _prompt_ids(model, prompts)
    plain = [len(plain_ids(model, prompt, True)[0]) for prompt in prompts]
    most = [length + len(row) - n for row, n in zip(rows, plain, strict=True)]
    return rows, [min(n, model.n_positions) for n in most]


def _whole(
    model: Model, prompts: Sequence[str], rows: Sequence[list[int]], starts: Sequence[int]
) -> list[str]:
    """The texts; of a chat model without what its template adds."""
    if model.frame:
        texts = _decoded(model, rows, starts)
        return [f"{prompt} {text}" for prompt, text in zip(prompts, texts, strict=True)]
    return [model.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def _extend(
    model: Model,
    rows: Sequence[list[int]],
    chosen: Sequence[int],
    limits: Sequence[int],
    choose: Choose | None,
    end: int | None,
    tell: Tell = lambda done, total: None,
) -> None:
    """Append tokens to the chosen rows, each until its limit or the token `end`. `choose` None:
    the likeliest. `tell(tokens so far, all)`, of the longest rows times their number."""
    going = [i for i in chosen if len(rows[i]) < limits[i]]
    if not going:
        return
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    lengths = [len(rows[i]) for i in going]
    over = max(lengths) + max(limits[i] - len(rows[i]) for i in going) > model.n_positions
    if (over or model.dtype == torch.float64) and len(set(lengths)) > 1:
        # A row that is done runs on with the others, beyond what the model reads; and in plain
        # transformers a query that sees padding alone can be NaN in float64.
        for n in sorted(set(lengths)):
            some = [i for i in going if len(rows[i]) == n]
            _extend(model, rows, some, limits, choose, end, tell)
        return
    left = [limits[i] - n for i, n in zip(going, lengths, strict=True)]
    width, fill = max(lengths), int(model.tokenizer.pad_token_id)
    padded = [[fill] * (width - n) + rows[i] for i, n in zip(going, lengths, strict=True)]
    ids = torch.tensor(padded, device=model.device)
    place = torch.arange(width, device=model.device)
    mask = (place >= width - torch.tensor(lengths, device=model.device)[:, None]).long()
    most, steps = torch.tensor(left, device=model.device), itertools.count(1)

    def pick(_: Tensor, scores: Tensor) -> Tensor:
        """Scores that leave each row one token."""
        tell(next(steps) * len(going), max(left) * len(going))
        if choose is None:
            return scores
        best = choose(going, scores.float().cpu())
        place = torch.tensor(best, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, place, 0.0)

    def done(so_far: Tensor, _: Any, **__: Any) -> Tensor:
        return so_far.shape[1] - width >= most

    settings = GenerationConfig(
        max_new_tokens=max(left), do_sample=False, eos_token_id=end, pad_token_id=fill
    )
    out = model.speaker.generate(
        ids,
        attention_mask=mask,
        generation_config=settings,
        logits_processor=LogitsProcessorList([pick]),  # pyright: ignore[reportArgumentType]
        stopping_criteria=StoppingCriteriaList([done]),  # pyright: ignore[reportArgumentType]
    )
    for i, n, said in zip(going, left, out[:, width:].tolist(), strict=True):
        said = said[:n]
        rows[i].extend(said[: said.index(end) + 1] if end in said else said)


def _decoded(model: Model, rows: Sequence[list[int]], starts: Sequence[int]) -> list[str]:
    """The text of each row from its start on, without blanks around."""
    decode = model.tokenizer.decode
    return [
        decode(row[start:], skip_special_tokens=True).strip()
        for row, start in zip(rows, starts, strict=True)
    ]


def check_end(model: Model) -> None:
    """Raises `ModelError` for a tokenizer without an end-of-text token."""
    if model.tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {model.name!r} has no end-of-text token, so no text it generates "
            "could end: set tokenizer.eos_token first"
        )
