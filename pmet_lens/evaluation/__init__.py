"""What a model answers, and how good that is: `scoring.py` first, then `teacher_forcing.py` and
`free_answers.py` (what lies between: `gap.py`), `metrics.py` (with 95 % intervals) and `ability.py`
(what an edit leaves unharmed)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
