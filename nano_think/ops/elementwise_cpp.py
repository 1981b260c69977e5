"""The compiled kernels between matrix products, `elementwise.cpp`; callers keep the same in torch as reference."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nano_think.ops.native import BuildError, address, load, threads

SOURCE = Path(__file__).with_name("elementwise.cpp")

_P, _N, _F, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_ARGUMENTS = {
    "head_losses": (_P, _P, _P, _N, _N, _I, _I),
    "attention_forward": (_P, _P, _N, _N, _N, _N, _F, _I, _I),
    "attention_backward": (_P, _P, _N, _N, _F, _I, _I),
    "swiglu_forward": (_P, _P, _P, _N, _I, _I),
    "swiglu_backward": (_P, _P, _P, _P, _P, _N, _I, _I),
    "norm_forward": (_P, _P, _P, _P, _N, _N, _F, _I, _I, _I),
    "norm_backward": (_P, _P, _P, _P, _P, _P, _N, _N, _I, _I, _I),
    "rotate": (_P, _P, _P, _P, _P, _F, _I, _I, _I),
}


class _Rotated(ctypes.Structure):
    _fields_ = [(name, _N) for name in ("batch", "heads", "length", "half")]
    _fields_ += [("steps", 3 * _N), ("angles_of_row", _N)]


@cache
def load_library() -> Any:
    """The built library, loaded once a process; None where it cannot be had.

    Silent, because everything here runs without: the selective scan, for which it matters, warns.
    """
    try:
        library = load(SOURCE)
    except BuildError:
        return None
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    library.norm_parts.restype = _N
    return library


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels take these activations: fp32 or bf16, contiguous, on a CPU, outside torch.compile."""
    return all(t.is_contiguous() for t in tensors) and fits_with_gaps(*tensors)


def fits_with_gaps(*tensors: Tensor) -> bool:
    """The same for a kernel that reads them by their strides."""
    return (
        not torch.compiler.is_compiling()
        and all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" for t in tensors)
        and all(t.dtype in (torch.float32, torch.bfloat16) for t in tensors)
        and load_library() is not None
    )


def softmax_minus_one_hot(z: Tensor, labels: Tensor) -> Tensor:
    """Turn logits z (n, V) into softmax - one-hot of `labels` (n,) in place; their losses (n,), fp32."""
    losses = z.new_empty(len(z), dtype=torch.float32)
    load_library().head_losses(address(z), address(labels), address(losses), *z.shape, _half(z), threads())
    return losses


def softmax_of_scores(scores: Tensor, bias: Tensor, scale: float) -> Tensor:
    """softmax(scale scores + bias) of scores (..., rows, keys) in place.

    bias: (queries, columns), `queries` dividing rows: it is added to the last columns of every so many rows.
    """
    rows, keys = scores.numel() // scores.shape[-1], scores.shape[-1]
    load_library().attention_forward(
        address(scores), address(bias), rows, keys, *bias.shape, scale, _half(scores), threads()
    )
    return scores


def scores_gradient(p: Tensor, dp: Tensor, scale: float) -> Tensor:
    """scale p (dp - sum(p dp)), the gradient of the scores behind `softmax_of_scores`, in place of dp."""
    rows, keys = p.numel() // p.shape[-1], p.shape[-1]
    load_library().attention_backward(address(p), address(dp), rows, keys, scale, _half(p), threads())
    return dp


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up."""
    out = torch.empty_like(gate)
    load_library().swiglu_forward(
        address(gate), address(up), address(out), gate.numel(), _half(gate), threads()
    )
    return out


def gated_silu_gradients(gate: Tensor, up: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    load_library().swiglu_backward(
        *(address(tensor) for tensor in (gate, up, upstream, d_gate, d_up)),
        gate.numel(),
        _half(gate),
        threads(),
    )
    return d_gate, d_up


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight in `dtype`, and the inverse root (..., 1) in fp32; weight fp32."""
    out, inverse = torch.empty_like(x, dtype=dtype), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    load_library().norm_forward(
        *(address(tensor) for tensor in (x, weight, out, inverse)),
        inverse.numel(),
        x.shape[-1],
        eps,
        _half(x),
        _half(out),
        threads(),
    )
    return out, inverse


def rms_norm_gradients(
    x: Tensor, weight: Tensor | None, inverse: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and of weight."""
    library, dx = load_library(), torch.empty_like(x)
    d_weight = None if weight is None else weight.new_empty(library.norm_parts(), len(weight))
    library.norm_backward(
        *(address(tensor) for tensor in (x, weight, inverse, upstream, dx, d_weight)),
        inverse.numel(),
        x.shape[-1],
        _half(x),
        _half(upstream),
        threads(),
    )
    return dx, None if d_weight is None else d_weight.sum(dim=0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, sign: int) -> Tensor:
    """x (B, H, L, D) turned by `sign` times the angles of cos and sin (B or 1, 1, L, D / 2); contiguous.

    x may be a view whose last dimension is contiguous; cos and sin are contiguous.
    """
    out = x.new_empty(x.shape)
    batch, heads, length, width = x.shape
    own = 0 if len(cos) == 1 else length * width // 2
    shape = _Rotated(batch, heads, length, width // 2, (_N * 3)(*x.stride()[:3]), own)
    load_library().rotate(
        *(address(tensor) for tensor in (x, cos, sin, out)),
        ctypes.byref(shape),
        float(sign),
        interleaved,
        _half(x),
        threads(),
    )
    return out


def _half(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16
