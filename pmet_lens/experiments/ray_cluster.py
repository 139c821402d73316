"""The cluster of Ray: connected to, or started here; and whether its head still answers."""

from __future__ import annotations

import importlib
import importlib.util
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pmet_lens.experiments.grid import GridError

ASK_SECONDS = 0.5
"""Between two questions to somebody who does not answer."""
ANSWER_SECONDS = 10.0
"""How long a cluster may take to answer."""


def check_installed() -> None:
    """Raises `GridError` where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise GridError(
            'engine="ray" needs Ray: pip install "pmet-lens[ray]". Without it, engine="serial" '
            "makes the same results, and --shard k/n shares a grid out to a batch queue."
        )


@contextmanager
def cluster(address: str | None = None) -> Iterator[Any]:
    """Ray, connected to the cluster at `address`, or started on this machine (None). One that is
    connected already is taken as it is, and left so.

    Raises:
        GridError: for an address where no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = importlib.import_module("ray")
    if ray.is_initialized():
        yield ray
        return
    if address is not None:
        _check_answers(address)
    try:
        local = {"include_dashboard": False} if address is None else {}
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **local)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise GridError(_no_answer(address, str(error))) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray itself tries for minutes to reach an address where nobody is."""
    host, colon, port = address.rpartition("://")[2].partition(":")
    if not colon:
        return  # "auto", "local": Ray says at once
    try:
        with socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS):
            pass
    except (OSError, ValueError) as error:
        raise GridError(_no_answer(address, str(error))) from error


def _no_answer(address: str | None, why: str) -> str:
    if address is None:
        return f"Ray could not be started on this machine: {why}"
    return (
        f"No Ray cluster answers at {address!r} ({why.strip().splitlines()[0] if why else ''}). "
        "Start one with `ray start --head` on its first machine and name the address it prints; "
        "without address= the workers run on this machine."
    )


def head_of(ray: Any) -> tuple[str, int] | None:
    """Where the head of the cluster answers. None: this process is the client of a far cluster, and
    hears of a lost one by a `ConnectionError`."""
    if ray.util.client.ray.is_connected():
        return None
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    return host.strip("[]"), int(port)


def answers(head: tuple[str, int] | None) -> bool:
    """Whether somebody is there, at one of three calls."""
    for pause in (ASK_SECONDS, ASK_SECONDS, 0.0):
        with suppress(OSError):
            if head is not None:
                socket.create_connection(head, timeout=ANSWER_SECONDS).close()
            return True
        time.sleep(pause)
    return False


def lost(where: str) -> str:
    """What is said of a head that does not answer."""
    return (
        f"The head of the Ray cluster does not answer any more ({where}). Start a cluster again, "
        "and then the same grid on the same folder: what was finished is kept."
    )
