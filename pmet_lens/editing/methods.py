"""The methods and ablations as values. Strengths per model are in `hparams.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pmet_lens.editing.edits import Editor
from pmet_lens.editing.finetune import FineTune
from pmet_lens.editing.mend import Mend
from pmet_lens.editing.method import Method, SettingsError
from pmet_lens.editing.solvers import Exact, NullSpace, Ridge

PMET = Method(delta_at=("attn_out", "mlp_out"), write=("mlp",), spread="sqrt", solver=Ridge())
"""PMET (arXiv 2308.08742): optimise both TC hidden states, write only the FFN's share."""

MEMIT = Method(delta_at=("resid_post",), write=("mlp",), spread="linear", solver=Ridge())
"""MEMIT (arXiv 2210.07229): optimise the layer output (TL hidden state), write it into the FFN."""

ROME = Method(delta_at=("mlp_out",), write=("mlp",), spread="linear", solver=Exact(), at_once=1)
"""ROME (arXiv 2202.05262): one layer, one fact at a time, stored exactly. Keys are averaged over
contexts on both sides of the solve; later forks average only one of them (arXiv 2403.07175)."""

EMMET = replace(ROME, at_once=None)
"""EMMET (arXiv 2403.14236): ROME for many facts at once, all stored exactly."""

ALPHAEDIT = replace(MEMIT, solver=NullSpace())
"""AlphaEdit (arXiv 2410.02355): MEMIT, written only where old keys hardly reach."""

FT_W = FineTune()
"""FT-W (MEMIT, arXiv 2210.07229): Adam on one layer's output projection."""

FT_L = FineTune(constrained=True)
"""FT+L (ROME, arXiv 2202.05262): the same, every entry's change bounded."""

MEND = Mend()
"""MEND (arXiv 2110.11309): a trained network turns each fact's gradient into a weight change."""

METHODS: Mapping[str, Method | Editor] = {
    "PMET": PMET,
    "MEMIT": MEMIT,
    "ROME": ROME,
    "EMMET": EMMET,
    "AlphaEdit": ALPHAEDIT,
    "FT-W": FT_W,
    "FT+L": FT_L,
    "MEND": MEND,
}

ABLATIONS: Mapping[str, Method] = {
    "PMET": PMET,
    "w/o δ^a": replace(PMET, delta_at=("mlp_out",)),
    "+ W_O": replace(PMET, write=("attn", "mlp")),
    "linear spread": replace(PMET, spread="linear"),
    "TL hidden state, sqrt spread": replace(MEMIT, spread="sqrt"),
    "MEMIT": MEMIT,
    "at the first subject token": replace(PMET, position="first_subject"),
    "at the last token": replace(PMET, position="last"),
}
"""PMET and what is left of it without one of its parts: those of the paper's section on MHSA
optimisation, with MEMIT as the other end, then the token that is edited."""


def named(name: str) -> Method | Editor:
    """The method of `METHODS`, or the ablation of `ABLATIONS`, of this name.

    Raises:
        SettingsError: for another name; the message lists those there are.
    """
    known = {**ABLATIONS, **METHODS}
    if name not in known:
        raise SettingsError(
            f"There is no method or ablation {name!r}. Methods: {', '.join(METHODS)}. "
            f"Ablations: {', '.join(repr(n) for n in ABLATIONS if n not in METHODS)}."
        )
    return known[name]
