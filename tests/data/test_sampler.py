from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from nano_think.data.sampler import BLOCK, DomainSampler, mixing_shares
from nano_think.errors import UserError

ROWS = {"a": 4000, "b": 1000, "c": 50}
SHARES = {
    "equal": ("equal", 1.0, [1 / 3, 1 / 3, 1 / 3]),
    "proportional": ("proportional", 1.0, [4000 / 5050, 1000 / 5050, 50 / 5050]),
    "temperature": ("temperature", 2.0, np.sqrt([4000, 1000, 50]) / np.sqrt([4000, 1000, 50]).sum()),
    "list": ([5, 3, 2], 1.0, [0.5, 0.3, 0.2]),
    "by name": ({"c": 1, "a": 0, "b": 3}, 1.0, [0, 0.75, 0.25]),
}


def counts(draws: list[tuple[int, int]]) -> np.ndarray:
    return np.bincount([domain for domain, _ in draws], minlength=len(ROWS))


def p_value(draws: list[tuple[int, int]], shares) -> float:
    shares = np.asarray(shares)
    seen = counts(draws)
    assert (seen[shares == 0] == 0).all()
    return chisquare(seen[shares > 0], len(draws) * shares[shares > 0]).pvalue


@pytest.mark.parametrize("case", SHARES, ids=list(SHARES))
@pytest.mark.parametrize("first", [0, 777, 1_000_003], ids=["start", "mid-block", "far"])
def test_ten_thousand_draws_have_the_configured_shares(case: str, first: int) -> None:
    mixing, temperature, shares = SHARES[case]
    sampler = DomainSampler(ROWS, mixing, temperature, seed=3)
    np.testing.assert_allclose(sampler.shares, shares)
    draws = sampler.draws(first + np.arange(10_000))
    assert p_value(draws, shares) > 0.01
    wrong = np.array([0.4, 0.35, 0.25])
    if 0 not in shares:
        assert p_value(draws, wrong) < 1e-6  # the test can fail


@pytest.mark.parametrize("case", SHARES, ids=list(SHARES))
def test_each_rank_has_the_configured_shares(case: str) -> None:
    mixing, temperature, shares = SHARES[case]
    sampler = DomainSampler(ROWS, mixing, temperature, seed=5)
    for rank in range(2):
        draws = [draw for step in range(1250) for draw in sampler.batch(step, 8, rank, 2)]
        assert p_value(draws, shares) > 0.01


def test_ranks_divide_the_single_process_sequence() -> None:
    sampler = DomainSampler(ROWS, seed=1)
    whole = sampler.draws(np.arange(60))
    parts = [[d for step in range(5) for d in sampler.batch(step, 4, rank, 3)] for rank in range(3)]
    assert [parts[i % 3][i // 3] for i in range(60)] == whole


@given(st.lists(st.integers(0, 300_000), min_size=1, max_size=20), st.integers(0, 2**64 - 1))
def test_a_draw_depends_only_on_seed_and_number(indices: list[int], seed: int) -> None:
    used = DomainSampler(ROWS, "proportional", seed=seed)
    for index in indices:
        fresh = DomainSampler(ROWS, "proportional", seed=seed)
        assert used.draw(index) == fresh.draw(index)


def test_seeds_differ() -> None:
    first, second = (DomainSampler(ROWS, seed=seed).draws(np.arange(1000)) for seed in (0, 1))
    assert first != second
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 50


@pytest.mark.parametrize("mixing", ["equal", "proportional", [1, 1, 30]])
def test_no_row_comes_again_before_all_rows_of_its_domain(mixing) -> None:
    rows = [7, 100, 1]
    draws = DomainSampler(rows, mixing, seed=9).draws(np.arange(3 * BLOCK + 17))
    for domain, count in enumerate(rows):
        visited = [row for where, row in draws if where == domain]
        passes = [visited[i : i + count] for i in range(0, len(visited), count)]
        assert all(sorted(one) == list(range(count)) for one in passes[:-1])
        assert len(set(passes[-1])) == len(passes[-1])
        if count == 100 and len(passes) > 2:
            assert passes[0] != passes[1]  # each pass in its own order


@settings(max_examples=10)
@given(data=st.data(), seed=st.integers(0, 2**32), world=st.integers(1, 3), batch=st.integers(1, 4))
def test_any_mixture_divides_among_ranks_and_visits_every_row_before_it_repeats_one(
    data, seed, world, batch
) -> None:
    rows = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    weights = [data.draw(st.sampled_from([0, 1, 2, 7])) for _ in rows]
    weights[data.draw(st.integers(0, len(rows) - 1))] = 3
    sampler, steps = DomainSampler(rows, weights, seed=seed), BLOCK // (world * batch) + 2
    parts = [[d for step in range(steps) for d in sampler.batch(step, batch, r, world)] for r in range(world)]
    draws = [parts[i % world][i // world] for i in range(steps * batch * world)]
    assert draws == DomainSampler(rows, weights, seed=seed).draws(np.arange(len(draws)))
    expected = BLOCK * np.array(weights) / sum(weights)
    seen = np.bincount([domain for domain, _ in draws[:BLOCK]], minlength=len(rows))
    assert (np.abs(seen - expected) < 1 + 1e-9).all()
    assert (seen[expected == 0] == 0).all()
    for domain, count in enumerate(rows):
        visited = [row for where, row in draws if where == domain]
        for i in range(0, len(visited), count):
            one_pass = visited[i : i + count]
            assert len(set(one_pass)) == len(one_pass)
            assert max(one_pass) < count


def test_rows_come_in_uniformly_random_order() -> None:
    first = [DomainSampler([6], seed=seed).draw(0)[1] for seed in range(1200)]
    assert chisquare(np.bincount(first, minlength=6)).pvalue > 0.01


def test_shares_are_exact_in_expectation_and_tight_in_each_block() -> None:
    shares = np.array([0.0004, 0.3333, 0.6663])
    blocks = [
        counts(DomainSampler(ROWS, shares.tolist(), seed=seed).draws(BLOCK * 2 + np.arange(BLOCK)))
        for seed in range(400)
    ]
    assert (np.abs(np.array(blocks) - BLOCK * shares) < 1).all()
    error = np.mean(blocks, axis=0) - BLOCK * shares
    assert (np.abs(error) < 4 * 0.5 / np.sqrt(400)).all()


def test_order_inside_a_block_is_mixed() -> None:
    domains = np.array([domain for domain, _ in DomainSampler(ROWS, seed=2).draws(np.arange(BLOCK))])
    changes = (domains[1:] != domains[:-1]).mean()
    assert abs(changes - 2 / 3) < 0.06


def test_a_last_domain_of_weight_zero_is_never_drawn() -> None:
    sampler = DomainSampler([10, 10, 10, 10], [0.1, 0.7, 0.2, 0.0], seed=4)
    assert 3 not in {domain for domain, _ in sampler.draws(np.arange(50 * BLOCK))}


def test_temperature_lies_between_proportional_and_equal() -> None:
    rows = [900, 100]
    np.testing.assert_allclose(mixing_shares(rows, "temperature", 1.0), [0.9, 0.1])
    np.testing.assert_allclose(mixing_shares(rows, "temperature", 2.0), [0.75, 0.25])
    np.testing.assert_allclose(mixing_shares(rows, "temperature", 1e9), [0.5, 0.5], atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "mixing", "temperature", "message"),
    [
        (ROWS, "balanced", 1.0, "choose equal, proportional, temperature"),
        (ROWS, "temperature", 0.0, "must be above 0"),
        (ROWS, [1, 2], 1.0, "2 mixing weights for 3 domains"),
        (ROWS, [1, -1, 0], 1.0, "at least 0"),
        (ROWS, [0, 0, 0], 1.0, "not all 0"),
        (ROWS, [float("nan"), 1, 1], 1.0, "finite"),
        (ROWS, {"a": 1, "b": 1, "d": 1}, 1.0, "name each once"),
        ({"a": 5, "empty": 0}, "equal", 1.0, "no text to draw from in domain empty"),
        ({"a": 0}, "proportional", 1.0, "no domain has text"),
    ],
)
def test_impossible_mixing_is_explained(rows, mixing, temperature, message) -> None:
    with pytest.raises(UserError, match=message):
        DomainSampler(rows, mixing, temperature)


def test_seed_must_fit_the_generator() -> None:
    with pytest.raises(UserError, match="seed=-1"):
        DomainSampler(ROWS, seed=-1)


def test_limits_keep_so_many_rows_spread_evenly_and_parts_are_disjoint() -> None:
    limits = [100, 100, 50]
    parts = [
        set(
            DomainSampler({"a": 4000, "b": 1000, "c": 150}, seed=2, limits=limits, part=part).draws(
                np.arange(2000)
            )
        )
        for part in range(3)
    ]
    for part in parts:
        assert counts(sorted(part)).tolist() == limits  # every kept row was drawn, no other
    assert not parts[0] & parts[1] | parts[1] & parts[2] | parts[0] & parts[2]
    rows = sorted(row for domain, row in parts[0] if domain == 0)
    assert rows == [40 * i for i in range(100)]


def test_limits_above_the_rows_change_nothing() -> None:
    free, held = DomainSampler(ROWS, seed=2), DomainSampler(ROWS, seed=2, limits=[9999] * 3)
    assert free.draws(np.arange(500)) == held.draws(np.arange(500))


def test_a_part_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match="domain c has 50 rows, which is 2 parts of 20"):
        DomainSampler(ROWS, limits=[20, 20, 20], part=2)
