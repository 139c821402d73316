"""Tables of this package as figures, in one style: `plots.py` first."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
