"""The doubling scan against the loop over positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nano_think.ops.causal_sum import causal_sum, causal_sum_reference


def positions_of(lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_equals_the_loop(lengths, decay):
    positions = positions_of(lengths)
    x = torch.randn(2, positions.shape[1], 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(causal_sum(x, positions, decay), causal_sum_reference(x, positions, decay))


def test_a_short_document_keeps_its_digits_behind_a_huge_one():
    positions = positions_of([100, 3])
    x = torch.ones(1, 103, 1)
    x[:, :100] = 1e9
    assert causal_sum(x, positions)[0, -3:, 0].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_gradient_equals_the_loop(decay):
    positions = positions_of([4, 5])
    x = torch.randn(1, 9, 2, generator=torch.Generator().manual_seed(1), requires_grad=True)
    scale = torch.randn(1, 9, 2, generator=torch.Generator().manual_seed(2))
    (got,) = torch.autograd.grad((causal_sum(x, positions, decay) * scale).sum(), x)
    (want,) = torch.autograd.grad((causal_sum_reference(x, positions, decay) * scale).sum(), x)
    torch.testing.assert_close(got, want)
