"""For every test: no network and one thread; which cases are slow; shapes checked where asked.

`PMET_LENS_SHAPES=1` checks the shapes in the package's signatures, which takes more time.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

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

# `make bench` and `make test-browser`, without this file.
collect_ignore = ["benchmarks", "browser"]
if os.environ.get("PMET_LENS_SHAPES") == "1":
    if any(name.split(".")[0] == "pmet_lens" for name in sys.modules):
        raise RuntimeError("pmet_lens was imported before its shape checks; start pytest without.")
    jaxtyping.install_import_hook("pmet_lens", "beartype.beartype")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`@pytest.mark.few("gpt2*")`: cases whose id fits no pattern are slow."""
    for item in items:
        few = item.get_closest_marker("few")
        if few and not any(fnmatchcase(item.callspec.id, pattern) for pattern in few.args):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _files_need_not_outlive_the_machine() -> Iterator[None]:
    """A disk takes milliseconds to promise that a file would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def world_moments(tmp_path_factory) -> Callable[[str], Any]:
    """Of a bundled model's MLPs: computed by the worker that asks first, read by the others."""
    from kept import bundled

    import pmet_lens as pl

    own = tmp_path_factory.getbasetemp()
    folder = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def moments(name: str) -> Any:
        how = {"projections": ("mlp",), "n_tokens": 15_000}
        with warnings.catch_warnings():  # two workers may ask at once, and one of them waits
            warnings.filterwarnings("ignore", "Another process computes")
            return pl.kept_moments(folder / f"{name}.safetensors", bundled(name), pl.texts(), **how)

    return moments


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data beside the repository, which a plain clone does not have."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip(f"needs the shared data at {path}, which a plain clone does not have")
    return path
