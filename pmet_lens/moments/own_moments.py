"""Second moments for a model that no text is at hand for: of its own words, kept in the cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pmet_lens.data import downloads, file_format
from pmet_lens.data.progress import Tell
from pmet_lens.editing.methods import known_hparams
from pmet_lens.models.model import Model, Projection, Site
from pmet_lens.moments import sampled_text
from pmet_lens.moments.moment import Moment, MomentError
from pmet_lens.moments.moment_files import kept_moments

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
    on_tokens: Tell | None = None,
) -> dict[Site, Moment]:
    """Second moments where no text is at hand: of text in the model's own words (`sampled_texts`),
    without the edits that are on it. Text and moments are kept in the cache (`$PMET_LENS_CACHE`)
    for these weights, so that they are computed once.

    Args:
        layers: None takes every layer of this model's PMET settings, as `second_moments`.
        projections: whose keys; every method but some ablations writes the MLP's alone.
        n_tokens: of text; None: five per dimension of the widest key.
        on_tokens: called with (tokens read so far, all).

    Raises:
        SettingsError: for `layers=None` and a model without known settings.
        ModelError: for a tokenizer without an end-of-text token, which no text could end with.
        MomentError: where the cache cannot be written.
    """
    layers = known_hparams(model, "PMET").layers if layers is None else layers
    widest = max(model.d_in(Site(n, p)) for n in layers for p in projections)
    n_tokens = n_tokens or TOKENS_PER_DIMENSION * widest
    with model.live_edits.bare():
        weights = file_format.state_digest(model.hf.state_dict())
        of = {"seed": seed, "n_tokens": n_tokens}
        sites = {"layers": sorted(set(layers)), "projections": sorted(set(projections))}
        folder = downloads.cache() / "moments" / f"{model.name}-{weights[:16]}"
        texts = _own_texts(model, folder / f"text-{file_format.hash_of(of)}.json", seed, n_tokens)
        return kept_moments(
            folder / f"moments-{file_format.hash_of({**of, **sites})}.safetensors",
            model,
            texts,
            layers,
            projections=projections,
            n_tokens=n_tokens,
            on_tokens=on_tokens,
        )


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
