"""Facts and where they come from: `facts.py` (what a `Fact` is) first, then the data sets, tables
of facts, the bundled world, downloads, and the one file format of the package."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
