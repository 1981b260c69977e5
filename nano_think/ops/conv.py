"""Causal depthwise convolution over positions that never looks into another document."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nano_think.ops.conv_cpp import CppConv, fits


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    segments: Tensor | None = None,
    window: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """out[t] = bias + sum_j weight[:, K - 1 - j] x[t - j], each channel by itself; (B, L, d), dtype of x.

    x: (B, L, d); weight: (d, K), last column for the current position (torch's conv1d order); bias: (d,).
    segments: (B or 1, L), the document of every position; taps that lie in another one count as zero. None: one
    document a row.
    window: (B, d, K - 1), the inputs before the first position, of the same document; None: zeros.
    silu: silu(out) instead, rounded once.

    Compiled for sequences in fp32 or bf16 with fp32 weights on the CPU, `plain_conv` otherwise and for single
    positions.
    """
    if x.shape[1] > 1 and fits(x, weight):
        if window is None:
            return CppConv.apply(x, weight, bias, segments, silu)
        if segments is None:
            taps = weight.shape[1]
            return CppConv.apply(extend_window(x, window, taps), weight, bias, None, silu)[:, taps - 1 :]
    return plain_conv(x, weight, bias, segments, window, silu)


def plain_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    segments: Tensor | None = None,
    window: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """`causal_conv` in plain tensor operations, on any device and in any dtype."""
    history = extend_window(x, window, weight.shape[1]).to(weight.dtype)
    out = _CausalConv.apply(history, weight, segments)
    out = out if bias is None else out + bias
    return (F.silu(out) if silu else out).to(x.dtype)


def extend_window(x: Tensor, window: Tensor | None, taps: int) -> Tensor:
    """The inputs (B, K - 1 + L, d) that L outputs depend on: `window` (B, d, K - 1) or zeros, then x."""
    if window is None:
        return F.pad(x, (0, 0, taps - 1, 0))
    return torch.cat((window.transpose(1, 2).to(x.dtype), x), dim=1)


class _CausalConv(torch.autograd.Function):
    """history (B, K - 1 + L, d) to (B, L, d). Autograd would keep a masked copy of the input for every tap."""

    @staticmethod
    def forward(ctx: Any, history: Tensor, weight: Tensor, segments: Tensor | None) -> Tensor:
        ctx.save_for_backward(history, weight, segments)
        taps = weight.shape[1]
        out = history[:, taps - 1 :] * weight[:, -1]
        for j in range(1, taps):
            out.addcmul_(_masked(_tap(history, j, taps), segments, j), weight[:, taps - 1 - j])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        history, weight, segments = ctx.saved_tensors
        taps = weight.shape[1]
        grad_history, grad_weight = torch.zeros_like(history), torch.empty_like(weight)
        for j in range(taps):
            reached = _masked(grad, segments, j)
            _tap(grad_history, j, taps).addcmul_(reached, weight[:, taps - 1 - j])
            grad_weight[:, taps - 1 - j] = (reached * _tap(history, j, taps)).sum((0, 1))
        return grad_history, grad_weight, None


def _tap(history: Tensor, j: int, taps: int) -> Tensor:
    """What lies j positions before every output, (B, L, d)."""
    return history[:, taps - 1 - j : history.shape[1] - j]


def _masked(values: Tensor, segments: Tensor | None, j: int) -> Tensor:
    """`values` (B, L, d), zero at outputs whose tap j positions back lies in another document."""
    if segments is None or j == 0:
        return values
    # In front of the row lies what belongs to its first document.
    earlier = torch.cat((segments[:, :1].expand(-1, j), segments), dim=1)[:, : segments.shape[1]]
    return values * (earlier == segments).unsqueeze(-1).to(values.dtype)
