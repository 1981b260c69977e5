"""The compiled scan, in chunks of 4 positions: 16 would only take four times as long to compile."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from nano_think.ops import scan_compile, scan_kernel
from nano_think.ops import selective_scan as module
from nano_think.ops.selective_scan import BACKEND_VARIABLE, cpp_problem
from tests.ops.test_selective_scan import assert_same, random_starts, run, scan_inputs

if cpp_problem() is not None:
    pytest.skip("torch.compile needs a compiler too", allow_module_level=True)


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    for place in (scan_compile, scan_kernel):
        monkeypatch.setattr(place, "CHUNK", 4)
    module._kernel.cache_clear()
    yield
    module._kernel.cache_clear()


def test_equals_the_reference_and_compiles_once_for_all_lengths() -> None:
    """Values and gradients in fp32 against fp64, relative to the largest entry: 2e-6."""
    made = []
    for length in (4, 8, 11, 2, 5, 16):
        inputs, starts = scan_inputs(2, length, 6, 3, seed=length), random_starts(2, length)
        for marks in (None, starts):
            actual = run(inputs, "compile", marks, torch.float32)
            assert_same(actual, run(inputs, "ref", marks), 2e-6)
        made.append(counters["stats"]["unique_graphs"])
    assert made[-1] == made[0]


def test_softplus_gate_and_bf16_are_those_around_the_kernel() -> None:
    """bf16 sequences give exactly what the same numbers give in fp32."""
    inputs = {name: tensor.detach().bfloat16() for name, tensor in scan_inputs(2, 7, 6, 3).items()}
    z = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(1)).bfloat16()
    bias = torch.linspace(-2, 1, 6)
    half, last = module.selective_scan(**inputs, dt_bias=bias, z=z, backend="compile")
    single = {name: tensor.float() for name, tensor in inputs.items()}
    whole, whole_last = module.selective_scan(**single, dt_bias=bias, z=z.float(), backend="compile")
    want, _ = module.selective_scan(**single, dt_bias=bias, z=z.float(), backend="ref")
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, whole.bfloat16())
    assert torch.equal(last, whole_last)
    torch.testing.assert_close(whole, want, rtol=1e-5, atol=1e-5)
