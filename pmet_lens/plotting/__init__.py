"""Tables of this package as figures, in one style. `plots.py` first: the colours, what plots are
made of, and the study; then methods (`method_plots.py`, `tuning_plots.py`) and the explorer
(`maps.py`)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
