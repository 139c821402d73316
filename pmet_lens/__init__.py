"""See, edit and understand what a language model knows: PMET and its relatives on any causal LM.

    import pmet_lens as pl
    model = pl.load("world")
    facts = pl.counterfact(n=100)
    edit = pl.edit(model, facts, pl.second_moments(model, pl.texts()))

Names are imported on first use, so that `import pmet_lens` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pmet_lens.ability import general_ability as general_ability
    from pmet_lens.ability import lm_eval_model as lm_eval_model
    from pmet_lens.activations import Activations as Activations
    from pmet_lens.activations import probe as probe
    from pmet_lens.adapter import Model as Model
    from pmet_lens.adapter import Projection as Projection
    from pmet_lens.adapter import Site as Site
    from pmet_lens.adapter import Stream as Stream
    from pmet_lens.adapter import load as load
    from pmet_lens.analysis import causal_trace as causal_trace
    from pmet_lens.analysis import trace_tokens as trace_tokens
    from pmet_lens.costs import Estimate as Estimate
    from pmet_lens.costs import estimate as estimate
    from pmet_lens.datasets import DataError as DataError
    from pmet_lens.datasets import counterfact as counterfact
    from pmet_lens.datasets import knowns as knowns
    from pmet_lens.datasets import texts as texts
    from pmet_lens.datasets import zsre as zsre
    from pmet_lens.downloads import DownloadError as DownloadError
    from pmet_lens.editing import edit as edit
    from pmet_lens.editing import edit_sequentially as edit_sequentially
    from pmet_lens.edits import Edit as Edit
    from pmet_lens.edits import Editor as Editor
    from pmet_lens.edits import merged as merged
    from pmet_lens.engine import run as run
    from pmet_lens.evaluation import ask as ask
    from pmet_lens.evaluation import evaluate as evaluate
    from pmet_lens.evaluation import recall as recall
    from pmet_lens.evaluation import summarise as summarise
    from pmet_lens.explorer import Explorer as Explorer
    from pmet_lens.explorer import explore as explore
    from pmet_lens.fact_tables import read_facts as read_facts
    from pmet_lens.facts import Fact as Fact
    from pmet_lens.facts import FactError as FactError
    from pmet_lens.finetune import FineTune as FineTune
    from pmet_lens.finetune import FineTuneHparams as FineTuneHparams
    from pmet_lens.generation import generate as generate
    from pmet_lens.generation import generate_batch as generate_batch
    from pmet_lens.geometry import answer_gain as answer_gain
    from pmet_lens.geometry import drift as drift
    from pmet_lens.grid import Cut as Cut
    from pmet_lens.grid import GridError as GridError
    from pmet_lens.grid import Run as Run
    from pmet_lens.grid import load_grid as load_grid
    from pmet_lens.grid import save_grid as save_grid
    from pmet_lens.hparams import HPARAMS as HPARAMS
    from pmet_lens.hparams import hparams_for as hparams_for
    from pmet_lens.linalg import Exact as Exact
    from pmet_lens.linalg import NullSpace as NullSpace
    from pmet_lens.linalg import Ridge as Ridge
    from pmet_lens.linalg import SolveError as SolveError
    from pmet_lens.live import EditError as EditError
    from pmet_lens.mend import Mend as Mend
    from pmet_lens.mend import MendHparams as MendHparams
    from pmet_lens.mend_training import train_editor as train_editor
    from pmet_lens.methods import ABLATIONS as ABLATIONS
    from pmet_lens.methods import ALPHAEDIT as ALPHAEDIT
    from pmet_lens.methods import EMMET as EMMET
    from pmet_lens.methods import FT_L as FT_L
    from pmet_lens.methods import FT_W as FT_W
    from pmet_lens.methods import MEMIT as MEMIT
    from pmet_lens.methods import MEND as MEND
    from pmet_lens.methods import METHODS as METHODS
    from pmet_lens.methods import PMET as PMET
    from pmet_lens.methods import ROME as ROME
    from pmet_lens.methods import named as named
    from pmet_lens.moment_files import kept_moments as kept_moments
    from pmet_lens.moment_files import load_moments as load_moments
    from pmet_lens.moment_files import open_moments as open_moments
    from pmet_lens.moment_files import save_moments as save_moments
    from pmet_lens.moments import Moment as Moment
    from pmet_lens.moments import MomentError as MomentError
    from pmet_lens.moments import second_moments as second_moments
    from pmet_lens.patterns import attention_patterns as attention_patterns
    from pmet_lens.patterns import pattern_similarity as pattern_similarity
    from pmet_lens.patterns import subject_attention as subject_attention
    from pmet_lens.planning import Plan as Plan
    from pmet_lens.planning import plan as plan
    from pmet_lens.published_moments import export_moments as export_moments
    from pmet_lens.published_moments import import_moments as import_moments
    from pmet_lens.readout import lens as lens
    from pmet_lens.readout import lens_tokens as lens_tokens
    from pmet_lens.results import rows_of as rows_of
    from pmet_lens.sessions import Session as Session
    from pmet_lens.settings import Hparams as Hparams
    from pmet_lens.settings import Method as Method
    from pmet_lens.settings import SettingsError as SettingsError
    from pmet_lens.similarity import component_similarity as component_similarity
    from pmet_lens.sources import ModelError as ModelError
    from pmet_lens.statements import claims as claims
    from pmet_lens.suggestion import Suggestion as Suggestion
    from pmet_lens.suggestion import suggest_hparams as suggest_hparams
    from pmet_lens.swapping import transfer as transfer
    from pmet_lens.targets import Targets as Targets
    from pmet_lens.targets import optimise as optimise
    from pmet_lens.tokens import sample_contexts as sample_contexts
    from pmet_lens.trials import Bench as Bench
    from pmet_lens.trials import Trial as Trial
    from pmet_lens.trials import ablations as ablations
    from pmet_lens.trials import compare as compare
    from pmet_lens.variance import variance_split as variance_split
    from pmet_lens.variants import ablate as ablate

__version__ = "0.1.0"

_HOME = {
    "Session": "sessions",
    "ablate": "variants",
    "Explorer": "explorer",
    "explore": "explorer",
    "trace_tokens": "analysis",
    "subject_attention": "patterns",
    "lens_tokens": "readout",
    "Model": "adapter",
    "Projection": "adapter",
    "Site": "adapter",
    "Stream": "adapter",
    "load": "adapter",
    "Fact": "facts",
    "FactError": "facts",
    "ModelError": "sources",
    "Exact": "linalg",
    "NullSpace": "linalg",
    "Ridge": "linalg",
    "SolveError": "linalg",
    "DataError": "datasets",
    "counterfact": "datasets",
    "read_facts": "fact_tables",
    "DownloadError": "downloads",
    "knowns": "datasets",
    "texts": "datasets",
    "zsre": "datasets",
    "Hparams": "settings",
    "Method": "settings",
    "SettingsError": "settings",
    "Moment": "moments",
    "MomentError": "moments",
    "kept_moments": "moment_files",
    "load_moments": "moment_files",
    "open_moments": "moment_files",
    "import_moments": "published_moments",
    "export_moments": "published_moments",
    "save_moments": "moment_files",
    "second_moments": "moments",
    "sample_contexts": "tokens",
    "suggest_hparams": "suggestion",
    "Suggestion": "suggestion",
    "Targets": "targets",
    "optimise": "targets",
    "ABLATIONS": "methods",
    "HPARAMS": "hparams",
    "MEND": "methods",
    "Mend": "mend",
    "MendHparams": "mend",
    "named": "methods",
    "train_editor": "mend_training",
    "Bench": "trials",
    "Trial": "trials",
    "ablations": "trials",
    "compare": "trials",
    "MEMIT": "methods",
    "METHODS": "methods",
    "PMET": "methods",
    "ALPHAEDIT": "methods",
    "EMMET": "methods",
    "ROME": "methods",
    "hparams_for": "hparams",
    "Edit": "edits",
    "FT_L": "methods",
    "FT_W": "methods",
    "Editor": "edits",
    "FineTuneHparams": "finetune",
    "FineTune": "finetune",
    "edit_sequentially": "editing",
    "merged": "edits",
    "edit": "editing",
    "Estimate": "costs",
    "estimate": "costs",
    "EditError": "live",
    "causal_trace": "analysis",
    "claims": "statements",
    "variance_split": "variance",
    "transfer": "swapping",
    "component_similarity": "similarity",
    "pattern_similarity": "patterns",
    "attention_patterns": "patterns",
    "lens": "readout",
    "drift": "geometry",
    "answer_gain": "geometry",
    "probe": "activations",
    "Activations": "activations",
    "ask": "evaluation",
    "evaluate": "evaluation",
    "generate": "generation",
    "generate_batch": "generation",
    "general_ability": "ability",
    "lm_eval_model": "ability",
    "recall": "evaluation",
    "summarise": "evaluation",
    "Cut": "grid",
    "GridError": "grid",
    "Run": "grid",
    "load_grid": "grid",
    "save_grid": "grid",
    "Plan": "planning",
    "plan": "planning",
    "rows_of": "results",
    "run": "engine",
}
__all__ = sorted([*_HOME, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pmet_lens' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"pmet_lens.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
