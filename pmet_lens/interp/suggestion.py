"""Settings for a model that nobody has published any for: a starting point, marked as one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from pmet_lens.data import downloads, file_format
from pmet_lens.data.facts import Fact, with_answer
from pmet_lens.editing.method import Hparams
from pmet_lens.interp.causal_trace import causal_trace
from pmet_lens.models import activations, tokens
from pmet_lens.models.model import Model, Site, Stream

_ENOUGH = 0.1
"""Share of the answer that the best layer must bring back for a trace to say something."""
_LITTLE = 0.25
"""‖mlp_out‖ / ‖resid_post‖ below which a delta bound by the former cannot move the latter."""
_PER_FACT = 0.6
"""λ per fact edited at once: 6,000 for the 10,000 of the released settings."""
_FORMAT = "pmet_lens trace 1"


@dataclass(frozen=True)
class Suggestion:
    """What `suggest_hparams` proposes: a first guess. `pl.tune` begins with it and measures."""

    hparams: Hparams
    why: str
    """In words, for each choice."""
    trace: pd.DataFrame = field(repr=False)
    """The causal trace it follows from (`causal_trace`)."""

    def __repr__(self) -> str:
        return f"Suggestion, not tuned: {self.hparams}\n{self.why}"


def suggest_hparams(model: Model, facts: Fact | Sequence[Fact], n_edits: int = 100) -> Suggestion:
    """Settings of PMET for editing `n_edits` facts at once in a model without known ones: the first
    guess of `tune`, for the cost of a causal trace.

    `facts`: some the model knows, with `target_true` (about 20 suffice). The last critical layer is
    the one whose hidden state at the last subject token brings most of the answer back when the
    subject is corrupted (causal trace, ROME arXiv 2202.05262, section 2.2): what is recalled is
    all there, and nothing has been read yet. As many layers as a fifth of the depth, three to six,
    end there. The strengths are those released for GPT-J, λ by the number of edits; where the MLP
    writes less than a quarter of the layer output's norm, deltas are bound relative to the latter.

    The rule is a rule of thumb. On the two bundled models that edits are shown on (GPT-J and GPT-2
    blocks, 8 layers) it finds the last critical layer that a sweep of settings found. On
    SmolLM2-135M (Llama blocks, 30 layers) the trace is a plateau over layers 0 to 12: the highest
    point moves with the facts (layer 9 with 24 facts, 2 with 10). On Gemma-3-270M (18 layers) it is
    layer 3 with 10 facts. Whether these are the best layers was not measured there, and nothing was
    on other architectures.

    Raises:
        FactError: where no fact has `target_true`.
    """
    return _following(model.n_layers, _traced(model, facts), n_edits)


def kept_suggestion(
    model: Model, facts: Callable[[], Sequence[Fact]], of: Any, n_edits: int = 100
) -> Suggestion:
    """`suggest_hparams`, whose trace is kept in the cache (`$PMET_LENS_CACHE`) for these weights,
    edits that are on the model included: a second call reads it, for any `n_edits`.

    Args:
        facts: gives the facts, and is called where no trace of theirs is kept.
        of: what tells them from others, as JSON has it.
        n_edits: as `suggest_hparams`.
    """
    weights = file_format.state_digest(model.hf.state_dict())
    folder = downloads.cache() / "suggestions" / f"{model.name}-{weights[:16]}"
    path = folder / f"trace-{file_format.hash_of([_FORMAT, of])}.json"
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        traced = _Traced(pd.DataFrame(kept["trace"]), kept["written"], kept["n_facts"])
        return _following(model.n_layers, traced, n_edits)
    traced = _traced(model, facts())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file_format.whole(path) as part:
            plain = {**vars(traced), "trace": traced.trace.to_dict("list")}
            part.write_text(json.dumps(plain), encoding="utf-8")
    except OSError as error:
        told = f"The suggestion could not be kept ({error}); the next one traces again."
        warnings.warn(told, stacklevel=2)
    return _following(model.n_layers, traced, n_edits)


@dataclass(frozen=True)
class _Traced:
    """What settings follow from."""

    trace: pd.DataFrame
    written: float
    """Norm of what the MLP adds to the stream in the last critical layer, relative to the layer
    output's."""
    n_facts: int


def _traced(model: Model, facts: Fact | Sequence[Fact]) -> _Traced:
    chosen = list(with_answer(facts, "target_true", "suggest_hparams").values())
    trace = causal_trace(model, chosen, places=("last subject token", "last"))
    last, _ = _last(trace, model.n_layers)
    return _Traced(trace, _written(model, chosen, last), len(chosen))


def _last(trace: pd.DataFrame, n_layers: int) -> tuple[int, float]:
    """The last critical layer, and how much of the answer the best layer brings back."""
    below_last = trace["layer"] < n_layers - 1
    at_subject = trace[(trace["place"] == "last subject token") & below_last]
    recovered = at_subject.set_index("layer")["recovered"]
    best = float(recovered.max())
    if best >= _ENOUGH:
        return int(recovered.index[recovered == best][-1]), best
    return max(0, round(0.3 * n_layers) - 1), best


def _following(n_layers: int, traced: _Traced, n_edits: int) -> Suggestion:
    """The rule."""
    last, best = _last(traced.trace, n_layers)
    if best >= _ENOUGH:
        where = (
            f"Restoring the last subject token brings back most of the answer at layer {last}: "
            f"{best:.2f} of it, on {traced.n_facts} facts."
        )
    else:
        where = (
            f"The trace shows no layer that matters at the last subject token (at most {best:.2f} "
            f"of the answer came back on {traced.n_facts} facts): does the model know them? Layer "
            f"{last} is a guess, three tenths of the depth."
        )
    count = min(6, last + 1, max(3, round(n_layers / 5)))
    weight = round(_PER_FACT * n_edits, 9)
    layers = tuple(range(last - count + 1, last + 1))
    size = traced.written
    norm, bound = ("resid_post", "layer output") if size < _LITTLE else ("own stream", "own stream")
    hparams = Hparams(layers, second_moment_weight=weight, reference_norm=norm)
    why = (
        f"{where} {count} layers: a fifth of {n_layers}, three to six. λ = {weight:g} for "
        f"{n_edits} edits at once, in proportion to the released 6,000 for 10,000: sweep it. "
        f"Deltas are bound relative to the {bound}: the MLP writes {size:.2f} of the layer "
        f"output's norm at layer {last}. Everything else is as released for GPT-J."
    )
    return Suggestion(hparams, why, traced.trace)


def _written(model: Model, facts: Sequence[Fact], layer: int) -> float:
    """Mean norm of what the MLP adds to the stream at the last subject token, relative to the layer
    output's."""
    prompts = [tokens.Prompt(f.prompt, f.subject) for f in facts]
    streams: tuple[Stream, ...] = ("mlp_out", "resid_post")
    read = activations.read(model, prompts, streams, (layer,), ("last_subject",))
    written, whole = (value[:, 0].float() for value in read.values())
    road = activations.road(model, Site(layer, "mlp"))
    added = written if road is None else road.reached(written)
    return float(added.norm(dim=-1).mean() / whole.norm(dim=-1).mean())
