"""The model, and nothing above it: `model.py` first. Loading, the one bridge to TransformerLens,
live weights, tokens, reading activations, generation."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
