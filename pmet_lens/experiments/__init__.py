"""Many runs: `grid.py` (what a `Run` is) first, then its tasks, the store, the engines, and
trials of methods on one model (`trials.py`)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
