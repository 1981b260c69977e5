"""Rotary position embedding (Su et al., arXiv 2104.09864, eq. 34) in both coordinate layouts."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

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
    """
    if layout == "half":
        first, second = x.float().chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    elif layout == "interleaved":
        first, second = x.float()[..., 0::2], x.float()[..., 1::2]
        rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    else:
        raise ValueError(f"rope layout must be 'half' or 'interleaved', not {layout!r}")
    return rotated.to(x.dtype)
