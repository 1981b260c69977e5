from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from nano_think.engine import sampling
from nano_think.engine.sampling import SamplingConfig, draw, row_generators, sample, warp


def brute_force(logits: list[float], config: SamplingConfig) -> list[float]:
    """Probabilities after warping, by plain loops over one row."""
    size = len(logits)
    if config.temperature == 0:
        return [float(i == logits.index(max(logits))) for i in range(size)]
    scaled = [x / config.temperature for x in logits]
    weights = [math.exp(x - max(scaled)) for x in scaled]
    ranking = sorted(range(size), key=lambda i: (-scaled[i], i))[: config.top_k or size]
    mass = sum(weights[i] for i in ranking)
    kept, held = [], 0.0
    for i in ranking:
        if held >= config.top_p and config.top_p < 1:
            break
        kept.append(i)
        held += weights[i] / mass
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(size)]


@given(
    logits=st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.3, 1.0, 2.5]), min_size=1, max_size=9),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([None, 1, 2, 5, 100]),
    top_p=st.sampled_from([1e-9, 0.21, 0.57, 0.93, 1.0]),
)
def test_warping_equals_brute_force(logits, temperature, top_k, top_p) -> None:
    config = SamplingConfig(temperature, top_k, top_p)
    warped = warp(torch.tensor([logits], dtype=torch.float64), config).softmax(dim=-1)[0]
    expected = torch.tensor(brute_force(logits, config), dtype=torch.float64)
    torch.testing.assert_close(warped, expected, rtol=1e-12, atol=1e-12)


def test_top_p_keeps_the_crossing_token_and_no_more() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    for top_p, kept in [(0.4, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3)]:
        assert int(warp(logits, SamplingConfig(top_p=top_p)).isfinite().sum()) == kept


def test_top_p_does_not_depend_on_the_order_of_tokens() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    config = SamplingConfig(0.8, 20, 0.7)
    torch.testing.assert_close(warp(logits[order], config), warp(logits, config)[order])


def test_ties_keep_exactly_k_tokens_lowest_ids_first() -> None:
    warped = warp(torch.zeros(3, 6), SamplingConfig(top_k=2))
    assert warped.isfinite().tolist() == [[True, True, False, False, False, False]] * 3


def test_no_limits_equal_plain_softmax() -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    expected = logits.double().softmax(dim=-1)
    for config in (SamplingConfig(), SamplingConfig(top_k=30)):
        torch.testing.assert_close(warp(logits, config).softmax(dim=-1), expected, rtol=1e-13, atol=0.0)


@pytest.mark.parametrize(
    "config", [SamplingConfig(0.0), SamplingConfig(top_p=1e-12), SamplingConfig(top_k=1)]
)
def test_narrowest_settings_equal_argmax(config: SamplingConfig) -> None:
    logits = torch.randn(16, 40, generator=torch.Generator().manual_seed(3))
    assert torch.equal(sample(logits, config, row_generators(0, range(16))), logits.argmax(dim=-1))


def test_banned_tokens_stay_banned_and_nothing_left_is_an_error() -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0]])
    for config in (SamplingConfig(), SamplingConfig(top_k=3), SamplingConfig(top_p=0.99)):
        assert warp(logits, config).softmax(dim=-1)[0, 1] == 0
    for bad in (-math.inf, math.nan, math.inf):
        with pytest.raises(ValueError, match="no token can be drawn"):
            warp(torch.tensor([[0.0, 1.0], [bad, bad]]), SamplingConfig())


@pytest.mark.parametrize(
    "config", [SamplingConfig(), SamplingConfig(0.7, 5), SamplingConfig(1.3, None, 0.8)], ids=str
)
def test_samples_follow_the_exact_distribution(config: SamplingConfig) -> None:
    logits = torch.tensor([[0.1, -1.0, 2.0, 0.7, -0.3, 1.2, 0.0, -2.0]])
    expected = torch.tensor(brute_force(logits[0].tolist(), config), dtype=torch.float64)
    draws = 20_000
    (generator,) = row_generators(11, [0])
    ids = draw(warp(logits, config).expand(draws, -1), [generator] * draws)
    counts = torch.bincount(ids, minlength=8)
    live = expected > 0
    assert counts[~live].sum() == 0
    assert chisquare(counts[live], expected[live] * draws).pvalue > 0.01
    assert chisquare(counts[live], expected[live].roll(1) * draws).pvalue < 1e-6


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    together = [
        sample(logits, SamplingConfig(), gens) for gens in [row_generators(7, range(5))] for _ in range(9)
    ]
    for row in range(5):
        alone = row_generators(7, [row])
        again = [sample(logits[row : row + 1], SamplingConfig(), alone).item() for _ in range(9)]
        assert again == [ids[row].item() for ids in together]


def test_streams_of_neighbouring_seeds_and_rows_differ() -> None:
    firsts = {
        torch.rand(1, generator=row_generators(seed, [row])[0]).item()
        for seed, row in itertools.product(range(-2, 20), range(20))
    }
    assert len(firsts) == 22 * 20


def test_extreme_uniform_numbers_point_at_possible_tokens(monkeypatch) -> None:
    logits = torch.tensor([[-math.inf, 0.0, 0.0, 0.0, -math.inf]])
    for value, expected in [(0.0, 1), (1 - 2**-53, 3)]:
        number = torch.tensor([value], dtype=torch.float64)
        monkeypatch.setattr(sampling, "uniforms", lambda generators, number=number: number)
        assert draw(logits, row_generators(0, [0])).item() == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": 0}, r"top_k=0 is not allowed: leave it out \(null\) for no limit"),
        ({"top_k": -3}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
    ],
)
def test_bad_settings_are_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**arguments)
