"""Two facts, and the strengths that edit them on a tiny random model."""

from __future__ import annotations

import pmet_lens as pl

HP = pl.Hparams(layers=(1, 2), n_steps=6, lr=0.1, second_moment_weight=0.3, clamp=2.0)
CONTEXTS = ["{}", "The tower of Ilmar. {}"]
FACTS = [
    pl.Fact("Mira Tolan", "{} plays the sport of", "rugby", "tennis"),
    pl.Fact("Ostria", "Of {}, the capital is", "Ilmar", "Kel"),
]
