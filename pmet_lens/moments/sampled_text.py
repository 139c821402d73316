"""Text for second moments in the model's own words, where no other is at hand."""

from __future__ import annotations

from collections.abc import Iterator

from pmet_lens.data.progress import line
from pmet_lens.models import generation
from pmet_lens.models.likelihood import readable
from pmet_lens.models.model import Model

_OPENERS = (
    "The In A It He This As At On For She When After One During They Although From With Many Since "
    "Most By An There While Some His According Its Both Her Until Two Each Despite Because Between"
)
_SPARE = 1.06
OPENERS = tuple(_OPENERS.split(" "))
"""Words that English sentences begin with."""


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
    generation.check_end(model)
    length = min(length, model.n_positions)
    first, made = seed << 32, 0
    while n_tokens is None or made < n_tokens:
        missing = batch_tokens if n_tokens is None else min(batch_tokens, n_tokens - made)
        # A few texts end early, and so many more steps for what then is missing cost far more.
        count = readable(model, round(_SPARE * missing / length))
        numbers = range(first, first + count)
        prompts = [OPENERS[n % len(OPENERS)] for n in numbers]
        rows, limits = generation.begun(model, prompts, length)
        starts = [len(row) for row in rows]
        choose, end = (
            generation.sampling(numbers, len(model.tokenizer)),
            model.tokenizer.eos_token_id,
        )
        with line("sampling text", "token") as tell:
            generation.extend(model, rows, range(len(rows)), limits, choose, end, tell)
        first, made = numbers.stop, made + sum(map(len, rows))
        yield from generation.whole(model, prompts, rows, starts)
