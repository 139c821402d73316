"""Many runs: `grid.py` (what a `Run` is) first, then the tasks, the store, the engines, plans, and
comparisons of methods."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
