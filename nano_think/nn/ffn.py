"""Position-wise feed-forward networks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nano_think.ops.elementwise import kernels_for
from nano_think.ops.unrecorded import apply


class SwiGLU(nn.Module):
    """W_down (SiLU(W_gate x) * W_up x), three matrices without bias (Shazeer, arXiv 2002.05202, eq. 6)."""

    def __init__(self, d_model: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, ffn_dim, bias=False)
        self.up_proj = nn.Linear(d_model, ffn_dim, bias=False)
        self.down_proj = nn.Linear(ffn_dim, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_model) to the same shape."""
        return self.down_proj(gated_silu(self.gate_proj(x), self.up_proj(x)))


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up of equal shapes; SiLU(gate) is computed again in the backward pass, not kept."""
    gated: Tensor = apply(_GatedSiLU, gate, up)
    return gated


def gated_silu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The same from the formula, differentiated by autograd."""
    return F.silu(gate) * up


class _GatedSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        same = gate.dtype == up.dtype and gate.shape == up.shape
        kernels = kernels_for(gate, up) if same else None
        if kernels is not None:
            return kernels.gated_silu(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        same = gate.dtype == up.dtype == upstream.dtype and gate.shape == up.shape
        kernels = kernels_for(gate, up, upstream) if same else None
        if kernels is not None:
            return kernels.gated_silu_gradients(gate, up, upstream)
        d_gate = torch.ops.aten.silu_backward(upstream * up, gate)
        return d_gate, F.silu(gate).mul_(upstream)
