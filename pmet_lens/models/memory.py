"""What to do when a batch does not fit into memory (half of it, twice), what memory is free, and
reading what stays without a search for garbage."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_FULL = ("out of memory", "can't allocate memory", "not enough memory")


class OutOfMemory(ValueError):
    """Not even a single item fits; the message says what to do."""


def halving(
    items: Sequence[Item], run: Callable[[Sequence[Item]], Result], what: str
) -> list[Result]:
    """`[run(items)]`, or the results of the halves, in order, where that ran out of memory; it
    warns when it does. `run` must not have changed anything when it fails. `what`: the items, in
    words.

    Raises:
        OutOfMemory: where one item alone does not fit.
    """
    try:
        return [run(items)]
    except RuntimeError as error:
        full = any(words in str(error).lower() for words in _FULL)
        if not (full or isinstance(error, torch.OutOfMemoryError)):
            raise
        if len(items) == 1:
            raise OutOfMemory(
                f"One of the {what} alone does not fit into memory. Load the model in a smaller "
                "dtype (bfloat16), shorten the prompts, or use a device with more memory."
            ) from error
    # Outside the except block: the error holds the frames, and they hold the tensors.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(items) // 2
    warnings.warn(
        f"{len(items)} {what} at once do not fit into memory; going on with {half}.", stacklevel=2
    )
    return halving(items[:half], run, what) + halving(items[half:], run, what)


def free(device: torch.device) -> int | None:
    """Free bytes of an accelerator; None where nobody can tell, and for a CPU."""
    ask = getattr(getattr(torch, device.type, None), "mem_get_info", None)
    return None if ask is None else int(ask(device)[0])


@contextmanager
def uncollected() -> Iterator[None]:
    """A block, or with `@` a function, in which Python does not look for garbage. What reads a
    model makes hundreds of thousands of objects that all stay; each search among them holds up
    every thread, and a notebook's answers with them."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
