"""Weight decay towards a reference instead of towards zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from nano_think.ops.processes import divided_like


class AnchoredDecay:
    """p <- p - lr * coefficient * (p - reference) after every optimizer step.

    L2-SP (Li et al., arXiv 1802.01483) in the decoupled form of AdamW: the pull does not pass through
    the gradient's moments. The parameter should have no other weight decay. A step without gradients, one that was
    skipped, does not pull.
    """

    def __init__(self, parameter: Tensor, reference: Tensor, coefficient: float) -> None:
        if parameter.shape != reference.shape:
            raise ValueError(
                f"a reference of shape {tuple(reference.shape)} cannot anchor a parameter of shape "
                f"{tuple(parameter.shape)}"
            )
        if coefficient < 0:
            raise ValueError(f"the anchor coefficient must not be negative, it is {coefficient}")
        self.parameter, self.coefficient = parameter, coefficient
        self.reference = divided_like(reference.detach().clone(), parameter)

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Pull after each step of `optimizer`, at the learning rate of the parameter's own group."""
        self._group(optimizer)
        return optimizer.register_step_post_hook(self._pull)

    def _group(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        # Looked up at every step, because loading a checkpoint replaces the group dictionaries.
        for group in optimizer.param_groups:
            if any(parameter is self.parameter for parameter in group["params"]):
                return group
        raise ValueError("the anchored parameter is not among those of the optimizer")

    @torch.no_grad()
    def _pull(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.parameter.grad is None:
            return
        self.reference = self.reference.to(self.parameter.device)
        rate = float(self._group(optimizer)["lr"]) * self.coefficient
        self.parameter.sub_(self.parameter - self.reference, alpha=rate)
