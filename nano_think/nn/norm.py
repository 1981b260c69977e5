"""Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467, eq. 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), times a learned gain unless `gain=False`. Computed in fp32."""

    def __init__(self, d_model: int, eps: float = 1e-6, gain: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model)) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_model) to the same shape and dtype."""
        normed = torch.nn.functional.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)
        return normed if self.weight is None else normed * self.weight.to(x.dtype)
