"""Muon for hidden matrices and AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from nano_think.optim.groups import parameter_groups


class MuonWithAdamW(torch.optim.Optimizer):
    """One optimizer over two sets of groups: Muon (Jordan et al., 2024) for the first, AdamW for the second.

    Muon's step is scaled to the RMS of AdamW's (Liu et al., arXiv 2502.16982, eq. 4), so both share one
    learning rate and weight decay. It is one object because a training loop counts optimizer steps, and a
    second optimizer would count every batch twice.

    matrices, others: parameter groups with their own lr and weight_decay. Every parameter of `matrices` is
    2-D, or torch.optim.Muon raises a ValueError.
    """

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: list[dict[str, Any]],
        betas: tuple[float, float] = (0.9, 0.95),
        fused: bool = True,
    ) -> None:
        self.num_matrix_groups = len(matrices)
        self._parts: list[torch.optim.Optimizer] = []
        super().__init__([*matrices, *others], defaults={})
        if matrices:
            muon_groups = self.param_groups[: len(matrices)]
            self._parts.append(torch.optim.Muon(muon_groups, adjust_lr_fn="match_rms_adamw"))
        if others:
            adamw_groups = self.param_groups[len(matrices) :]
            self._parts.append(torch.optim.AdamW(adamw_groups, betas=(betas[0], betas[1]), fused=fused))
        self._share()

    def _share(self) -> None:
        """Let the parts work on this optimizer's own groups and state: schedulers and checkpoints see one."""
        matrices = self.param_groups[: self.num_matrix_groups]
        others = self.param_groups[self.num_matrix_groups :]
        for part, groups in zip(self._parts, filter(None, (matrices, others)), strict=True):
            part.param_groups, part.state = groups, self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both parts; the closure is evaluated once, before either."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore groups and state written by `state_dict`."""
        super().load_state_dict(state_dict)
        self._share()


def muon(
    module: nn.Module,
    lr: float,
    weight_decay: float,
    lr_scale: Mapping[str, float] | None = None,
    betas: tuple[float, float] = (0.9, 0.95),
    fused: bool = True,
) -> MuonWithAdamW:
    """Muon over the hidden matrices of `module`, AdamW over its other trainable parameters.

    A module without trainable hidden matrix (a router alone) gets AdamW alone inside the same object.
    """
    matrices = parameter_groups(module, lr, weight_decay, lr_scale, hidden_matrices=True)
    for group in matrices:
        # the other parameters have groups of the same names, and a log of learning rates needs to tell them apart
        group["name"] = f"{group['name']}/muon"
    others = parameter_groups(module, lr, weight_decay, lr_scale, hidden_matrices=False)
    if not matrices and not others:
        raise ValueError("the module has no trainable parameter: unfreeze a part before making an optimizer")
    return MuonWithAdamW(matrices, others, betas, fused)
