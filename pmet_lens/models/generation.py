"""Text from a model, with transformers' own `generate` (keys and values are kept) on a copy that
shares the weights, edits included: many prompts at once, each as if it were alone."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pmet_lens.data.facts import FactError
from pmet_lens.data.progress import Tell, shown
from pmet_lens.data.words import End, end_of
from pmet_lens.models.likelihood import readable
from pmet_lens.models.model import Model
from pmet_lens.models.sites import ModelError
from pmet_lens.models.tokens import PLAIN, chunks, plain_ids, prompt_ids

Choose = Callable[[Sequence[int], Tensor], Sequence[int]]
"""The next token of each of these rows, from their logits `[row, vocab]` (float32, on the CPU)."""
SEEDS = ("The", "Therefore", "Because", "I", "You")
"""First words of the context prefixes (released code: `util/generate.py` callers, PMET main)."""


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
    rows, limits = begun(model, prompts, length)
    starts = [len(row) for row in rows]
    choose = None if top_k == 1 else sampling(seeds, top_k)
    done = 0
    once, most = [1] * len(rows), readable(model)
    for chunk in chunks(limits, batch_tokens, starts, reads=once, readable=most):
        extend(model, rows, chunk, limits, choose, model.tokenizer.eos_token_id)
        done += len(chunk)
        if on_prompts is not None:
            on_prompts(done, len(rows))
    return whole(model, prompts, rows, starts)


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
    extend(model, rows, every, [length] * len(rows), sampling(generators, top_k), end)
    texts = (model.tokenizer.decode(row, skip_special_tokens=True) for row in rows)
    return [PLAIN, *(" ".join(re.sub("[{}]", " ", text).split()) + ". {}" for text in texts)]


def answers(model: Model, prompts: Sequence[str], n_tokens: int = 6) -> list[str]:
    """What the model says next, greedily: up to `n_tokens` tokens after each prompt, cut at the end
    of the sentence or line, without blanks around. Raises `FactError` for a prompt without a
    token."""
    told = said(model, prompts, [n_tokens] * len(prompts), "sentence")
    return [text for text, *_ in told]


def said(
    model: Model,
    prompts: Sequence[str],
    n_tokens: Sequence[int],
    until: End | None = None,
    on_prompts: Tell = lambda done, total: None,
    *,
    batch_tokens: int = 4096,
) -> list[tuple[str, str, list[int]]]:
    """What the model says after each prompt, greedily: the text without blanks around, what ended
    it, and its tokens (those behind the end too, as far as they were made).

    It ends with the `sentence` or `line` (`until`), with an end token of the tokenizer or of the
    model's own generation settings (`token`), or with `n_tokens` tokens of its own (`limit`).
    Raises `FactError` for a prompt without a token.
    """
    rows = prompt_ids(model, prompts)
    starts = [len(row) for row in rows]
    limits = [min(n + k, model.n_positions) for n, k in zip(starts, n_tokens, strict=True)]
    ends, done = _end_tokens(model), 0

    # A letter behind: "3." may become "3.5", and "St. " go on.
    def over(text: str) -> bool:
        return until is not None and end_of(f"{text.lstrip()}x", until) is not None

    once = [1] * len(rows)
    for chunk in chunks(limits, batch_tokens, starts, reads=once, readable=readable(model)):
        extend(model, rows, chunk, limits, None, ends, over=over if until else None)
        done += len(chunk)
        on_prompts(done, len(rows))
    found = []
    for own in (row[start:] for row, start in zip(rows, starts, strict=True)):
        text = _text(model, own).lstrip()
        cut = None if until is None else end_of(text, until)
        how = "token" if own and own[-1] in ends else "limit"
        if cut is not None:
            how = "line" if text[cut] == "\n" else "sentence"
        found.append((text[:cut].rstrip(), how, own))
    return found


def _end_tokens(model: Model) -> list[int]:
    """Those of the tokenizer and of the model's own settings: chat models end a turn with another
    token than a text."""
    own = getattr(getattr(model.hf, "generation_config", None), "eos_token_id", None)
    ends = [model.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({int(end) for end in ends if end is not None})


def sampling(seeds: Sequence[int | torch.Generator], top_k: int) -> Choose:
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


def begun(model: Model, prompts: Sequence[str], length: int) -> tuple[list[list[int]], list[int]]:
    """The tokens of the prompts, and how many their texts may have; what a chat template adds is
    not counted in `length`."""
    rows = prompt_ids(model, prompts)
    plain = [len(plain_ids(model, prompt, True)[0]) for prompt in prompts]
    most = [length + len(row) - n for row, n in zip(rows, plain, strict=True)]
    return rows, [min(n, model.n_positions) for n in most]


def whole(
    model: Model, prompts: Sequence[str], rows: Sequence[list[int]], starts: Sequence[int]
) -> list[str]:
    """The texts; of a chat model without what its template adds."""
    if model.frame:
        texts = _decoded(model, rows, starts)
        return [f"{prompt} {text}" for prompt, text in zip(prompts, texts, strict=True)]
    return [model.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def extend(
    model: Model,
    rows: Sequence[list[int]],
    chosen: Sequence[int],
    limits: Sequence[int],
    choose: Choose | None,
    end: int | list[int] | None,
    tell: Tell = lambda done, total: None,
    over: Callable[[str], bool] | None = None,
) -> None:
    """Append tokens to the chosen rows, each until its limit, a token of `end`, or until the text
    of its new tokens is `over`. `choose` None: the likeliest. `tell(tokens so far, all)`, of the
    longest rows times their number."""
    going = [i for i in chosen if len(rows[i]) < limits[i]]
    if not going:
        return
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    lengths = [len(rows[i]) for i in going]
    beyond = max(lengths) + max(limits[i] - len(rows[i]) for i in going) > model.n_positions
    if (beyond or model.dtype == torch.float64) and len(set(lengths)) > 1:
        # A row that is done runs on with the others, beyond what the model reads; and in plain
        # transformers a query that sees padding alone can be NaN in float64.
        for n in sorted(set(lengths)):
            some = [i for i in going if len(rows[i]) == n]
            extend(model, rows, some, limits, choose, end, tell, over)
        return
    left = [limits[i] - n for i, n in zip(going, lengths, strict=True)]
    width, fill = max(lengths), int(model.tokenizer.pad_token_id)
    padded = [[fill] * (width - n) + rows[i] for i, n in zip(going, lengths, strict=True)]
    ids = torch.tensor(padded, device=model.device)
    place = torch.arange(width, device=model.device)
    mask = (place >= width - torch.tensor(lengths, device=model.device)[:, None]).long()
    steps, total = itertools.count(1), max(left) * len(going)

    def pick(_: Tensor, scores: Tensor) -> Tensor:
        """Scores that leave each row one token."""
        tell(next(steps) * len(going), total)
        if choose is None:
            return scores
        best = choose(going, scores.float().cpu())
        place = torch.tensor(best, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, place, 0.0)

    def done(so_far: Tensor, _: Any, **__: Any) -> Tensor:
        n = so_far.shape[1] - width
        for i, new in enumerate(so_far[:, width:].tolist() if over else ()):
            if over and n < left[i] and over(_text(model, new)):
                left[i] = n
        return n >= torch.tensor(left, device=so_far.device)

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
    ends = {end} if isinstance(end, int) else {*(end or ())}
    for i, n, new in zip(going, left, out[:, width:].tolist(), strict=True):
        stop = next((place + 1 for place, token in enumerate(new[:n]) if token in ends), n)
        rows[i].extend(new[:stop])


def _decoded(model: Model, rows: Sequence[list[int]], starts: Sequence[int]) -> list[str]:
    """The text of each row from its start on, without blanks around."""
    return [_text(model, row[n:]).strip() for row, n in zip(rows, starts, strict=True)]


def _text(model: Model, ids: list[int]) -> str:
    return model.tokenizer.decode(ids, skip_special_tokens=True)


def check_end(model: Model) -> None:
    """Raises `ModelError` for a tokenizer without an end-of-text token."""
    if model.tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {model.name!r} has no end-of-text token, so no text it generates "
            "could end: set tokenizer.eos_token first"
        )
