"""The compiled causal convolution, `causal_conv.cpp`."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nano_think.ops.native import BuildError, address, load, rows, threads

SOURCE = Path(__file__).with_name("causal_conv.cpp")

_POINTER = ctypes.c_void_p
_SHAPE = (*[ctypes.c_int64] * 5, *[ctypes.c_int] * 3)  # sizes and step; SiLU, half precision, threads


@cache
def load_library() -> ctypes.CDLL | None:
    """The built library, loaded once a process; None where it cannot be had.

    Silent, because the selective scan asks for the same compiler and warns.
    """
    try:
        library = load(SOURCE)
    except BuildError:
        return None
    library.conv_forward.argtypes = [*[_POINTER] * 5, *_SHAPE]
    library.conv_backward.argtypes = [*[_POINTER] * 8, *_SHAPE]
    library.conv_forward.restype = library.conv_backward.restype = None
    return library


def fits(x: Tensor, weight: Tensor) -> bool:
    """True where the compiled convolution can run: fp32 or bf16 sequences on the CPU and fp32 weights."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and weight.dtype == torch.float32
        and load_library() is not None
    )


class CppConv(torch.autograd.Function):
    """x (B, L, d), weight (d, K), bias (d,) or None, segments (B or 1, L) or None, SiLU? to (B, L, d) as x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, segments: Tensor | None, silu: bool
    ) -> Tensor:
        x = rows(x)
        if segments is not None:
            segments = segments.expand(x.shape[:2]).to(torch.int64).contiguous()
        taps = weight.t().flip(0).contiguous()  # the current position first
        offset = weight.new_zeros(len(weight)) if bias is None else bias.float().contiguous()
        y = x.new_empty(x.shape)
        _library().conv_forward(*_addresses(x, taps, offset, segments, y), *_shape(x, taps, silu))
        ctx.save_for_backward(x, taps, offset, segments)
        ctx.silu, ctx.bias_dtype = silu, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, taps, offset, segments = ctx.saved_tensors
        dy, dx = dy.contiguous(), x.new_empty(x.shape)
        dtaps, doffset = taps.new_empty(len(x), *taps.shape), taps.new_empty(len(x), x.shape[2])
        addresses = _addresses(x, taps, offset, segments, dy, dx, dtaps, doffset)
        _library().conv_backward(*addresses, *_shape(x, taps, ctx.silu))
        dbias = None if ctx.bias_dtype is None else doffset.sum(0).to(ctx.bias_dtype)
        return dx, dtaps.sum(0).flip(0).t(), dbias, None, None


def _library() -> Any:
    library = load_library()
    assert library is not None  # `fits` said so
    return library


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    return [address(tensor) for tensor in tensors]


def _shape(x: Tensor, taps: Tensor, silu: bool) -> tuple[int, ...]:
    return *x.shape, len(taps), x.stride(1), silu, x.dtype == torch.bfloat16, threads()
