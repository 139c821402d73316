"""`Method` says what the algorithm is, `Hparams` how strongly it acts on one model.

Ablations change only the first, models only the second.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral
from typing import Any, Literal, get_args

from pmet_lens.data import markup
from pmet_lens.editing.solvers import Exact, NullSpace, Solver
from pmet_lens.models.model import Model, Projection, Stream
from pmet_lens.models.sites import several
from pmet_lens.models.tokens import Position

Spread = Literal["sqrt", "linear"]
ReferenceNorm = Literal["own stream", "resid_post"]
StepRule = Literal["Adam", "falling", "relative"]

LATER = {"later": True}
"""Of fields that came later: files and digests leave them out where they are at their default."""
STREAM_OF: dict[Projection, Stream] = {"attn": "attn_out", "mlp": "mlp_out"}
"""The stream a projection writes."""
DELTA_AT: tuple[Stream, ...] = ("attn_out", "mlp_out", "resid_post")
"""The streams that can get a delta: what a layer writes, and its output."""


class SettingsError(ValueError):
    """A method or hyper-parameters that contradict themselves or the model."""


@dataclass(frozen=True)
class Method:
    """Four answers that tell the editing methods apart (PMET, MEMIT, ROME, EMMET, AlphaEdit)."""

    delta_at: tuple[Stream, ...]
    """Streams of the last critical layer that get a delta while the targets are optimised."""
    write: tuple[Projection, ...]
    """Projections whose weights are changed, `attn` (W_O) before `mlp` (W_out)."""
    spread: Spread
    """How much of the residual a layer takes when n remain: R/√n ("sqrt", PMET) or R/n
    ("linear", MEMIT)."""
    solver: Solver
    """How the facts are weighed against what the projection already stores (`solvers`)."""
    at_once: int | None = None
    """How many facts are edited in one step; more are edited one step after the other, each on the
    model as edited so far (ROME: 1). None: all of them together."""
    position: Position = "last_subject"
    """The token that is edited: where the deltas are added and keys and values are read (released
    `fact_token`; the others are ablations)."""
    # What `VARIANTS` try. Left out of files at these values, which are those of the papers.
    gather: Stream | None = field(default=None, metadata=LATER)
    """The stream that is asked for the sum of all deltas, whichever is written: "mlp_out" or
    "resid_post" (then what critical layers below have brought counts). None: see `follows`."""
    attn_fades: bool = field(default=False, metadata=LATER)
    """δ^a's ball shrinks to nothing over the first half of the steps; no fact stops before."""
    refresh: bool = field(default=False, metadata=LATER)
    """Targets are optimised once more when half of the layers are written, on the model so far."""

    def __post_init__(self) -> None:
        for name, values, choices in (
            ("delta_at", self.delta_at, DELTA_AT),
            ("write", self.write, get_args(Projection)),
            ("spread", (self.spread,), get_args(Spread)),
            ("position", (self.position,), get_args(Position)),
            ("gather", (self.gather,), (None, "mlp_out", "resid_post")),
        ):
            wrong = [v for v in values if v not in choices]
            if wrong or not values or len(set(values)) != len(values):
                known = ", ".join(map(str, choices))
                raise SettingsError(
                    f"{name} must be a choice of {known}, each at most once; got {values!r}."
                )
        if self.at_once is not None and self.at_once < 1:
            raise SettingsError(f"at_once must be at least 1 or None, not {self.at_once}.")
        if self.write == ("mlp", "attn"):
            raise SettingsError("write both projections as ('attn', 'mlp'): attn comes first.")
        if self.attn_fades and "attn_out" not in self.delta_at:
            raise SettingsError("attn_fades is of δ^a: delta_at lacks attn_out.")
        if self.gather and (self.delta_at, self.write) != (("attn_out", "mlp_out"), ("mlp",)):
            raise SettingsError("gather is of δ^a and δ^m, for methods that write the MLP alone.")
        for projection in self.write:
            self.follows(projection)

    def _repr_html_(self) -> str:
        write = {"attn": "W_O of attention", "mlp": "W_out of the feed-forward layer"}
        share = "√n" if self.spread == "sqrt" else "n"
        shown = {
            "streams that get a delta": ", ".join(self.delta_at),
            "weights written": ", ".join(write[p] for p in self.write),
            "residual": f"R/{share} to each of n layers left",
            "solver": repr(self.solver),
            "edited token": self.position,
            "facts": f"{self.at_once} at a time" if self.at_once else "all facts together",
        }
        for f in fields(self):
            if "later" in f.metadata and (value := getattr(self, f.name)) != f.default:
                shown[f.name] = str(value)
        return markup.pairs(shown, "Method")

    def follows(self, projection: Projection) -> Stream:
        """The stream whose target the projection is asked to produce: the one it writes where that
        was optimised, else `resid_post`."""
        written = STREAM_OF[projection]
        for stream in (self.gather or written, "resid_post"):
            if stream in (*self.delta_at, self.gather):
                return stream
        why = f"delta_at has neither {written} nor resid_post"
        raise SettingsError(f"Nothing tells {projection} what to produce: {why}.")

    def share(self, remaining: int) -> float:
        """The divisor of the residual when `remaining` layers are still to be written."""
        return math.sqrt(remaining) if self.spread == "sqrt" else float(remaining)


class Open(float):
    """A strength that nobody gave, with PMET's value: `Hparams.settled` puts the method's there."""


class OpenCount(int):
    """The same, of a whole number."""


@dataclass(frozen=True, repr=False)
class Hparams:
    """Strengths of an edit on one model. What is not given is taken from the method (`settled`):
    the values released for GPT-J, λ by the number of facts. Those shown here are PMET's."""

    layers: tuple[int, ...]
    """Critical layers, ascending, from 0; the last must lie below the model's last layer."""
    n_steps: int = OpenCount(30)
    """Optimisation steps per fact, ≥ 1 (`v_num_grad_steps`; PMET hparams for GPT-J: 30)."""
    lr: float = Open(0.2)
    """Learning rate of Adam on the deltas, > 0 (`v_lr`)."""
    weight_decay: float = Open(0.5)
    """ω ≥ 0, weight of ‖δ‖/‖clean‖² per stream (`v_weight_decay`; the norm is not squared)."""
    clamp: float = Open(0.75)
    """c > 0: every delta stays within c times the reference norm (`clamp_norm_factor`)."""
    kl_weight: float = Open(1.0)
    """μ ≥ 0, weight of the KL divergence on "{} is a" (`kl_factor`)."""
    nll_weight: float = Open(1.0)
    """φ > 0, weight of the new answer's negative log-likelihood (`nll_loss_factor`)."""
    second_moment_weight: float = Open(6000.0)
    """λ > 0, weight of the second moment against the new keys (`mom2_update_weight`). Not given: in
    proportion to the facts edited at once, as released for 10,000 (0.6 per fact; MEMIT 1.5)."""
    stop_loss: float = Open(0.05)
    """A fact stops when its whole loss is below this (released `compute_z.py`)."""
    easing: float = Open(0.1)
    """Factor on φ once every target token is the argmax in every prompt; 1 switches easing and
    the KL stop off (MEMIT)."""
    kl_stop: float = Open(0.01)
    """While eased, a fact stops when μ·KL is at most this (released `compute_z.py`)."""
    null_space_threshold: float = Open(0.02)
    """> 0: eigenvectors of the second moment below it span where AlphaEdit may write (released
    `nullspace_threshold`; it scales with the squared size of the keys)."""
    null_space_l2: float = Open(10.0)
    """> 0, weight of the identity there (released `L2`)."""
    reference_norm: ReferenceNorm = "own stream"
    """Clean norm that clamp and decay refer to: of the stream itself (released), or of the layer
    output, for models whose MLP writes little."""
    prefixes_per_step: int | None = None
    """How many context prefixes a step runs beside the plain prompt, ≥ 1, in turn; None: all
    (released). Whether a fact is done is read from what each prompt gave when it last ran."""
    step_rule: StepRule = "Adam"
    """How a step moves the deltas: by Adam at `lr` (released); "relative": by Adam, with `lr` as a
    share of the radius of the ball, c times the reference norm, so that it suits any size of
    activations; "falling": each against its unit gradient (half this step's, half those before),
    by a length that falls evenly from that radius to 0, whatever `lr`."""

    def __post_init__(self) -> None:
        layers = several(self.layers)
        wrong = [v for v in (*layers, self.n_steps) if not isinstance(v, Integral)]
        if wrong:
            raise SettingsError(f"layers and n_steps are whole numbers, not {wrong[0]!r}.")
        object.__setattr__(self, "layers", tuple(int(layer) for layer in layers))
        if not self.layers or any(b <= a for a, b in itertools.pairwise(self.layers)):
            what = "ascending layer numbers without repeats"
            raise SettingsError(f"layers must be {what}, not {self.layers}.")
        if self.layers[0] < 0:
            raise SettingsError(f"layers count from 0; {self.layers[0]} is negative.")
        if self.n_steps < 1:
            raise SettingsError(f"n_steps must be at least 1, not {self.n_steps}.")
        positive = ("lr", "clamp", "nll_weight", "second_moment_weight", "easing")
        positive += ("null_space_threshold", "null_space_l2")
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, (int, float)) and not (value >= 0 and math.isfinite(value)):
                raise SettingsError(f"{one.name} must be a number ≥ 0, not {value}.")
            if one.name in positive and value == 0:
                raise SettingsError(f"{one.name} must be greater than 0.")
        if self.easing > 1:
            raise SettingsError(f"easing must be at most 1, not {self.easing}.")
        n = self.prefixes_per_step
        if n is not None and not (isinstance(n, Integral) and n >= 1):
            raise SettingsError(f"prefixes_per_step must be a whole number ≥ 1 or None, not {n}.")
        for name, known in (("reference_norm", ReferenceNorm), ("step_rule", StepRule)):
            if (value := getattr(self, name)) not in get_args(known):
                choices = ", ".join(get_args(known))
                raise SettingsError(f"{name} must be one of {choices}, not {value!r}.")

    def __repr__(self) -> str:
        given = [f"{name}={value!r}" for name, value in self.given.items()]
        return f"Hparams({', '.join(given)})"

    @property
    def given(self) -> dict[str, Any]:
        """The fields that somebody gave, with their values; the others are up to the method."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: v for name, v in values.items() if not isinstance(v, (Open, OpenCount))}

    def settled(self, method: Method | None = None, n_facts: int = 10_000) -> Hparams:
        """These strengths with nothing left to the method: what was given, else what is released
        for `method` (None: PMET) on GPT-J, λ in proportion to `n_facts` edited at once."""
        released = RELEASED["PMET" if method is None else kind_of(method)]
        values: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, (Open, OpenCount)):
                plain = int(value) if isinstance(value, OpenCount) else float(value)
                values[one.name] = released.get(one.name, plain)
        if "second_moment_weight" in values:
            of_all = values["second_moment_weight"] * float(n_facts)
            values["second_moment_weight"] = of_all / _RELEASED_EDITS
        return replace(self, **values)

    def fast(self) -> Hparams:
        """These settings with fewer and cheaper steps, chosen for PMET (`FAST`); the targets are
        others."""
        return replace(self, **FAST)

    def asked(self, step: int, n_prompts: int) -> list[int]:
        """The numbers of the prompts that a step runs: the plain one, and so many prefixed ones in
        turn."""
        others = n_prompts - 1
        n = min(self.prefixes_per_step or others, others)
        return [0, *sorted(1 + (step * n + i) % others for i in range(n))]

    def strengthen(self, solver: Solver) -> Solver:
        """The solver; what it leaves open (None, as AlphaEdit may) is taken from here."""
        if not isinstance(solver, NullSpace):
            return solver
        threshold = self.null_space_threshold if solver.threshold is None else solver.threshold
        return NullSpace(threshold, self.null_space_l2 if solver.l2 is None else solver.l2)

    def check(self, n_layers: int) -> None:
        """Refuse layers the model does not have, and its last one.

        Raises:
            SettingsError: naming the layers that can be used.
        """
        if self.layers[-1] >= n_layers - 1:
            raise SettingsError(
                f"layers {self.layers} do not fit a model of {n_layers} layers: the last critical "
                f"layer can be at most {n_layers - 2}, because a change at the subject in the "
                "last layer cannot reach the answer."
            )


_RELEASED_EDITS = 10_000
"""Facts edited at once, for which the released λ is."""
_ROME = {"n_steps": 20, "lr": 0.5, "clamp": 4.0, "kl_weight": 0.0625, "easing": 1.0}
_MEMIT = _ROME | {"n_steps": 25, "clamp": 0.75, "second_moment_weight": 15000.0}
RELEASED: Mapping[str, Mapping[str, float]] = {"PMET": {}, "MEMIT": _MEMIT, "ROME": _ROME}
"""Kind of method -> its strengths on GPT-J where they are not PMET's, which are those of `Hparams`:
MEMIT paper, appendix B.4; ROME's released gpt2-xl.json (see `methods.HPARAMS`)."""


FAST: Mapping[str, Any] = {"n_steps": 10, "step_rule": "relative", "lr": 0.4,
                           "prefixes_per_step": 1}  # fmt: skip
"""What `Hparams.fast` changes. Source: measured here, chosen for PMET on 60 real facts of
SmolLM2-135M; on 100 others all of PMET's scores lie inside the intervals of the published steps.
MEMIT, whose published steps are fewer, loses five points of S, eight of PS and five of EA."""


def kind_of(method: Method) -> str:
    """The kind of settings that a method takes: "ROME" for those that store facts exactly in one
    layer, "MEMIT" for those that optimise the layer output, else "PMET"."""
    if isinstance(method.solver, Exact):
        return "ROME"
    return "MEMIT" if method.delta_at == ("resid_post",) else "PMET"


def optimised(model: Model, stream: Stream) -> Stream:
    """Where the delta of `stream` lies. Behind a post-norm not every layer output can be written,
    so there the delta lies on what the MLP writes, before the norm."""
    if stream == "resid_post" and not model.enters_output("mlp_out"):
        return "mlp_out"
    return stream


def streams_of(model: Model, method: Method) -> tuple[Stream, ...]:
    """The streams that get a delta when this method edits this model."""
    return tuple(dict.fromkeys(optimised(model, stream) for stream in method.delta_at))
