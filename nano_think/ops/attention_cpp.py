"""Causal attention by one compiled kernel, `attention.cpp`; `blocked_attention` is the same as plain products."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nano_think.ops.native import BuildError, address, load, threads

SOURCE = Path(__file__).with_name("attention.cpp")
TILE = 64  # queries and keys that meet at a time; a shorter row has nothing to leave out


class _View(ctypes.Structure):
    """`View` of the source: where a tensor (B, H, L, D) begins and the strides of all axes but the last."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("position", ctypes.c_int64),
    )


class _Shape(ctypes.Structure):
    """`Shape` of the source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "groups", "length", "width", "value_width")),
        ("scale", ctypes.c_float),
        ("first", ctypes.c_void_p),
        ("first_row", ctypes.c_int64),
    )


@cache
def load_library() -> Any:
    """The built library, loaded once a process; None where it cannot be had.

    Silent, because the same is computed without: the selective scan, for which it matters, warns.
    """
    try:
        library = load(SOURCE)
    except BuildError:
        return None
    for function in (library.attention_forward, library.attention_backward):
        function.argtypes = (*[ctypes.c_void_p] * 3, ctypes.c_int, ctypes.c_int)
        function.restype = None
    return library


def fits(*tensors: Tensor) -> bool:
    """Whether the kernel takes these activations: all fp32 or all bf16, on a CPU, outside torch.compile.

    Its products are fp32. A processor with AMX multiplies bf16 at many times that rate: there torch does it.
    """
    dtypes = {t.dtype for t in tensors}
    return (
        not torch.compiler.is_compiling()
        and all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" for t in tensors)
        and (
            dtypes == {torch.float32}
            or (dtypes == {torch.bfloat16} and not torch.cpu._is_amx_tile_supported())
        )
        and load_library() is not None
    )


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None = None) -> Tensor:
    """Causal softmax(q k^T / sqrt(D)) v, (B, H, L, E), of q (B, H, L, D), k (B, G, L, D), v (B, G, L, E).

    first: (B or 1, L) int64, the earliest key each query sees, never falling along a row; 0 without it.
    Everything between the inputs and the result is fp32, also where these are bf16.
    """
    mixed: Tensor = _TiledAttention.apply(q, k, v, first)
    return mixed


class _TiledAttention(torch.autograd.Function):
    """The backward pass computes the probabilities again from `level`, the logarithm of each query's sum."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None) -> Tensor:
        q, k, v = (_dense(x) for x in (q, k, v))
        first = None if first is None else first.contiguous()
        out = _as_projected(q, v.shape[-1])
        level = q.new_empty(q.shape[:3], dtype=torch.float32)
        _library().attention_forward(*_arguments(q, k, v, first, [q, k, v, out], level))
        ctx.save_for_backward(q, k, v, first, out, level)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, first, out, level = ctx.saved_tensors
        gradients = [_as_projected(x, x.shape[-1]) for x in (q, k, v)]
        views = [q, k, v, out, _dense(upstream), *gradients]
        _library().attention_backward(*_arguments(q, k, v, first, views, level))
        return *gradients, None


def _library() -> Any:
    library = load_library()
    assert library is not None  # `fits` said so
    return library


def _dense(x: Tensor) -> Tensor:
    """x with its last axis dense; heads may lie side by side, as a projection leaves them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _as_projected(like: Tensor, width: int) -> Tensor:
    """Room for (B, H, L, width) that lies in memory as (B, L, H, width), as projections read and write it."""
    batch, heads, length, _ = like.shape
    return like.new_empty(batch, length, heads, width).transpose(1, 2)


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, tensors: list[Tensor], level: Tensor
) -> tuple[Any, ...]:
    batch, heads, length, width = q.shape
    shape = _Shape(
        *(batch, heads, k.shape[1], length, width, v.shape[-1]),
        1 / math.sqrt(width),
        address(first),
        length if first is not None and len(first) > 1 else 0,
    )
    views = (_View * len(tensors))(*(_View(address(x), *x.stride()[:3]) for x in tensors))
    return ctypes.byref(shape), views, address(level), q.dtype == torch.bfloat16, threads()
