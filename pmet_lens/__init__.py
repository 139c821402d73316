"""See, edit and understand what a language model knows: PMET and its relatives on any causal LM.

    import pmet_lens as pl
    model = pl.load("world")
    facts = pl.counterfact(n=100)
    edit = pl.edit(model, facts, pl.second_moments(model, pl.texts()))

The public names are listed in `__init__.pyi`; each is imported on first use. The folders, from the
bottom to the top: data, models, evaluation, editing, moments, interp, experiments, plans,
plotting, explorer, panel. A folder imports only from those before it.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ = sorted([*__all__, "__version__"])


def __dir__() -> list[str]:
    return __all__
