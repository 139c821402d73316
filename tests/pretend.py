"""A second device on a machine that has none: tensors that claim to lie elsewhere, with numbers.

Inside `second_device()` everything put on `OTHER` becomes a `Remote`: an ordinary tensor in a
wrapper that reports that device. Operations compute as ever, but one on tensors of both devices is
refused, as an accelerator would refuse it. So what runs here and gives the numbers of one device
moves its tensors where they are needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

# Of the devices without memory the one whose gradients autograd computes on the host.
OTHER = torch.device("lazy")
_AWAY = {"index.Tensor", "index_put.default", "index_put_.default", "_index_put_impl_.default"}


class WrongDevice(RuntimeError):
    """An operation on tensors of two devices."""


class Remote(Tensor):
    """A tensor that says it lies on `OTHER`; its numbers are in `held`."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Remote:
        found = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, layout=held.layout, device=OTHER,
        )  # fmt: skip
        found.held = held
        return found

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Remote({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Elsewhere(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Written(TorchFunctionMode):
    """`torch.tensor` builds from Python numbers before anything is dispatched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu") == OTHER:
            return Remote(torch.tensor(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.__name__
    flat = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    remote = [t for t in flat if isinstance(t, Remote)]
    asked = kwargs.get("device")
    moves = asked is not None or name.startswith("copy_")
    if name in _AWAY:  # indices may lie on the host
        remote = [args[0]] if isinstance(args[0], Remote) else remote
        flat = [args[0], *args[2:3]] if isinstance(args[0], Remote) else flat
    local = [t for t in flat if not isinstance(t, Remote) and t.ndim > 0 and t.numel()]
    if remote and local and not moves:
        raise WrongDevice(f"{name} of tensors on two devices")
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain = tree_map_only(Remote, lambda t: t.held, (args, kwargs))
    out = func(*plain[0], **plain[1])
    if name.endswith("_.default") or name.startswith("copy_"):
        return args[0]
    away = bool(remote) if asked is None else torch.device(asked) == OTHER
    return tree_map_only(Tensor, Remote, out) if away else out


@contextmanager
def second_device() -> Iterator[torch.device]:
    """A block in which `OTHER` is a device like any other."""
    with _Elsewhere(), _Written():
        yield OTHER


def move(module: nn.Module, name: str = "") -> None:
    """Put a module's parameters and buffers on `OTHER`."""
    for own in module.modules():
        for kind in (own._parameters, own._buffers):
            for key, value in kind.items():
                if isinstance(value, nn.Parameter):
                    kind[key] = nn.Parameter(Remote(value.detach()), value.requires_grad)
                elif value is not None:
                    kind[key] = Remote(value)
