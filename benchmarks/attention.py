"""Attention at the shapes of a training step, forward and backward: ours against torch's kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, Group, Options, close
from benchmarks.harness.case import Peak
from nano_think.ops import attention_cpp
from nano_think.ops.attention import attention, attention_reference

SHAPE, QUICK_SHAPE = (8, 6, 512, 64), (1, 2, 16, 8)
TOLERANCES: dict[torch.dtype, float] = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
DTYPES: dict[Peak, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def group(options: Options) -> Group:
    """Causal attention over whole rows, both precisions."""
    shape = QUICK_SHAPE if options.quick else SHAPE
    attends: dict[str, Attend] = {
        "nano_think": lambda q, k, v: attention(q, k, v, causal=True),
        "torch": partial(F.scaled_dot_product_attention, is_causal=True),
    }
    cases = [_case(name, attend, shape, held) for held in DTYPES for name, attend in attends.items()]
    notes = (
        "FLOPs: the visible half of the scores, backward twice the forward.",
        "Our kernel multiplies bf16 as fp32: its share is of that peak.",
    )
    return Group(f"causal attention, B, H, L, D = {shape}, fwd + bwd", cases, notes=notes)


def _case(name: str, attend: Attend, shape: tuple[int, ...], held: Peak) -> Case:
    batch, heads, length, head_dim = shape
    wide = name == "nano_think" and attention_cpp.fits(torch.empty(0, dtype=DTYPES[held]))
    return Case(
        f"{name} {held}",
        setup=partial(forward_backward, attend, shape, DTYPES[held]),
        tokens=batch * length,
        flops=6.0 * batch * heads * length**2 * head_dim,
        peak="fp32" if wide else held,
        peers=(f"torch {held}",) if name == "nano_think" else (),
        check=partial(same_attention, attend, shape, DTYPES[held]),
    )


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output, (B, H, L, D) each."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(4)]


def forward_backward(attend: Attend, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[], object]:
    """One attention and the gradients of q, k and v."""
    *inputs, upstream = draw(shape, dtype)
    return lambda: torch.autograd.grad(attend(*inputs), inputs, upstream.detach())


def same_attention(attend: Attend, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Output and gradients equal the formula in fp32: to 1e-4 in fp32, to 5e-2 of the largest value in bf16."""
    shape = (1, *shape[1:])
    *inputs, upstream = draw(shape, dtype)
    plain = [tensor.detach().float().requires_grad_() for tensor in inputs]
    q, k, v = plain
    got, want = attend(*inputs), attention_reference(q, k, v, causal=True)
    close("the output", got, want, TOLERANCES[dtype])
    got_grads = torch.autograd.grad(got, inputs, upstream.detach())
    want_grads = torch.autograd.grad(want, plain, upstream.detach().float())
    for name, ours, theirs in zip("qkv", got_grads, want_grads, strict=True):
        close(f"the gradient of {name}", ours, theirs, TOLERANCES[dtype])
