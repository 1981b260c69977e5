"""Which compiled kernels take some activations between matrix products: those for CPUs, for GPUs, or none."""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nano_think.ops import elementwise_cpp

TOLERANCE = 1e-4  # of the largest value, in fp32


def kernels_for(*tensors: Tensor) -> Any:
    """The module whose functions may be called on these tensors, `elementwise_cpp` or `elementwise_triton`.

    They take fp32 and bf16, contiguous, on one device, outside torch.compile. None: callers use torch's operators.
    """
    if torch.compiler.is_compiling():  # which makes such kernels itself
        return None
    if elementwise_cpp.fits(*tensors):
        return elementwise_cpp
    if all(t.is_contiguous() for t in tensors):
        return gpu_kernels(*tensors)
    return None


def kernels_with_gaps(x: Tensor) -> Any:
    """The same for a tensor that may have gaps, for what reads it by its strides."""
    return elementwise_cpp if elementwise_cpp.fits_with_gaps(x) else gpu_kernels(x)


def gpu_kernels(*tensors: Tensor) -> Any:
    """`elementwise_triton` for tensors on a GPU, with gaps or without."""
    if torch.compiler.is_compiling():
        return None
    if not all(type(t) in (Tensor, torch.nn.Parameter) and t.is_cuda for t in tensors):
        return None
    known = all(t.dtype in (torch.float32, torch.bfloat16) for t in tensors)
    return _checked_on(tensors[0].device) if known else None


@cache
def _checked_on(device: torch.device) -> Any:
    """`elementwise_triton` where it is right on this device; the first call compiles it, and warns where not."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        from nano_think.ops import elementwise_triton

        check(elementwise_triton, device)
    except Exception as error:
        warnings.warn(f"norms, rotations and losses are computed by slower means: {error}", stacklevel=2)
        return None
    return elementwise_triton


@torch.no_grad()
def check(kernels: Any, device: torch.device) -> None:
    """Raise RuntimeError unless kernels for GPUs give what their formulas say of a few numbers."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    with torch.autocast(device.type, enabled=False):
        for name, got, want in _results(kernels, draw):
            error = float((got - want).abs().max() / want.abs().max())
            if not error <= TOLERANCE:
                raise RuntimeError(f"{name} is off by {error:.1e} of the largest value")


def _results(kernels: Any, draw: Any) -> list[tuple[str, Tensor, Tensor]]:
    """Name, result and the same from a formula, in fp64 where sums are long."""
    x, weight, upstream, z = draw(37, 50), draw(50), draw(37, 50), draw(5, 9000)
    out, inverse = kernels.rms_norm(x, weight, 1e-6, torch.float32)
    root = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    dx, d_weight = kernels.rms_norm_gradients(x, weight, inverse, upstream)
    h, g = x * root, upstream * weight
    opened = x.sigmoid()
    d_gate, d_up = kernels.gated_silu_gradients(x, upstream, h)
    labels = torch.tensor([0, 8999, -100, 17, 4096], device=x.device)
    p = z.double().softmax(-1)
    hit, labelled = labels.clamp_min(0).unsqueeze(1), (labels >= 0).double().unsqueeze(1)
    nll = -p.gather(1, hit).log() * labelled
    d_logits = p.scatter_add(1, hit, -labelled) * labelled
    losses = kernels.softmax_minus_one_hot(z, labels)
    turned, cos, sin = upstream[:36].view(2, 6, 3, 50).transpose(1, 2), draw(1, 1, 6, 25), draw(1, 1, 6, 25)
    first, second = turned.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return [
        ("a norm", out, h * weight),
        ("a norm's gradient", dx, root * (g - h * (g * h).mean(-1, keepdim=True))),
        ("a gain's gradient", d_weight, (upstream * h).sum(0)),
        ("SwiGLU", kernels.gated_silu(x, upstream), x * opened * upstream),
        ("SwiGLU's gate", d_gate, h * upstream * opened * (1 + x * (1 - opened))),
        ("SwiGLU's input", d_up, h * x * opened),
        ("a loss", losses, nll.squeeze(1)),
        ("a loss's gradient", z, d_logits),
        ("a rotation", kernels.rotate(turned, cos, sin, False, 1), rotated),
    ]
