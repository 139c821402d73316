"""What comes before an edit. What it costs: `costs.py` (one edit: operations, memory) first, then
`planning.py`: `pl.plan` of a grid, by counting (`workload.py`) and a probe (`probing.py`). Which
settings it should have: `tuning.py`, its goals (`goals.py`), what it tries (`spaces.py`), how
(`search.py`), what it says (`tuned.py`); `comparing.py` gives methods a fair fight.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
