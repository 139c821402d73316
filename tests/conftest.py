"""For every test: no network, one thread, and the shapes in the package's signatures checked."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Read at import time by the libraries below, hence set first.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    WANDB_MODE="disabled",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)

import jaxtyping
import pytest
import torch

if any(name.split(".")[0] == "pmet_lens" for name in sys.modules):
    raise RuntimeError("pmet_lens was imported before its shape checks; start pytest without it.")
# `make bench` and `make test-browser`, without this file: checked shapes take time.
collect_ignore = ["benchmarks", "browser"]
jaxtyping.install_import_hook("pmet_lens", "beartype.beartype")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data beside the repository, which a plain clone does not have."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip(f"needs the shared data at {path}, which a plain clone does not have")
    return path
