"""A method is a value, an edit is its result.

Open `locate_and_edit.py` first: `edit` is the algorithm, one loop over the critical layers. Each of
these files imports only from those before it: `solvers` (the closed form), `method` (what a method
is), `objective` (the loss), `targets` (its optimisation), `keys`, `edits` (the result, and its
files), `finetune` and `mend` (methods that bring their algorithm), `methods` (all methods by
name, and the settings known for models), `locate_and_edit`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
