"""Training of MEND's editor network: facts edited one at a time, with a locality loss.

Source: Mitchell et al., ICLR 2022, arXiv 2110.11309, section 3 and appendix.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pmet_lens.data.facts import Fact
from pmet_lens.editing.finetune import output_hooks
from pmet_lens.editing.mend import MendEditor, gradients, passes
from pmet_lens.models import likelihood, tokens
from pmet_lens.models.bridge import Hook
from pmet_lens.models.model import Model, Site


@dataclass(frozen=True)
class MendTraining:
    """How an editor is trained; see `train_editor`."""

    n_steps: int = 2400
    """Steps of Adam at most, ≥ 1."""
    batch_size: int = 16
    """Facts per step, each edited alone, ≥ 1."""
    lr: float = 2e-3
    """Learning rate of the network, > 0, linearly down to a fiftieth (published: 1e-6, for large
    models and many more steps)."""
    rate_lr: float = 1e-4
    """Learning rate of the step sizes α, > 0 (published: 1e-4)."""
    rank: int = 64
    """Width of the bottleneck, ≥ 1 (published: 1920)."""
    rate: float = 1e-3
    """First value of α, > 0 (published: 1e-4)."""
    edit_weight: float = 0.5
    """c_edit > 0, weight of the edit loss against the locality loss (published: 0.1, where the
    editors of these small models hardly edit)."""
    check_every: int = 100
    """Steps between two looks at the held-out facts, ≥ 1."""
    patience: int = 10
    """Looks without a better loss after which training ends, ≥ 1."""
    seed: int = 0


@torch.inference_mode(False)
def train_editor(
    model: Model,
    facts: Sequence[Fact],
    locality: Sequence[tokens.Prompt],
    held_out: Sequence[Fact],
    sites: Sequence[Site],
    settings: MendTraining | None = None,
    on_log: Callable[[dict[str, float]], object] | None = None,
) -> MendEditor:
    """An editor for `model`, trained on facts edited one at a time.

    The loss is c_edit · (−log P of the new answer after the edit, on a phrasing drawn from the
    fact's prompt and paraphrases) + KL(before ‖ after) at the answer of a locality prompt, drawn
    from `locality` or, every other time, from the fact's neighbours where it has some. The editor
    with the lowest loss on `held_out` is returned; its `curve` has one row per look at them: step,
    edit (nats), kl (nats), loss.

    Raises:
        FactError: for facts that cannot be read or locality prompts without an answer.
    """
    cfg = MendTraining() if settings is None else settings
    rng = random.Random(f"mend {cfg.seed}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        editor = MendEditor.of(model, sites, cfg.rank, cfg.rate).to(model.device)
    sample = rng.sample(list(facts), min(len(facts), 512))
    editor.normalise([gradients(model, chunk, sites)[0] for chunk in passes(model, sample)])
    network = [p for name, p in editor.named_parameters() if name != "rate"]
    groups = [{"params": network, "lr": cfg.lr}, {"params": [editor.rate], "lr": cfg.rate_lr}]
    optimiser = torch.optim.Adam(groups)
    slower = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, cfg.n_steps)
    best, state, bad = math.inf, copy.deepcopy(editor.state_dict()), 0
    for step in range(cfg.n_steps + 1):
        if step % cfg.check_every == 0:
            row = {"step": float(step), **_look(model, editor, held_out, locality, cfg)}
            editor.curve.append(row)
            if on_log is not None:
                on_log(row)
            bad += 1
            if row["loss"] < best:
                best, state, bad = row["loss"], copy.deepcopy(editor.state_dict()), 0
            if bad == cfg.patience:
                break
        chosen = rng.sample(list(facts), min(cfg.batch_size, len(facts)))
        with torch.enable_grad():
            edit, kl = objective(model, editor, chosen, *_draw(chosen, locality, rng))
            (cfg.edit_weight * edit + kl).backward()
        nn.utils.clip_grad_norm_(network, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        slower.step()
    editor.load_state_dict(state)
    return editor


def objective(
    model: Model,
    editor: MendEditor,
    facts: Sequence[Fact],
    asked: Sequence[tokens.Prompt],
    local: Sequence[tokens.Prompt],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Edit loss and locality loss of facts edited one at a time, both in nats.

    `asked`: per fact the prompt and the answer wanted after the edit. `local`: per fact a prompt
    and answer where the edit should change nothing.
    """
    updates = editor(gradients(model, facts, editor.sites)[0])
    batch, n = tokens.encode(model, [*asked, *local]), len(facts)
    at = batch.scored.nonzero()
    hooks = edited(model, updates, torch.arange(n, device=model.device).repeat(2))
    logits = model.forward(batch.ids, batch.mask, hooks=hooks, at=at)
    log_p, share = likelihood.log_probs(logits), 1 / batch.scored.sum(1)[at[:, 0]]
    is_local = at[:, 0] >= n
    with torch.no_grad():
        rows, first = batch[torch.arange(n, 2 * n)], torch.tensor([n, 0], device=model.device)
        clean = likelihood.log_probs(model.forward(rows.ids, rows.mask, at=at[is_local] - first))
    nll = -likelihood.of_labels(log_p, batch.labels[at[:, 0], at[:, 1]])
    kl = (clean.exp() * (clean - log_p[is_local])).sum(1)
    return (nll * share)[~is_local].sum() / n, (kl * share[is_local]).sum() / n


def edited(
    model: Model, updates: Mapping[Site, tuple[Tensor, Tensor]], fact: Tensor
) -> list[tuple[str, Hook]]:
    """Hooks with which row i of a batch is answered as with the update of `fact[i]` in the
    weights; differentiable in `updates` (`MendEditor.forward`)."""

    def update(left: Tensor, right: Tensor, key: Tensor) -> Tensor:
        return key.to(left) @ left.mT @ right

    hooks: list[tuple[str, Hook]] = []
    for site, (left, right) in updates.items():
        hooks += output_hooks(model, site, partial(update, left[fact], right[fact]))
    return hooks


def _draw(
    facts: Sequence[Fact], locality: Sequence[tokens.Prompt], rng: random.Random
) -> tuple[list[tokens.Prompt], list[tokens.Prompt]]:
    """Per fact one phrasing to be answered, and one locality prompt: every other time one of its
    neighbours, where it has some."""
    asked = [
        tokens.Prompt(rng.choice((f.text, *f.paraphrases)), None, f.target_new, f.blank)
        for f in facts
    ]
    near = [[tokens.Prompt(text, None, answer) for text, answer in f.neighbours] for f in facts]
    local = [rng.choice(some if some and rng.random() < 0.5 else locality) for some in near]
    return asked, local


def _look(
    model: Model,
    editor: MendEditor,
    facts: Sequence[Fact],
    locality: Sequence[tokens.Prompt],
    cfg: MendTraining,
) -> dict[str, float]:
    """The losses on held-out facts, with the same prompts every time."""
    rng, edit, kl = random.Random("look"), 0.0, 0.0
    for chunk in passes(model, facts):
        with torch.no_grad():
            losses = objective(model, editor, chunk, *_draw(chunk, locality, rng))
        edit += float(losses[0]) * len(chunk) / len(facts)
        kl += float(losses[1]) * len(chunk) / len(facts)
    return {"edit": edit, "kl": kl, "loss": cfg.edit_weight * edit + kl}
