"""Custom operators give the same values with and without the machinery around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nano_think.nn.ffn import gated_silu
from nano_think.nn.norm import RMSNorm
from nano_think.ops.rope import apply_rope, rope_angles
from nano_think.ops.unrecorded import apply


def norm(x: Tensor) -> Tensor:
    module = RMSNorm(x.shape[-1])
    with torch.no_grad():
        module.get_parameter("weight").copy_(torch.linspace(-2, 2, x.shape[-1]))
    return module(x)


OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "norm": norm,
    "norm to bf16": lambda x: RMSNorm(x.shape[-1], gain=False)(x, torch.bfloat16),
    "rotation": lambda x: apply_rope(x, *rope_angles(torch.arange(x.shape[-2]), x.shape[-1])),
    "other rotation": lambda x: apply_rope(
        x, *rope_angles(torch.arange(x.shape[-2]), x.shape[-1]), "interleaved"
    ),
    "gated": lambda x: gated_silu(x, x.flip(-1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_same_bits(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    recorded = OPERATORS[name](x.requires_grad_())
    assert recorded.grad_fn is not None
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            assert torch.equal(OPERATORS[name](x), recorded)


def test_apply_is_left_out_only_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            ctx.factor = 2
            return 2 * x

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> Tensor:
            calls.append(ctx.factor)
            return 2 * upstream

    x = torch.ones(3, requires_grad=True)
    apply(Twice, x).sum().backward()
    assert calls == [2]
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    with torch.no_grad():
        assert torch.equal(apply(Twice, x), 2 * x)
