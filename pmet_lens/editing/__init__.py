"""A method is a value, an edit is its result: `locate_and_edit.py` (the layer loop) first, then
`method.py`, `targets.py`, `objective.py`, `keys.py`, `solvers.py` in the order of the paper."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
