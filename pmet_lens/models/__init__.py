"""The model: open `model.py` first. The names of its places (`sites.py`), the copy that
TransformerLens runs (`bridge.py`) and its upper blocks alone (`tail.py`), loading, edits on its
weights, prompts and their tokens, activations, log-probabilities of answers, generation."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
