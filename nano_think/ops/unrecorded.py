"""Custom operators without their cost where no gradient is recorded."""

from __future__ import annotations

from typing import Any

import torch


class _Context:
    """Takes what a forward pass would keep, and keeps nothing."""

    def save_for_backward(self, *tensors: Any) -> None:
        pass


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply`, or its forward pass alone while gradients are off: the same values.

    Around a single position the machinery of an autograd.Function takes longer than a norm or a rotation itself.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function.apply(*arguments)
    return function.forward(_Context(), *arguments)
