"""Rotary position embedding (Su et al., arXiv 2104.09864, eq. 34) in both coordinate layouts."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nano_think.ops.elementwise import kernels_with_gaps
from nano_think.ops.unrecorded import apply

RopeLayout = Literal["half", "interleaved"]


def rope_angles(positions: Tensor, dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines (..., dim / 2) of `positions` (...), always in fp32.

    Angles reach thousands of radians, where bf16 would round them to whole turns.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    angles = positions.float().unsqueeze(-1) * theta**-exponents
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, layout: RopeLayout = "half") -> Tensor:
    """Rotate the pairs of the last dimension of `x` (..., dim) by the angles of `rope_angles`.

    `half` pairs coordinate i with i + dim/2, `interleaved` pairs 2i with 2i + 1. The two differ by a fixed
    permutation of coordinates: a wrong choice passes every shape test and fails only with copied weights.
    Computed in fp32, returned in the dtype of `x`; no gradient flows to the angles.
    """
    if layout not in ("half", "interleaved"):
        raise ValueError(f"rope layout must be 'half' or 'interleaved', not {layout!r}")
    rotated: Tensor = apply(_Rotation, x, cos, sin, layout)
    return rotated


def apply_rope_reference(x: Tensor, cos: Tensor, sin: Tensor, layout: RopeLayout = "half") -> Tensor:
    """The same from the formula, differentiated by autograd."""
    first, second = _pairs(x.float(), layout)
    turned = first * cos - second * sin, second * cos + first * sin
    both = torch.cat(turned, dim=-1) if layout == "half" else torch.stack(turned, dim=-1).flatten(-2)
    return both.to(x.dtype)


class _Rotation(torch.autograd.Function):
    """Its transpose is the rotation by the opposite angles, so the backward pass needs no activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, layout: RopeLayout) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.layout = layout
        return _rotate(x, cos, sin, layout, sign=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(upstream, cos, sin, ctx.layout, sign=-1), None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: RopeLayout, sign: int) -> Tensor:
    dense = x.ndim == 4 and x.stride(-1) == 1 and _one_a_position(cos, x)
    kernels = kernels_with_gaps(x) if dense else None
    if kernels is not None:
        return kernels.rotate(x, cos.contiguous(), sin.contiguous(), layout == "interleaved", sign)
    out = x.new_empty(x.shape)  # contiguous, also where x is a transposed view
    first, second = _pairs(x, layout)
    for half, a, b, way in zip(
        _pairs(out, layout), (first, second), (second, first), (-sign, sign), strict=True
    ):
        half.copy_((a * cos).addcmul_(b, sin, value=way))
    return out


def _one_a_position(cos: Tensor, x: Tensor) -> bool:
    """Whether angles are as `Layout.angles` makes them: (B or 1, 1, L, dim / 2), fp32, for x (B, H, L, dim)."""
    (batch, _, length, dim), shape = x.shape, tuple(cos.shape)
    return shape in ((batch, 1, length, dim // 2), (1, 1, length, dim // 2)) and cos.dtype == torch.float32


def _pairs(x: Tensor, layout: RopeLayout) -> tuple[Tensor, Tensor]:
    """Views of the first and of the second coordinates of all pairs."""
    if layout == "half":
        first, second = x.chunk(2, dim=-1)
        return first, second
    return x[..., 0::2], x[..., 1::2]
