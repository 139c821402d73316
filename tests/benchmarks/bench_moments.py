"""Second moments: one pass per layer, against one pass and half the products; and how much text."""

from __future__ import annotations

from functools import partial
from itertools import islice

import pandas as pd
import plain
import pytest
import subjects
import torch
from conftest import keep

import pmet_lens as pl
from pmet_lens.data import world
from pmet_lens.editing import targets
from pmet_lens.evaluation import scoring
from pmet_lens.models import tokens

TOKENS = (2_500, 5_000, 10_000, 20_000, 40_000, 100_000)


def test_moments(compare, device, small):
    """Six layers of the medium shape, the MLPs, float32 on both sides, the same batches."""
    model = subjects.medium(small, device)
    n = 256
    chosen = list(islice(pl.texts(), 400))
    rows = [model.tokenizer(text)["input_ids"][:128] for text in chosen]
    kept, left = [], n
    for row in rows:
        kept.append(row[:left])
        left -= len(kept[-1])
        if left <= 0:
            break
    chunks = tokens.chunks([len(row) for row in kept], 2048)
    pad = model.tokenizer.pad_token_id
    batches = [plain.padded([kept[i] for i in chunk], pad) for chunk in chunks]
    sites = [pl.Site(layer, "mlp") for layer in subjects.LAYERS]

    def slow(_: int) -> float:
        for site in sites:
            plain.moment(model.hf, subjects.module(model, site), batches, torch.float32)
        return 1.0

    def fast(_: int) -> float:
        pl.second_moments(
            model, chosen, subjects.LAYERS, projections=("mlp",), n_tokens=n, dtype=torch.float32
        )
        return 1.0

    found = pl.second_moments(
        model, chosen, subjects.LAYERS, projections=("mlp",), n_tokens=n, dtype=torch.float32
    )
    wanted = plain.moment(model.hf, subjects.module(model, sites[-1]), batches, torch.float32)
    assert (found[sites[-1]].value - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    name = f"second moments of {n} tokens, six layers, medium"
    compare(name, slow, fast, allows="about 3.5 ×", wanted=2.5)


def test_how_much_text(device, small, request):
    """The error of the moments and the edit that comes of them, over the number of tokens. No
    speed, and minutes: only where the tables are to be replaced."""
    if not (small or request.config.getoption("--record")):
        pytest.skip("with --record only")
    model = subjects.bundled("world", device)
    hp, own = pl.HPARAMS["world"]["PMET"], subjects.contexts(model)
    facts = pl.counterfact(n=5 if small else 100)
    found = targets.optimise(model, facts, pl.PMET, hp, own)
    read = partial(pl.second_moments, model, projections=("mlp",))
    reference = read(world.build().texts(2), n_tokens=5_000 if small else 200_000)
    stream = pl.texts()
    moments: dict[pl.Site, pl.Moment] = {}
    rows, before = [], 0
    for n in TOKENS[:2] if small else TOKENS:
        more = read(stream, n_tokens=n - before)
        moments = {s: moments[s] + m if moments else m for s, m in more.items()}
        before = n
        edit = pl.edit(model, facts, moments, pl.PMET, hp, own, found)
        with edit.applied(model):
            table = scoring.summarise(pl.evaluate(model, facts))["mean"].round(1)
        off, white, told = errors(moments, reference)
        rows.append(
            {
                "tokens": f"{n:,}",
                "per d_in": f"{n / max(model.d_in(site) for site in moments):.1f}",
                "error told": told,
                "error": off,
                "whitened": white,
                **{metric: table[metric] for metric in ("S", "ES", "PS", "NS")},
            }
        )
    note = (
        "`world`, PMET, 100 facts at once. Errors are the largest of the critical layers, in per "
        "cent: *told*, what `Moment.error` says without a reference; *error*, the relative "
        "Frobenius distance to the moment of 200,000 other tokens; *whitened*, the same distance "
        "where the reference is the identity, per direction."
    )
    keep("precision", pd.DataFrame(rows), note, request.config)


def errors(moments, reference) -> tuple[str, str, str]:
    """Relative Frobenius distance, whitened distance per direction, and `Moment.error`."""
    far, white, told = [], [], []
    for site, moment in moments.items():
        C, wanted = moment.value, reference[site].value
        far.append(float((C - wanted).norm() / wanted.norm()))
        values, vectors = torch.linalg.eigh(wanted)
        # Directions that hold nothing but rounding have no relative error.
        used = values > 1e-9 * values[-1]
        basis = vectors[:, used] / values[used].sqrt()
        inside = basis.T @ C @ basis
        white.append(
            float((inside - torch.eye(len(inside)).to(inside)).norm() / len(inside) ** 0.5)
        )
        told.append(moment.error)
    return tuple(f"{100 * max(x):.1f}" for x in (far, white, told))
