"""Networks without their numbers: what they are made of is known at once, and takes no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@contextmanager
def outlined() -> Iterator[None]:
    """What is built in here lies on torch's meta device, which keeps shapes and types alone."""
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    """Leaves tensors of the meta device as they are where normal numbers, or a result as `out`, would go to them.

    torch does the same there, but by Python code of its compiler, which takes a second to import: a third of
    the time until `phase=generate` says its first word.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = kwargs.get("out", kwargs.get("tensor", args[0] if args else None))
        fills = "out" in kwargs or getattr(func, "__name__", "") == "normal_"
        if fills and isinstance(target, Tensor) and target.is_meta:
            return target
        return func(*args, **kwargs)
