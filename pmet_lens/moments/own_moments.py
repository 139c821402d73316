"""Second moments for a model that no text is at hand for: of its own words, or of Python's
documentation, kept in the cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pmet_lens.data import downloads, file_format
from pmet_lens.data.file_format import hash_of
from pmet_lens.data.progress import Tell
from pmet_lens.editing.methods import known_hparams
from pmet_lens.models.model import Model, Projection, Site
from pmet_lens.moments import sampled_text
from pmet_lens.moments.moment import Moment, MomentError
from pmet_lens.moments.moment_files import kept_moments
from pmet_lens.moments.python_text import python_text

TextName = Literal["own", "python"]
TOKENS_PER_DIMENSION = 5
"""Of a key: half as many as of text that need not be written. Measured with MEMIT on SmolLM2-135M,
20 real facts at once: S 85.5 [73.7, 93.3], KL on other prompts 0.11 [0.08, 0.14]; with 16,000
tokens of Wikipedia S 86.4 and 85.9, KL 0.08 and 0.09."""


def own_moments(
    model: Model,
    layers: Sequence[int] | None = None,
    *,
    projections: Sequence[Projection] = ("mlp",),
    n_tokens: int | None = None,
    seed: int = 0,
    text: TextName = "own",
    on_tokens: Tell | None = None,
) -> dict[Site, Moment]:
    """Second moments where no text is at hand: of text in the model's own words (`sampled_texts`),
    without the edits that are on it. Text and moments are kept in the cache (`$PMET_LENS_CACHE`)
    for these weights, so that they are computed once.

    With `text="python"` they are of the English prose in Python's documentation (`python_text`),
    which need not be written first: SmolLM2-135M waits 11 s instead of a minute on two cores. The
    price, seen once with 20 real facts at once and fast targets, own text → this: MEMIT S 90.4
    → 90.3 and KL on other prompts 0.17 → 0.21; PMET S 88.4 → 90.3, EA 95 → 85, KL 0.20 → 0.25.

    Args:
        layers: None takes every layer of this model's PMET settings, as `second_moments`.
        projections: whose keys; every method but some ablations writes the MLP's alone.
        n_tokens: of text; None: five per dimension of the widest key.
        seed: of the model's own text.
        text: "own" or "python".
        on_tokens: called with (tokens read so far, all).

    Raises:
        SettingsError: for `layers=None` and a model without known settings.
        ModelError: for a tokenizer without an end-of-text token, which no text could end with.
        MomentError: for another `text`, or one that is too short or not in this Python; where the
            cache cannot be written.
    """
    if text not in get_args(TextName):
        raise MomentError(f'text is "own" or "python", not {text!r}.')
    layers = known_hparams(model, "PMET").layers if layers is None else layers
    widest = max(model.d_in(Site(n, p)) for n in layers for p in projections)
    n_tokens = n_tokens or TOKENS_PER_DIMENSION * widest
    with model.live_edits.bare():
        weights = file_format.state_digest(model.hf.state_dict())
        folder = downloads.cache() / "moments" / f"{model.name}-{weights[:16]}"
        of: dict[str, Any] = {"seed": seed, "n_tokens": n_tokens}
        if text == "python":
            texts = _enough(model, python_text(), n_tokens)
            of = {"text": hash_of(texts), "n_tokens": n_tokens}
        else:
            texts = _own_texts(model, folder / f"text-{hash_of(of)}.json", seed, n_tokens)
        sites = {"layers": sorted(set(layers)), "projections": sorted(set(projections))}
        return kept_moments(
            folder / f"moments-{hash_of({**of, **sites})}.safetensors",
            model,
            texts,
            layers,
            projections=projections,
            n_tokens=n_tokens,
            on_tokens=on_tokens,
        )


def _enough(model: Model, texts: list[str], n_tokens: int) -> list[str]:
    """These texts. Raises `MomentError` where they are too few."""
    there = sum(map(len, model.tokenizer(texts)["input_ids"]))
    if there < n_tokens:
        raise MomentError(
            f"Python's documentation has {there:,} tokens for {model.name!r}, and {n_tokens:,} are "
            'needed: take text="own", or pass texts of your own to pl.second_moments.'
        )
    return texts


def _own_texts(model: Model, path: Path, seed: int, n_tokens: int) -> list[str]:
    """The model's own text, from the file, or sampled and kept there."""
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    texts = list(sampled_text.sampled_texts(model, seed, n_tokens=n_tokens))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_format.whole(path) as part:
            part.write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        raise MomentError(
            f"The text could not be kept in {path.parent}: {error}. Set PMET_LENS_CACHE to a "
            "folder that can be written."
        ) from error
    return texts
