"""Text from a model: many prompts continued in one forward pass, each as if it were alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pmet_lens.data.facts import FactError
from pmet_lens.models.model import Model
from pmet_lens.models.sites import ModelError
from pmet_lens.models.tokens import chunks, pad

OnPrompts = Callable[[int, int], object]


def generate(model: Model, prompt: str, length: int = 100, top_k: int = 5, seed: int = 0) -> str:
    """`prompt` continued to `length` tokens in all, top-k sampled (1: greedy); stops at the
    end-of-text token. Deterministic in `seed`. Of a chat model: the prompt and the assistant's
    answer, without the chat template around them, which is not counted. Raises as `generate_batch`
    does."""
    return generate_batch(model, [prompt], [seed], length, top_k)[0]


def generate_batch(
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    length: int = 100,
    top_k: int = 5,
    *,
    batch_tokens: int = 4096,
    on_prompts: OnPrompts | None = None,
) -> list[str]:
    """Every prompt continued as `generate` does it alone, many in one forward pass.

    A text follows from its prompt and its seed (every prompt has a generator of its own), not from
    what else is in the batch, as far as rounding does not decide between two tokens.
    `on_prompts`: called with (texts so far, all).

    Raises:
        ModelError: for a tokenizer without an end-of-text token, which no text could end with.
        FactError: for a prompt without a token.
    """
    check_end(model)
    plain = [list(model.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    read = [_asked(model, prompt) for prompt in prompts]
    asked = [len(ids) for ids in read]
    if [] in read:
        raise FactError(f"The prompt {prompts[read.index([])]!r} has no token to continue.")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    limits = [
        min(length + n - len(own), model.n_positions) for n, own in zip(asked, plain, strict=True)
    ]
    done = 0
    for chosen in chunks(limits, batch_tokens, asked):
        going = [i for i in chosen if len(read[i]) < limits[i]]
        while going:
            best = _next_logits(model, [read[i] for i in going]).topk(top_k)
            ended = set()
            for i, values, ids in zip(going, best.values, best.indices, strict=True):
                pick = torch.multinomial(values.softmax(0), 1, generator=generators[i])
                if int(ids[pick]) == model.tokenizer.eos_token_id:
                    ended.add(i)
                else:
                    read[i].append(int(ids[pick]))
            going = [i for i in going if i not in ended and len(read[i]) < limits[i]]
        done += len(chosen)
        if on_prompts is not None:
            on_prompts(done, len(read))
    start = asked if model.frame else [0] * len(read)
    texts = [
        model.tokenizer.decode(ids[own:], skip_special_tokens=True)
        for ids, own in zip(read, start, strict=True)
    ]
    if model.frame:
        return [f"{prompt} {text.strip()}" for prompt, text in zip(prompts, texts, strict=True)]
    return texts


def _asked(model: Model, prompt: str) -> list[int]:
    """The tokens of a prompt, inside the chat template where there is one (which writes special
    tokens itself)."""
    text, special = model.frame.around(prompt), not model.frame
    return list(model.tokenizer(text, add_special_tokens=special)["input_ids"])


def answers(model: Model, prompts: Sequence[str], n_tokens: int = 6) -> list[str]:
    """What the model says next, greedily: up to `n_tokens` tokens behind each prompt, cut at the
    end of the sentence or line, without blanks around. Raises `FactError` for a prompt without a
    token."""
    read = [_asked(model, prompt) for prompt in prompts]
    if [] in read:
        raise FactError(f"The prompt {prompts[read.index([])]!r} has no token to continue.")
    rows = [list(ids) for ids in read]
    going = list(range(len(rows)))
    for _ in range(n_tokens):
        going = [i for i in going if len(rows[i]) < model.n_positions]
        if not going:
            break
        best = _next_logits(model, [rows[i] for i in going]).argmax(-1).tolist()
        for i, token in zip(going, best, strict=True):
            rows[i].append(token)
        going = [i for i in going if rows[i][-1] != model.tokenizer.eos_token_id]
    said = [
        model.tokenizer.decode(row[len(ids) :], skip_special_tokens=True).strip()
        for row, ids in zip(rows, read, strict=True)
    ]
    return [re.split(r"[.!?](?:\s|$)|\n", text)[0].strip() for text in said]


def _next_logits(model: Model, rows: Sequence[list[int]]) -> Tensor:
    """Logits behind every row of token ids, `[row, vocab]`, float32 on the CPU."""
    ids, mask = pad(model, rows)
    at = torch.tensor([(i, len(row) - 1) for i, row in enumerate(rows)], device=ids.device)
    return model.logits_at(ids, mask, at).float().cpu()


def check_end(model: Model) -> None:
    """Raises `ModelError` for a tokenizer without an end-of-text token."""
    if model.tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {model.name!r} has no end-of-text token, so no text it generates "
            "could end: set tokenizer.eos_token first"
        )
