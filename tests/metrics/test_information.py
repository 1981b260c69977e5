import math

import pytest
import torch
from scipy.stats import entropy as scipy_entropy

from nano_think.metrics.information import entropy, mutual_information


def test_entropy_equals_scipy_and_takes_zeros():
    p = torch.rand(6, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p /= p.sum(-1, keepdim=True)
    assert torch.allclose(entropy(p), torch.from_numpy(scipy_entropy(p.numpy(), axis=-1)))
    assert entropy(torch.tensor([1.0, 0.0])) == 0


def test_mutual_information_is_the_divergence_from_independence_and_batched():
    sums = torch.rand(6, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 100
    values = mutual_information(sums, sums.sum(-1))
    for value, table in zip(values.tolist(), sums.numpy(), strict=True):
        joint = table / table.sum()
        independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
        assert value == pytest.approx(scipy_entropy(joint.ravel(), independent.ravel()), abs=1e-12)


def test_empty_domains_do_not_count():
    sums = torch.tensor([[30.0, 0.0], [0.0, 0.0], [0.0, 30.0]])
    assert float(mutual_information(sums, sums.sum(-1))) == pytest.approx(math.log(2))
