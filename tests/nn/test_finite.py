"""A fault planted in one module of a network is found there, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nano_think.nn.finite import first_nonfinite


class BadBackward(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * float("nan")


class Faulty(nn.Linear):
    """A linear layer with a fault before (`input`) or after (`output`) its product, in one of the two passes."""

    def __init__(self, fault: str) -> None:
        super().__init__(4, 4)
        self.fault = fault

    def forward(self, x: Tensor) -> Tensor:
        x = BadBackward.apply(x) if self.fault == "backward of input" else x
        y = super().forward(x)
        return y / 0 if self.fault == "forward" else y


class Residual(nn.Module):
    """x + linear(norm(x)), so that a gradient has a second way around every part."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(4), inner

    def forward(self, x: Tensor) -> Tensor:
        return (
            x + self.inner(x=self.norm(x)) if isinstance(self.inner, Faulty) else x + self.inner(self.norm(x))
        )


def network(fault: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Residual(nn.Linear(4, 4)), Residual(Faulty(fault)), Residual(nn.Linear(4, 4)))


def looked_at(net: nn.Module) -> str | None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    found = first_nonfinite(net, lambda: net(x).square().sum())
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    return found


@pytest.mark.parametrize(("fault", "found"), [
    ("none", None),
    ("forward", "the output of 1.inner"),
    ("backward of input", "the gradient that 1.inner hands back"),
])  # fmt: skip
def test_a_fault_is_found_in_its_module(fault: str, found: str | None) -> None:
    assert looked_at(network(fault)) == found


def test_a_bad_weight_is_named_before_all_that_follows_from_it() -> None:
    net = network("none")
    with torch.no_grad():
        net[1].inner.weight[0, 0] = float("inf")
    assert looked_at(net) == "the parameter 1.inner.weight"


def test_a_parameter_that_no_module_reads_is_named_by_its_gradient() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    net.scale = nn.Parameter(torch.zeros(()))
    # the derivative of the square root at 0 is infinite
    found = first_nonfinite(net, lambda: net(torch.ones(2, 4)).sum() + net.scale.sqrt())
    assert found == "the gradient of scale"


def test_a_loss_that_overflows_by_itself() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    assert (
        first_nonfinite(net, lambda: (net(torch.ones(2, 4)).sum() * 1e38) * 1e38)
        == "the loss, made of finite outputs"
    )


def test_a_bad_buffer_is_named_where_no_module_shows_it() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    net.register_buffer("scale", torch.tensor(float("nan")))
    assert first_nonfinite(net, lambda: net(torch.ones(2, 4)).sum() * net.scale) == "the buffer scale"
