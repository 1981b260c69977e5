import numpy as np
import pytest

from nano_think.evals.bootstrap import ratio
from nano_think.evals.ratios import correlation_interval, interval, mean_interval, number, sums_of


def test_sums_by_group_and_their_ratio_by_hand():
    values = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert sums_of(values, np.array([0, 2, 0]), 3).tolist() == [[6, 8], [0, 0], [3, 4]]
    found = mean_interval(np.array([1.0, 2.0, 6.0]), np.array([0, 0, 1]))
    assert found["estimate"] == 3
    assert found["documents"] == 2
    # a resample is twice the first document, twice the second, or both
    assert (found["low"], found["high"]) == (1.5, 6)


def test_documents_without_a_token_of_the_kind_do_not_count():
    values, document = np.arange(6.0), np.array([0, 0, 1, 1, 2, 2])
    found = mean_interval(values, document, document != 1)
    assert found["estimate"] == pytest.approx(2.5)
    assert found["documents"] == 2
    none = mean_interval(values, document, np.zeros(6, bool))
    assert none == {"estimate": None, "low": None, "high": None, "documents": 0}
    one = mean_interval(values, document, document == 1)
    assert one == {"estimate": 2.5, "low": None, "high": None, "documents": 1}


def test_what_is_not_defined_is_none():
    assert number(float("nan")) is None
    assert number(float("inf")) is None
    empty = interval(np.array([[1.0, 0.0], [2.0, 0.0]]), ratio, np.ones(2))
    assert empty["estimate"] is None
    assert empty["low"] is None


def test_interval_of_a_mean_covers_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    document = np.repeat(np.arange(60), 5)
    for seed in range(200):
        # documents differ: tokens alone would give an interval that is far too narrow
        values = np.repeat(rng.normal(size=60), 5) + 0.1 * rng.normal(size=300)
        found = mean_interval(values, document, n_resamples=200, seed=seed)
        hits += found["low"] <= 0 <= found["high"]
    assert 0.88 <= hits / 200 <= 0.99


def test_correlation_equals_numpys_and_finds_the_planted_one():
    rng = np.random.default_rng(1)
    document = np.repeat(np.arange(80), 25)
    x = rng.normal(size=2000) + 100
    y = 0.6 * (x - 100) + 0.8 * rng.normal(size=2000)
    found = correlation_interval(x, y, document)
    assert found["estimate"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)
    assert found["low"] < 0.6 < found["high"]
    assert found["high"] - found["low"] < 0.1
    assert found["documents"] == 80
    noise = correlation_interval(x, rng.normal(size=2000), document)
    assert noise["low"] < 0 < noise["high"]


def test_differences_between_groups_count_for_nothing_inside_them():
    rng = np.random.default_rng(2)
    document, group = np.repeat(np.arange(100), 20), np.repeat(np.arange(100) % 4, 20)
    x, y = group + rng.normal(size=2000) * 0.1, group + rng.normal(size=2000) * 0.1
    assert correlation_interval(x, y, document)["estimate"] > 0.95
    inside = correlation_interval(x, y, document, group)
    assert abs(inside["estimate"]) < 0.1
    centred = [v - np.array([v[group == g].mean() for g in range(4)])[group] for v in (x, y)]
    assert inside["estimate"] == pytest.approx(np.corrcoef(*centred)[0, 1], abs=1e-9)


def test_a_constant_correlates_with_nothing():
    document, group = np.repeat(np.arange(10), 10), np.repeat(np.arange(10) % 2, 10)
    noise = np.random.default_rng(3).normal(size=100)
    constant = np.full(100, 1 / 3) + 1e-9 * noise
    assert correlation_interval(constant, noise, document)["estimate"] is None
    assert correlation_interval(group / 3.0, noise, document)["estimate"] is not None
    assert correlation_interval(group / 3.0, noise, document, group)["estimate"] is None
