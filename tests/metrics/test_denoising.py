import numpy as np
import pytest
import torch

from nano_think.metrics.denoising import DenoisingError


def make_batch(seed: int, per_token: bool = False):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(5, 7, 6, generator=generator) * 2 + torch.arange(6)
    prediction = target + torch.randn(5, 7, 6, generator=generator)
    shape = (5, 7) if per_token else (5,)
    tau = torch.randint(1, 101, shape, generator=generator)
    valid = torch.rand(5, 7, generator=generator) < 0.8
    prediction[~valid] = float("nan")
    return prediction, target, tau, valid


@pytest.mark.parametrize("per_token", [False, True])
def test_equals_numpy(per_token):
    batches = [make_batch(seed, per_token) for seed in range(8)]
    metric = DenoisingError(4, 100, 6)
    for batch in batches:
        metric.update(*batch)
    values = {name: float(value) for name, value in metric.compute().items()}
    prediction, target = (
        np.concatenate([batch[i][batch[3]].double().numpy() for batch in batches]) for i in (0, 1)
    )
    tau = np.concatenate(
        [(t if per_token else t[:, None].expand(5, 7))[valid].numpy() for _, _, t, valid in batches]
    )
    error, baseline = (prediction - target) ** 2, (target - target.mean(0)) ** 2
    assert values["mse"] == pytest.approx(error.mean(), rel=1e-10)
    assert values["mse_relative"] == pytest.approx(error.mean() / target.var(0).mean(), rel=1e-10)
    for k, (first, last) in enumerate([(1, 25), (26, 50), (51, 75), (76, 100)]):
        chosen = (tau >= first) & (tau <= last)
        assert values[f"mse_bucket/{k}"] == pytest.approx(error[chosen].mean(), rel=1e-10)
        expected = error[chosen].mean() / baseline[chosen].mean()
        assert values[f"mse_relative_bucket/{k}"] == pytest.approx(expected, rel=1e-10)


def test_predicting_the_mean_scores_one_and_the_truth_zero():
    target = torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tau = torch.full((4,), 10)
    metric = DenoisingError(2, 10, 3)
    metric.update(target.mean((0, 1)).expand_as(target), target, tau)
    assert float(metric.compute()["mse_relative"]) == pytest.approx(1)
    metric.reset()
    metric.update(target, target, tau)
    assert float(metric.compute()["mse_relative"]) == 0


@pytest.mark.parametrize(("buckets", "levels"), [(1, 1), (4, 100), (3, 10), (7, 10), (10, 1000)])
def test_every_level_falls_into_the_bucket_that_names_it(buckets, levels):
    metric = DenoisingError(buckets, levels, 1)
    spans = metric.bucket_levels()
    assert [tau for first, last in spans for tau in range(first, last + 1)] == list(range(1, levels + 1))
    for k, (first, last) in enumerate(spans):
        for tau in (first, last):
            metric.reset()
            metric.update(torch.zeros(1, 1, 1), torch.ones(1, 1, 1), torch.tensor([tau]))
            assert f"mse_bucket/{k}" in metric.compute()


def test_merged_states_of_two_processes_equal_one():
    batches = [make_batch(seed) for seed in range(4)]
    whole, left, right = (DenoisingError(5, 100, 6) for _ in range(3))
    for index, batch in enumerate(batches):
        whole.update(*batch)
        (left if index < 3 else right).update(*batch)
    left.merge_state(right)
    expected, merged = whole.compute(), left.compute()
    assert merged.keys() == expected.keys()
    for name in expected:
        assert float(merged[name]) == pytest.approx(float(expected[name]), rel=1e-10)


def test_nothing_counted_and_wrong_arguments():
    metric = DenoisingError(2, 10, 3)
    zeros = torch.zeros(1, 2, 3)
    metric.update(zeros, zeros, torch.tensor([1]), torch.zeros(1, 2, dtype=torch.bool))
    assert metric.compute() == {}
    with pytest.raises(ValueError, match="num_buckets=11"):
        DenoisingError(11, 10, 3)
    with pytest.raises(ValueError, match=r"\(B, L, 3\)"):
        metric.update(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), torch.tensor([1]))
