"""The edit: targets, then one closed-form weight change per critical layer.

`edit` reads like the algorithm box of the paper. It leaves the model as it was; the result is an
`Edit`, a value that can be applied, undone, saved and loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pmet_lens.data import progress
from pmet_lens.data.facts import Fact, check_editable, listed
from pmet_lens.editing import keys
from pmet_lens.editing import targets as targeting
from pmet_lens.editing.edit_files import origin, thin
from pmet_lens.editing.edits import Edit, Editor, merged, refuse
from pmet_lens.editing.method import Hparams, Method, SettingsError
from pmet_lens.editing.methods import PMET, resolved, settled
from pmet_lens.editing.solvers import Dense, Exact, Factor, NullSpace, On, SecondMoment, SolveError
from pmet_lens.editing.targets import OnStep, Targets
from pmet_lens.evaluation import knowledge, scoring
from pmet_lens.evaluation.retention import Checkpoints
from pmet_lens.models import generation, tokens
from pmet_lens.models.model import Model, Site

Moments = Mapping[Site, object] | Mapping[str, object]


def edit(
    model: Model,
    facts: Fact | Sequence[Fact],
    moments: Moments | None,
    method: Method | Editor | str = PMET,
    hparams: Any = None,
    contexts: Sequence[str] | None = None,
    targets: Targets | Callable[..., Targets] | None = None,
    on_step: OnStep | None = None,
    *,
    factorised: dict[Site, Factor] | None = None,
    earlier: Mapping[Site, Float[Tensor, "key d_in"]] | None = None,
    check: bool | None = None,
    skip: bool = False,
) -> Edit:
    """Compute one edit that makes `model` give every fact's new answer.

    A method that edits fewer facts `at_once` does so in steps, and the edit is their sum.

    Args:
        moments: Site (or its text, "5.mlp") -> second moment of the keys, `[d_in, d_in]` tensors or
            `Moment`s, in memory or on disk (`open_moments`); None for fine-tuning.
        method: a value, or a name that `pl.named` knows.
        hparams: `Hparams`, or what the method has instead; None takes the settings known for this
            model as released (`pl.HPARAMS`), λ included, however many facts. What `Hparams` leave
            open is as released, λ by the number of facts; `Edit.hparams` says what it was.
        contexts: prefixed templates such as "I am. {}"; None samples them from the model.
        targets: from an earlier edit of the same facts, to skip their optimisation; or, for one
            that goes on where it was cut, `pl.KeptTargets(folder)`.
        on_step: called with (step, losses per fact) after every optimisation step.
        factorised: kept factorisations of the moments, filled here and reused by later edits;
            pass the same dict only with the same moments, solver, λ and `earlier`. Worth it for
            solvers that need an eigendecomposition; a `Moment` keeps its Cholesky factor itself.
        earlier: per site the keys of facts edited before, whose answers are to survive.
        check: ask the edited model for every new answer, once (`Edit.answered`), and warn where it
            gives less than half of them; None: unless `targets` are given.
        skip: leave out facts that cannot be edited, with a warning (`pl.editable` lists them).

    Raises:
        FactError, SettingsError, SolveError: bad facts, settings, or moments, in words.
    """
    method = resolved(method)
    facts = knowledge.editable(model, facts, contexts or ("{}",)) if skip else listed(facts)
    check_editable(facts)
    made = _made(
        model, facts, moments, method, hparams, contexts, targets, on_step, factorised, earlier
    )
    if check is False or (check is None and isinstance(targets, Targets)):
        return made
    with made.applied(model):
        said = scoring.answered(model, facts)
    if 2 * said < len(facts):
        warnings.warn(
            f"With this edit the model gives the new answer for only {said} of {len(facts)} facts. "
            "See edit.receipt(model): a smaller second_moment_weight (λ), more n_steps, a wider "
            f"clamp or other layers may help. It was made with {made.hparams}.",
            stacklevel=2,
        )
    return replace(made, answered=said)


@torch.inference_mode(False)
def _made(
    model: Model,
    facts: list[Fact],
    moments: Moments | None,
    method: Method | Editor,
    hparams: Any,
    contexts: Sequence[str] | None,
    targets: Targets | Callable[..., Targets] | None,
    on_step: OnStep | None,
    factorised: dict[Site, Factor] | None,
    earlier: Mapping[Site, Tensor] | None,
) -> Edit:
    """`edit` of checked facts, unchecked; inference mode, which optimises nothing, is left."""
    stepwise = isinstance(method, Method) and (method.at_once or len(facts)) < len(facts)
    given = {"targets": targets, "factorised": factorised, "earlier": earlier}
    if not isinstance(method, Method):
        refuse(given, f"{type(method).__name__} has another algorithm, which does not read it")
        return method.edit(model, facts, moments, hparams, contexts, targets, on_step)
    moments = _by_site({} if moments is None else moments)
    if stepwise and method.at_once is not None:
        why = f"of {len(facts)} facts {method.at_once} are edited at once, the next ones on a model"
        refuse({"targets": targets}, f"{why} that is edited by then, for which they are not")
        size, more = method.at_once, {"factorised": factorised, "earlier": earlier}
        steps = edit_sequentially(
            model, facts, moments, method, hparams, contexts, size, on_step=on_step, **more
        )
        return merged(steps)
    hp = settled(model, method, hparams, len(facts))
    hp.check(model.n_layers)
    sites = [Site(layer, projection) for layer in hp.layers for projection in method.write]
    if isinstance(method.solver, Exact) and (same := tokens.twins(model, facts, method.position)):
        raise SolveError(f"{same} An exact solver cannot tell them apart: use Ridge().")
    contexts = None if contexts is None else generation.contexts_of(model, contexts)
    _check_given(model, moments, sites, contexts or ())
    if isinstance(method.solver, NullSpace):
        _warn_few_tokens(moments, sites)
    contexts = generation.contexts_of(model, contexts)
    if targets is None:
        with progress.steps("targets", len(facts), hp.n_steps, on_step) as told:
            targets = targeting.optimise(model, facts, method, hp, contexts, told)
    elif not isinstance(targets, Targets):
        targets = targets(model, facts, method, hp, contexts)
    targeting.check(model, targets, facts, method, hp)
    targeting.warn_already_true(targets, facts)
    solver = hp.strengthen(method.solver)
    factors: dict[Site, tuple[Tensor, Tensor]] = {}
    reader = keys.Reader(model, facts, contexts, method.position)
    wanted = keys.wanted(reader, targets, method)
    half = len(hp.layers) // 2 if method.refresh else 0
    with model.restored(sites):
        for i, layer in enumerate(hp.layers):
            if 0 < half == i:
                fresh = targeting.optimise(model, facts, method, hp, contexts)
                wanted = keys.wanted(reader, fresh, method)
            for projection in method.write:
                site = Site(layer, projection)
                stream = method.follows(projection)
                K, now = reader.both(site, targets.layer, stream)
                rest = wanted[stream].to(now.device) - now
                share = method.share(len(hp.layers) - i)
                R = keys.to_write(reader, site, stream, targets.layer, rest, share).to(K.device)
                try:
                    factor = (factorised or {}).get(site)
                    if factor is None:
                        C = _moment(moments[site], K.device)
                        past = None if earlier is None else earlier[site]
                        factor = solver.factorise(C, hp.second_moment_weight, past)
                    left, right = factors[site] = thin(*factor.factors(K, R))
                except SolveError as error:
                    raise SolveError(f"At {site}: {error}{_dead(moments[site])}") from error
                if factorised is not None:
                    factorised[site] = factor
                model.weight(site).add_((left @ right).to(model.dtype))
    made_on = origin(model, sites)
    return Edit(factors, model.dtype, tuple(facts), method, hp, tuple(contexts), targets, **made_on)


@torch.inference_mode(False)
def edit_sequentially(
    model: Model,
    facts: Fact | Sequence[Fact],
    moments: Moments,
    method: Method | str = PMET,
    hparams: Hparams | None = None,
    contexts: Sequence[str] | None = None,
    batch_size: int | None = None,
    *,
    protect: bool = False,
    on_batch: Callable[[int, Edit], object] | None = None,
    on_step: OnStep | None = None,
    factorised: dict[Site, Factor] | None = None,
    earlier: Mapping[Site, Float[Tensor, "key d_in"]] | None = None,
    checkpoints: Checkpoints | None = None,
) -> list[Edit]:
    """Edit `batch_size` facts after the other (None: as many as the method edits at once, else
    one), each batch on the model as edited so far.

    `protect` adds the keys of earlier batches to what every solve preserves (AlphaEdit's sequential
    editing; for Ridge `λC + KₚᵀKₚ`). `on_batch(facts so far, edit)` runs while the model has all
    edits so far, to measure it; `checkpoints` measures by itself, and warns where the model
    collapses. `on_step`, `factorised`, `earlier`: as `edit`, for every batch. The model is left as
    it was; `merged` adds the edits up.
    """
    chosen_method = resolved(method)
    if not isinstance(chosen_method, Method):
        raise SettingsError(
            f"{type(chosen_method).__name__} does not edit in batches: edit each list of facts "
            "with pl.edit, with the edits before it applied."
        )
    facts, method = listed(facts), chosen_method
    batch_size = (method.at_once or 1) if batch_size is None else batch_size
    if not isinstance(batch_size, Integral) or batch_size < 1:
        raise SettingsError(f"batch_size must be a whole number ≥ 1, not {batch_size!r}.")
    if protect and factorised is not None:
        refuse({"factorised": factorised}, "with protect every batch has its own system to solve")
    check_editable(facts)
    hp = settled(model, method, hparams, min(batch_size, len(facts)))
    contexts = generation.contexts_of(model, contexts)
    sites = [Site(layer, projection) for layer in hp.layers for projection in method.write]
    past: dict[Site, Tensor] = dict(earlier or {})
    kept: dict[Site, Factor] = {} if factorised is None else factorised
    edits: list[Edit] = []
    look = None if checkpoints is None else checkpoints.begin(model, facts, sites)
    with model.restored(sites), progress.line("edits", "fact") as tell:
        for start in range(0, len(facts), batch_size):
            chosen = facts[start : start + batch_size]
            known, kept = past or None, {} if protect else kept
            step = _made(model, chosen, moments, method, hp, contexts, None, on_step, kept, known)
            for site, delta in step.deltas.items():
                model.weight(site).add_(delta)
            edits.append(step)
            for site in sites if protect else ():
                new = keys.averaged_keys(model, chosen, contexts, site, method.position)
                past[site] = torch.cat([past[site], new]) if site in past else new
            if look is not None:
                look(start + len(chosen))
            if on_batch is not None:
                on_batch(start + len(chosen), step)
            tell(start + len(chosen), len(facts))
    return edits


def _by_site(moments: Moments) -> Mapping[Site, object]:
    if not any(isinstance(site, str) for site in moments):
        return moments  # type: ignore[return-value]
    return {Site.parse(str(site)): moment for site, moment in moments.items()}


def _moment(moment: object, device: torch.device) -> SecondMoment:
    """The second moment as solvers take it, whether a tensor, a `Moment` or one on disk."""
    if not isinstance(moment, (Tensor, SecondMoment)):
        raise SettingsError(f"A second moment must be a Tensor or a Moment, not {type(moment)}.")
    return On(Dense(moment) if isinstance(moment, Tensor) else moment, device)


def _dead(moment: object) -> str:
    """In words, the inputs of a projection that no token of the text used."""
    entries = _moment(moment, torch.device("cpu")).matrix().diagonal()
    if not (dead := int((entries == 0).sum())):
        return ""
    return (
        f" {dead} of its {len(entries)} inputs were 0 on every token (dead neurons, as ReLU leaves "
        "them): where more text does not wake them, give their moment a floor, such as 1e-4 of "
        "its mean diagonal on the diagonal, moments[site] = C + floor · I."
    )


def _warn_few_tokens(moments: Mapping[Site, object], sites: Sequence[Site]) -> None:
    """Other solvers refuse such a moment; a null space it has, and too large a one."""
    known: dict[Site, Any] = {s: moments[s] for s in sites if hasattr(moments[s], "count")}
    few = [f"{s} ({m.count} for {m.shape[0]})" for s, m in known.items() if m.count < m.shape[0]]
    if few:
        warnings.warn(
            f"Second moments of fewer tokens than inputs: {', '.join(few)}. What is taken for free "
            "of old memories there is mostly what the text did not reach: take ten times as many.",
            stacklevel=5,
        )


def _check_given(
    model: Model, moments: Mapping[Site, object], sites: Sequence[Site], contexts: Sequence[str]
) -> None:
    for site in sites:
        if site not in moments:
            have = ", ".join(map(str, sorted(moments))) or "none"
            raise SettingsError(
                f"The second moment of site {site} is missing (there are: {have}). Compute it with "
                f"second_moments(model, texts, layers={sorted({s.layer for s in sites})})."
            )
        _moment(moments[site], model.device)
        shape, size = tuple(getattr(moments[site], "shape", ())), model.d_in(site)
        if shape and shape != (size, size):
            raise SettingsError(
                f"The second moment of site {site} is {list(shape)}, but its keys have {size} "
                "entries: it belongs to another model."
            )
    for context in contexts:
        if context.count("{}") != 1:
            raise SettingsError(
                f"The context {context!r} needs exactly one {{}}, where the prompt goes."
            )
