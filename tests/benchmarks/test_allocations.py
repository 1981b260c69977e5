from __future__ import annotations

import pytest
import torch

from benchmarks.harness.allocations import peak_bytes
from benchmarks.scan import D_STATE, peak_tensors
from nano_think.ops.selective_scan import cpp_problem, selective_scan


def test_counts_what_is_held_at_a_time() -> None:
    def work() -> torch.Tensor:
        first = torch.ones(1000)
        second = torch.ones(2000) + 1  # two of 8,000 bytes for a moment
        del first
        return second + torch.ones(2000)

    assert 20_000 <= peak_bytes(work) <= 25_000


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_the_scan_holds_no_tensor_of_length_by_channels_by_states(backend: str) -> None:
    """In tensors of length x channels: a constant well below the number of states, so linear in the length."""
    if backend == "cpp" and cpp_problem() is not None:
        pytest.skip("no compiler")

    def scan(*inputs: torch.Tensor) -> torch.Tensor:
        return selective_scan(*inputs, backend=backend)[0]

    short, long = (peak_tensors(scan, 64, length) for length in (512, 2048))
    assert long < D_STATE
    assert long <= 1.05 * short
