"""The analysis behind PMET: lens, causal trace, attention, variance, similarity, activation
patching, what an edit moved, the claims of the paper as a table, suggested settings."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
