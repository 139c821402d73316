"""What an edit or a grid costs before it runs: `costs.py` (one edit: operations and memory) first,
then `planning.py`: `pl.plan` of a grid, by counting (`workload.py`) and a probe (`probing.py`).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
