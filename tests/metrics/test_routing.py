import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy as scipy_entropy

from nano_think.metrics.routing import RoutingStats

EXPERTS = ["T", "D", "S"]
DOMAINS = ["code", "general"]


def make_batch(seed: int, rows: int = 4, length: int = 20):
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.randn(rows, length, 3, generator=generator) * 2).softmax(-1)
    domain = torch.randint(0, 2, (rows,), generator=generator)
    positions = torch.randint(0, 40, (rows, length), generator=generator)
    valid = torch.rand(rows, length, generator=generator) < 0.8
    weights[~valid] = math.nan
    return weights, domain, positions, valid


def tokens_of(batches):
    """Flat numpy arrays of the valid tokens: weights (T, N), domain (T,), position (T,)."""
    weights = np.concatenate([w[v].double().numpy() for w, _, _, v in batches])
    domain = np.concatenate([d[:, None].expand(v.shape)[v].numpy() for _, d, _, v in batches])
    position = np.concatenate([p[v].numpy() for _, _, p, v in batches])
    return weights, domain, position


def filled(batches, max_positions=32):
    metric = RoutingStats(EXPERTS, DOMAINS, max_positions=max_positions)
    for batch in batches:
        metric.update(*batch)
    return metric


def test_equals_numpy_over_tokens_and_ignores_padding():
    batches = [make_batch(seed) for seed in range(3)]
    values = {name: float(value) for name, value in filled(batches).compute().items()}
    weights, domain, _ = tokens_of(batches)
    for index, name in enumerate(EXPERTS):
        column = weights[:, index]
        assert values[f"routing/{name}/mean"] == pytest.approx(column.mean(), rel=1e-12)
        assert values[f"routing/{name}/std"] == pytest.approx(column.std(), rel=1e-9)
        assert values[f"routing/{name}/min"] == column.min()
        assert values[f"routing/{name}/max"] == column.max()
        share = (weights.argmax(1) == index).mean()
        assert values[f"routing/{name}/argmax_share"] == pytest.approx(share)
        for code, domain_name in enumerate(DOMAINS):
            expected = column[domain == code].mean()
            assert values[f"routing/domain/{domain_name}/{name}"] == pytest.approx(expected, rel=1e-12)
    per_token, of_mean = scipy_entropy(weights, axis=1).mean(), scipy_entropy(weights.mean(0))
    assert values["routing/entropy_token"] == pytest.approx(per_token, rel=1e-6)
    assert values["routing/entropy_mean"] == pytest.approx(of_mean, rel=1e-6)
    assert values["routing/effective_experts_token"] == pytest.approx(math.exp(per_token), rel=1e-6)
    assert values["routing/effective_experts_mean"] == pytest.approx(math.exp(of_mean), rel=1e-6)
    assert values["routing/mi_token"] == pytest.approx(of_mean - per_token, abs=1e-6)
    joint = np.stack([weights[domain == code].sum(0) for code in range(2)]) / len(weights)
    product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    assert values["routing/mi_domain"] == pytest.approx(
        scipy_entropy(joint.ravel(), product.ravel()), abs=1e-6
    )


def test_position_curve_and_bins():
    batches = [make_batch(seed) for seed in range(3)]
    metric = filled(batches, max_positions=32)
    assert metric.position_bins() == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31)]
    weights, _, position = tokens_of(batches)
    curve = metric.position_curve()
    for row, (first, last) in enumerate(metric.position_bins()):
        chosen = (position >= first) & ((position <= last) | (row == 5))
        assert curve[row].numpy() == pytest.approx(weights[chosen].mean(0), rel=1e-12)


@pytest.mark.parametrize(("longest", "bins"), [(1, 1), (2, 2), (3, 3), (4, 3), (5, 4), (256, 9)])
def test_bins_cover_every_position_once(longest, bins):
    spans = RoutingStats(EXPERTS, DOMAINS, max_positions=longest).position_bins()
    assert len(spans) == bins
    assert [p for first, last in spans for p in range(first, last + 1)] == list(range(longest))


def test_perfect_specialisation_and_none():
    certain = torch.tensor([[[1.0, 0.0]] * 5, [[0.0, 1.0]] * 5])
    arguments = (torch.tensor([0, 1]), torch.arange(5).expand(2, 5), torch.ones(2, 5, dtype=torch.bool))
    metric = RoutingStats(["T", "S"], DOMAINS)
    metric.update(certain, *arguments)
    values = metric.compute()
    assert float(values["routing/mi_domain"]) == pytest.approx(math.log(2))
    assert float(values["routing/mi_token"]) == pytest.approx(math.log(2))
    assert float(values["routing/effective_experts_token"]) == pytest.approx(1)
    metric.reset()
    metric.update(torch.full((2, 5, 2), 0.5), *arguments)
    values = metric.compute()
    assert float(values["routing/mi_domain"]) == pytest.approx(0, abs=1e-12)
    assert float(values["routing/T/std"]) == 0
    assert float(values["routing/effective_experts_mean"]) == pytest.approx(2)


def test_merged_states_of_two_processes_equal_one():
    batches = [make_batch(seed) for seed in range(4)]
    whole, left, right = filled(batches), filled(batches[:1]), filled(batches[1:])
    left.merge_state(right)
    expected, merged = whole.compute(), left.compute()
    assert merged.keys() == expected.keys()
    for name in expected:
        assert float(merged[name]) == pytest.approx(float(expected[name]), rel=1e-9, abs=1e-12)
    assert torch.allclose(left.position_curve(), whole.position_curve())
    assert torch.allclose(left.domain_table(), whole.domain_table())


def test_empty_domain_and_no_tokens():
    weights, _, positions, valid = make_batch(0)
    metric = RoutingStats(EXPERTS, DOMAINS)
    metric.update(weights, torch.zeros(4, dtype=torch.long), positions, valid)
    values = metric.compute()
    assert not any("general" in name for name in values)
    assert float(values["routing/mi_domain"]) == pytest.approx(0, abs=1e-12)
    assert metric.domain_table()[1].isnan().all()
    metric.reset()
    metric.update(weights, torch.zeros(4, dtype=torch.long), positions, torch.zeros_like(valid))
    assert metric.compute() == {}


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(B, L, 3\)"):
        RoutingStats(EXPERTS, DOMAINS).update(
            torch.zeros(2, 5, 2), torch.zeros(2).long(), torch.zeros(2, 5).long(), torch.ones(2, 5).bool()
        )
