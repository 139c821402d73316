"""Facts and where they come from: open `facts.py` first (what a `Fact` is). The published data sets
(`datasets.py`) and their downloads, your tables of facts, the bundled world and its texts, the file
format of the package, HTML for notebooks (`markup.py`)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
