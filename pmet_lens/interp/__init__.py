"""The analysis that PMET rests on. Open `lens.py` first, then `causal_trace.py`; the others are one
study a file: attention, similarity, variance, patching, geometry (what an edit moved). `claims.py`
sums them up, `suggestion.py` proposes settings, `passes.py` holds what they share."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
