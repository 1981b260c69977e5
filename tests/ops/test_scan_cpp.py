from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nano_think.ops import scan_cpp
from nano_think.ops.native import BuildError
from nano_think.ops.scan_cpp import CppScan
from nano_think.ops.scan_kernel import ScanInputs

try:
    CppScan()
except BuildError as error:
    pytest.skip(f"compiled scan not available: {error}", allow_module_level=True)


def random_inputs(batch: int, length: int, d: int, n: int) -> tuple[ScanInputs, Tensor]:
    """Inputs and starts."""
    g = torch.Generator().manual_seed(0)
    x, dt = torch.randn(batch, length, d, generator=g), torch.rand(batch, length, d, generator=g)
    B, C = torch.randn(batch, length, n, generator=g), torch.randn(batch, length, n, generator=g)
    starts = torch.rand(batch, length, generator=g) < 0.1
    A, D = -torch.rand(d, n, generator=g), torch.randn(d, generator=g)
    return ScanInputs(x, dt, A, B, C, D), starts


def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, state = CppScan(), torch.zeros(2, 300, 16)
    inputs, starts = random_inputs(2, 40, 300, 16)
    results = []
    for count in (1, 2, 3):
        monkeypatch.setattr(scan_cpp, "threads", lambda count=count: count)
        y, last, borders = kernel.forward(inputs, starts, state, keep=True)
        results.append([y, last, *kernel.backward(inputs, starts, borders, y, last)])
    for other in results[1:]:
        assert all(a is b or torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_threads_follow_torch() -> None:
    assert scan_cpp.threads() == torch.get_num_threads()


def test_decays_are_accurate_over_the_whole_range() -> None:
    exponents = -torch.logspace(-8, 1.9, 20_000, dtype=torch.float64).float()
    dt = -exponents.view(-1, 1, 1)  # one position a row
    zeros, ones, A, D = torch.zeros_like(dt), torch.ones_like(dt), -torch.ones(1, 1), torch.zeros(1)
    y, _, _ = CppScan().forward(ScanInputs(zeros, dt, A, zeros, ones, D), None, ones, keep=False)
    exact = exponents.double().exp()
    # dt A log2(e) is rounded to fp32 before the exponential: half an ulp of the exponent for each product.
    bound = 2e-7 + 1.2e-7 * exponents.double().abs()
    assert ((y.double().view(-1) - exact).abs() <= bound * exact).all()


def test_forward_alone_keeps_nothing() -> None:
    _, _, borders = CppScan().forward(*random_inputs(1, 20, 16, 16), torch.zeros(1, 16, 16), keep=False)
    assert borders is None
