"""The edit: targets, then one closed-form weight change per critical layer.

`edit` reads like the algorithm box of the paper. It leaves the model as it found it; the result
is an `Edit`, a value that can be applied, undone, saved and loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from pmet_lens import artifact, keys, tokens
from pmet_lens import targets as targeting
from pmet_lens.adapter import Model, Projection, Site
from pmet_lens.facts import Fact, check_editable
from pmet_lens.hparams import hparams_for
from pmet_lens.linalg import Factor
from pmet_lens.methods import PMET
from pmet_lens.settings import Hparams, Method, SettingsError
from pmet_lens.targets import OnStep, Targets

Delta = Float[Tensor, "d_in d_model"]
Moments = Mapping[Site, object]


@dataclass(frozen=True)
class Edit:
    """Weight changes, and everything that says where they came from."""

    factors: Mapping[Site, tuple[Float[Tensor, "d_in rank"], Float[Tensor, "rank d_model"]]]
    """Per site two thin float64 matrices whose product is the weight change; the rank is at most
    the number of facts."""
    dtype: torch.dtype
    """Dtype of the weights the edit was computed on; deltas are rounded to it once."""
    facts: tuple[Fact, ...]
    method: Method
    hparams: Hparams
    contexts: tuple[str, ...]
    targets: Targets | None = field(default=None, repr=False)
    """Present on a fresh edit; not saved."""
    base: Mapping[Site, str] = field(default_factory=dict, repr=False)
    """SHA-256 of every weight the edit was computed on."""

    @cached_property
    def deltas(self) -> Mapping[Site, Delta]:
        """What is added to `model.weight(site)`, in the dtype of the weight."""
        return {site: (a @ b).to(self.dtype) for site, (a, b) in self.factors.items()}

    def __repr__(self) -> str:
        sites = ", ".join(map(str, self.factors))
        return f"Edit({len(self.facts)} facts, sites {sites})"

    @contextmanager
    def applied(self, model: Model) -> Iterator[Model]:
        """The model with the edit inside the block, and bit for bit as before behind it."""
        self.apply_(model)
        try:
            yield model
        finally:
            self.revert_(model)

    def apply_(self, model: Model) -> None:
        """Change the model's weights in place, until `revert_`."""
        model.live_edits.add(self, self.deltas)

    def revert_(self, model: Model) -> None:
        """Take this edit back. When no edit is left the weights are the original bits, in whatever
        order the edits were taken back.

        Raises:
            ValueError: if this edit is not applied to this model.
        """
        model.live_edits.remove(self)

    def save(self, path: str | Path) -> None:
        """Write a `.safetensors` file: thin factors, facts, settings, hashes; no code."""
        parts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "targets"}
        artifact.save(parts, path)

    @staticmethod
    def load(path: str | Path) -> Edit:
        """Read what `save` wrote. Raises ValueError for a file that is not an edit."""
        return Edit(**artifact.load(path))


def edit(
    model: Model,
    facts: Sequence[Fact],
    moments: Moments,
    method: Method = PMET,
    hparams: Hparams | None = None,
    contexts: Sequence[str] | None = None,
    targets: Targets | None = None,
    on_step: OnStep | None = None,
    *,
    factorised: dict[Site, Factor] | None = None,
) -> Edit:
    """Compute one edit that makes `model` give every fact's new answer.

    Args:
        moments: Site -> second moment of the keys, `[d_in, d_in]` tensors or `Moment`s.
        hparams: None takes the settings known for this model (`pl.HPARAMS`).
        contexts: prefixed templates such as "I am. {}"; None samples them from the model.
        targets: from an earlier edit of the same facts, to skip their optimisation.
        on_step: called with (step, losses per fact) after every optimisation step.
        factorised: kept factorisations of the moments, filled here and reused by later edits;
            pass the same dict only with the same moments, solver and λ.

    Raises:
        FactError, SettingsError, SolveError: bad facts, settings, or moments, in words.
    """
    facts = list(facts)
    check_editable(facts)
    hp = hparams if hparams is not None else hparams_for(model, method)
    hp.check(model.n_layers)
    sites = [Site(layer, projection) for layer in hp.layers for projection in method.write]
    _check_moments(model, moments, sites)
    contexts = tokens.sample_contexts(model) if contexts is None else list(contexts)
    _check_contexts(contexts)
    if targets is None:
        targets = targeting.optimise(model, facts, method, hp, contexts, on_step)
    _check_targets(targets, facts, method, hp)
    _warn_already_true(targets, facts)

    kept = {} if factorised is None else factorised
    factors: dict[Site, tuple[Tensor, Tensor]] = {}
    with model.restored(sites):
        for i, layer in enumerate(hp.layers):
            for projection in method.write:
                site = Site(layer, projection)
                K = keys.averaged_keys(model, facts, contexts, site)
                R = _residual(model, facts, method, projection, targets)
                R = R / method.share(len(hp.layers) - i)
                if site not in kept:
                    C = _matrix(moments[site], model.weight(site).device)
                    kept[site] = method.solver.factorise(C, hp.second_moment_weight)
                left, right = factors[site] = kept[site].factors(K, R)
                model.weight(site).add_((left @ right).to(model.dtype))
    base = {site: artifact.fingerprint(model.weight(site)) for site in sites}
    return Edit(factors, model.dtype, tuple(facts), method, hp, tuple(contexts), targets, base)


def _residual(
    model: Model, facts: Sequence[Fact], method: Method, projection: Projection, targets: Targets
) -> Float[Tensor, "fact d_model"]:
    """R = V − current, on the stream this projection follows, at the last critical layer."""
    stream = method.follows(projection)
    now = keys.current_values(model, facts, targets.layer, stream)
    return targets.values[stream].to(now) - now


def _matrix(moment: object, device: torch.device) -> Float[Tensor, "d_in d_in"]:
    """The second moment as a tensor, whether given as one or as a `Moment`."""
    value = moment if isinstance(moment, Tensor) else getattr(moment, "value", None)
    if not isinstance(value, Tensor):
        raise SettingsError(f"A second moment must be a Tensor or a Moment, not {type(moment)}.")
    return value.to(device)


def _check_moments(model: Model, moments: Moments, sites: Sequence[Site]) -> None:
    for site in sites:
        if site not in moments:
            have = ", ".join(map(str, sorted(moments))) or "none"
            raise SettingsError(
                f"The second moment of site {site} is missing (there are: {have}). Compute it with "
                f"second_moments(model, texts, layers={sorted({s.layer for s in sites})})."
            )
        shape, size = tuple(_matrix(moments[site], model.device).shape), model.d_in(site)
        if shape != (size, size):
            raise SettingsError(
                f"The second moment of site {site} is {list(shape)}, but its keys have {size} "
                "entries: it belongs to another model."
            )


def _check_contexts(contexts: Sequence[str]) -> None:
    for context in contexts:
        if context.count("{}") != 1:
            raise SettingsError(
                f"The context {context!r} needs exactly one {{}}, where the prompt goes."
            )


def _check_targets(
    targets: Targets, facts: Sequence[Fact], method: Method, hparams: Hparams
) -> None:
    needed = {method.follows(p) for p in method.write}
    if len(targets) != len(facts) or targets.layer != hparams.layers[-1]:
        raise SettingsError(
            f"These targets are for {len(targets)} facts at layer {targets.layer}; the edit is "
            f"for {len(facts)} facts at layer {hparams.layers[-1]}."
        )
    if not needed <= set(targets.values):
        raise SettingsError(
            f"The method needs targets for {', '.join(sorted(needed))}; these are for "
            f"{', '.join(targets.values)}."
        )


def _warn_already_true(targets: Targets, facts: Sequence[Fact]) -> None:
    first = targets.history[targets.history["step"] == 0]
    known = [facts[i].text for i in first.loc[first["said"], "fact"]]
    if known:
        warnings.warn(
            f"The model gives the new answer already for {len(known)} of {len(facts)} facts, so "
            f"there is nothing to edit there; the first is {known[0]!r}.",
            stacklevel=3,
        )
