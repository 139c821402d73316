"""Fine-tuning as a baseline: Adam on one output projection until the new answers are likely.

FT-W is plain; FT+L keeps every entry of the weight change within a bound. Both optimise a change
whose effect a hook adds to the projection's output, so the model's weights are only read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pmet_lens.data import progress
from pmet_lens.data.facts import Fact, check_editable, listed
from pmet_lens.editing.edit_files import origin
from pmet_lens.editing.edits import Edit
from pmet_lens.editing.method import SettingsError
from pmet_lens.editing.targets import OnStep
from pmet_lens.models import likelihood, tokens
from pmet_lens.models.bridge import Hook, Hooks
from pmet_lens.models.model import Model, Site


@dataclass(frozen=True)
class FineTuneHparams:
    """Strengths of fine-tuning on one model. Defaults: the released FT files for GPT-J (ROME's
    `EleutherAI_gpt-j-6B_constr.json`, MEMIT's `EleutherAI_gpt-j-6B_wd.json`)."""

    layer: int
    """The layer whose MLP output projection is changed, from 0. Released: 0 for FT+L on GPT-2 XL
    and GPT-J, 21 for FT-W on GPT-J."""
    lr: float = 5e-4
    """Learning rate of Adam, > 0; about the change of one entry per step."""
    n_steps: int = 25
    """Passes over the facts, ≥ 1 (`num_steps`)."""
    batch_size: int = 64
    """Facts per step of Adam, ≥ 1 (default of the released `ft_hparams.py`)."""
    weight_decay: float = 0.0
    """≥ 0: L2 decay of the weight itself, not of its change, inside Adam. FT-W as released falls
    with the number n of facts: e^0.156 · n^−0.870 (`wd_power_law`)."""
    norm_constraint: float | None = None
    """> 0: bound on the absolute change of every entry (L∞). None: no bound. Released for FT+L:
    5e-4 for GPT-2 XL, 5e-5 for GPT-J."""
    stop_loss: float = 1e-2
    """≥ 0, nats: a batch below it takes no step, and a pass whose mean is below it is the last
    (released `ft_main.py`)."""

    def __post_init__(self) -> None:
        for name, least in (("layer", 0), ("n_steps", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise SettingsError(f"{name} must be a whole number ≥ {least}, not {value!r}.")
        for name in ("lr", "weight_decay", "norm_constraint", "stop_loss"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise SettingsError(f"{name} must be a number ≥ 0, not {value}.")
        if self.lr == 0 or self.norm_constraint == 0:
            raise SettingsError("lr and norm_constraint must be greater than 0.")


# The bundled models': the best of few tried on 20 records that no results table uses (350 to 369),
# layers 1, 3 and 5, learning rates 5e-4 to 1e-2, bounds 5e-3 to 0.1.
_WORLD = {
    False: FineTuneHparams(layer=5, lr=5e-3, n_steps=40),
    True: FineTuneHparams(layer=5, lr=5e-3, n_steps=40, norm_constraint=0.06),
}
HPARAMS: Mapping[str, Mapping[bool, FineTuneHparams]] = {
    "world": _WORLD,
    "world-sequential": _WORLD,
    "gpt-j-6b": {
        False: FineTuneHparams(layer=21),
        True: FineTuneHparams(layer=0, norm_constraint=5e-5),
    },
    "gpt2-xl": {True: FineTuneHparams(layer=0, norm_constraint=5e-4)},
}


@dataclass(frozen=True)
class FineTune:
    """Fine-tuning of one output projection as a method: FT-W, or FT+L where `constrained`."""

    constrained: bool = False
    """Whether the change is projected onto `norm_constraint` after every step."""

    def edit(
        self,
        model: Model,
        facts: Fact | Sequence[Fact],
        moments: object = None,
        hparams: FineTuneHparams | None = None,
        contexts: object = None,
        targets: object = None,
        on_step: OnStep | None = None,
    ) -> Edit:
        """The change of one weight that makes the facts' new answers likely on their prompts.

        The loss is the mean over facts of the mean over target tokens of −log P (nats), on the
        plain prompt, under teacher forcing. `moments`, `contexts` and `targets` are those of other
        methods and not read. `on_step(pass, {"loss": per fact})` runs after every pass, with each
        fact's loss as it was before the step of its batch. The rank of the change is not bounded
        by the number of facts: the second factor is the identity.

        Raises:
            FactError, SettingsError: bad facts or settings, in words.
            ModelError: for a layer the model does not have.
        """
        facts = listed(facts)
        check_editable(facts)
        hp = self.settings(model, hparams)
        site = Site(model.check_layer(hp.layer), "mlp")
        with progress.steps("fine-tuning", len(facts), hp.n_steps, on_step) as told:
            delta = self._descend(model, facts, site, hp, told)
        factors = {site: (delta.double(), torch.eye(model.d_model).to(delta.device).double())}
        made_on = origin(model, [site])
        return Edit(factors, model.dtype, tuple(facts), self, hp, (), **made_on)

    def settings(
        self, model: Model | str, hparams: FineTuneHparams | None = None
    ) -> FineTuneHparams:
        """`hparams`, or the settings known for this model (or the model of this name), checked
        against `constrained`. Raises `SettingsError`."""
        if not isinstance(hparams, FineTuneHparams | None):
            raise SettingsError(
                f"Fine-tuning takes FineTuneHparams(layer=…), not {type(hparams).__name__}."
            )
        name = model if isinstance(model, str) else model.name
        known = HPARAMS.get(name.lower(), {})
        hp = known.get(self.constrained) if hparams is None else hparams
        if hp is None:
            have = ", ".join(sorted(n for n, sets in HPARAMS.items() if self.constrained in sets))
            raise SettingsError(
                f"There are no fine-tuning settings for the model {name!r} (there are: "
                f"{have}). Pass hparams=FineTuneHparams(layer=…)."
            )
        if self.constrained != (hp.norm_constraint is not None):
            raise SettingsError(
                "A constrained FineTune needs a norm_constraint, and one that is not constrained "
                f"has none; this is {self} with norm_constraint={hp.norm_constraint}."
            )
        return hp

    @torch.enable_grad()
    def _descend(
        self,
        model: Model,
        facts: Sequence[Fact],
        site: Site,
        hp: FineTuneHparams,
        on_step: OnStep,
    ) -> Float[Tensor, "d_in d_model"]:
        weight = model.weight(site)
        dtype = torch.promote_types(model.dtype, torch.float32)
        delta = torch.zeros(weight.shape, dtype=dtype, device=weight.device, requires_grad=True)
        bound = None if hp.norm_constraint is None else _at_most(hp.norm_constraint, dtype)
        optimiser = torch.optim.Adam([delta], lr=hp.lr)
        hooks = output_hooks(model, site, lambda key: key.to(dtype) @ delta)
        batch = tokens.encode(model, rewrites(facts))
        for step in range(hp.n_steps):
            per_fact: list[Tensor] = []
            for rows in torch.arange(len(batch), device=batch.ids.device).split(hp.batch_size):
                losses, gradient = _losses(model, batch[rows], hooks, delta)
                per_fact.append(losses)
                if float(losses.mean()) >= hp.stop_loss:
                    # The decay of Adam itself would be that of the change.
                    delta.grad = gradient + hp.weight_decay * (weight.to(dtype) + delta.detach())
                    optimiser.step()
                if bound is not None:
                    delta.data.clamp_(-bound, bound)
            losses = torch.cat(per_fact)
            on_step(step, {"loss": losses})
            if float(losses.mean()) < hp.stop_loss:
                break
        return delta.detach()


def _losses(
    model: Model, batch: tokens.Batch, hooks: Hooks, delta: Tensor
) -> tuple[Float[Tensor, " row"], Tensor]:
    """−log P of every row's answer, and the gradient of their mean in `delta`; as many rows in a
    pass as their logits allow."""
    losses, gradient = [], torch.zeros_like(delta)
    size = likelihood.rows_at_once(model, batch, len(batch), copies=2)
    for rows in torch.arange(len(batch), device=batch.ids.device).split(size):
        some = -likelihood.answers(model, batch[rows], hooks, mean=True)
        (part,) = torch.autograd.grad(some.sum() / len(batch), [delta])
        losses.append(some.detach())
        gradient += part
    return torch.cat(losses), gradient


def rewrites(facts: Sequence[Fact]) -> list[tokens.Prompt]:
    """The plain prompt of every fact with its new answer."""
    return [tokens.Prompt(f.prompt, f.subject, f.target_new, f.blank) for f in facts]


def output_hooks(
    model: Model, site: Site, change: Callable[[Tensor], Tensor]
) -> list[tuple[str, Hook]]:
    """Hooks that add `change(key)` to the output of the projection at an MLP site.

    With `change = key @ Δ` the model answers as with `W + Δ`, and differentiably in Δ. `key` is
    `[row, token, d_in]`, the result `[row, token, d_model]`.
    """
    kept: list[Tensor] = []

    def keep(key: Tensor) -> None:
        kept[:] = [key]

    def add(value: Tensor) -> Tensor:
        return value + change(kept.pop()).to(value)

    return [(model.key_hook(site), keep), (model.stream_hook(site.layer, "mlp_out"), add)]


def _at_most(bound: float, dtype: torch.dtype) -> float:
    """The largest number of `dtype` that is not above `bound`, so that the bound holds exactly."""
    rounded = torch.tensor(bound, dtype=dtype)
    if float(rounded) > bound:
        rounded = torch.nextafter(rounded, torch.zeros((), dtype=dtype))
    return float(rounded)
