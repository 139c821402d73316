"""`engine="ray"`: workers as Ray actors, on this machine or on a cluster; the caller is the driver.

Every actor is a `worker.Worker`. It reads its model once, and talks to the driver in names of
shards: weights, moments and targets never travel with a task.
"""

from __future__ import annotations

import importlib.util

from pmet_lens.grid import GridError


def check_installed() -> None:
    """Raises `GridError` where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise GridError(
            'engine="ray" needs Ray: pip install "pmet-lens[ray]". Without it, engine="serial" '
            "makes the same results, and --shard k/n shares a grid out to a batch queue."
        )
