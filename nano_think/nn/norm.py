"""Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467, eq. 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nano_think.ops.elementwise import kernels_for
from nano_think.ops.unrecorded import apply


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), times a learned gain unless `gain=False`. Computed in fp32 (fp64 in fp64)."""

    def __init__(self, d_model: int, eps: float = 1e-6, gain: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model)) if gain else None

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(..., d_model) to the same shape, in `dtype` or that of x: one rounding, at the end."""
        normed: Tensor = apply(_RMSNorm, x, self.weight, self.eps, dtype or x.dtype)
        return normed


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The same from the formula, differentiated by autograd."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return (normed if weight is None else normed * weight).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """With h = r x and r = 1 / sqrt(mean(x^2) + eps): dx = r (g - h mean(g h)) for the gradient g of h."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
        kernels = _kernels(x, weight, dtype)
        if kernels is not None:
            out, inverse = kernels.rms_norm(x, weight, eps, dtype)
            ctx.save_for_backward(x, weight, inverse)
            return out
        wide = _wide(x)
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        normed = wide * inverse
        return (normed if weight is None else normed.mul_(weight)).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        kernels = _kernels(x, weight, upstream.dtype, upstream)
        if kernels is not None:
            dx, d_weight = kernels.rms_norm_gradients(x, weight, inverse, upstream)
            return dx, d_weight, None, None
        normed, upstream, d_weight = _wide(x) * inverse, _wide(upstream), None
        product = normed * upstream
        if weight is None:
            mean, d_normed = product.mean(dim=-1, keepdim=True), upstream
        else:
            if ctx.needs_input_grad[1]:
                d_weight = product.flatten(0, -2).sum(dim=0).to(weight.dtype)
            mean = (product @ weight.to(product.dtype)).unsqueeze(-1).div_(x.shape[-1])
            d_normed = upstream * weight
        dx = torch.addcmul(d_normed, normed, mean, value=-1).mul_(inverse)
        return dx.to(x.dtype), d_weight, None, None


def _kernels(x: Tensor, weight: Tensor | None, dtype: torch.dtype, *more: Tensor) -> Any:
    """Compiled ones for these activations and a weight in fp32, None where there are none."""
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    if weight is not None and (weight.dtype != torch.float32 or weight.shape != x.shape[-1:]):
        return None
    return kernels_for(x, *more) if weight is None else kernels_for(x, weight, *more)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
