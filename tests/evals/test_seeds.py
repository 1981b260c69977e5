"""Intervals over documents and seeds on simulated pipelines whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nano_think.evals import seeds as module
from nano_think.evals.bootstrap import paired_difference
from nano_think.evals.losses import DocumentLosses
from nano_think.evals.seeds import (
    SeedDifference,
    difference_over_seeds,
    loss_over_seeds,
    seed_deviation,
)


def make_losses(per_token, tokens, domain=None, num_domains=1):
    tokens = np.asarray(tokens)
    domain = np.zeros(len(tokens), dtype=np.int64) if domain is None else np.asarray(domain)
    return DocumentLosses(
        np.arange(len(tokens)), domain, np.asarray(per_token) * tokens, tokens, tokens * 4, num_domains
    )


def pipelines(rng, seeds, documents, between_seeds, between_documents, rest, effect=0.0, domains=1):
    """Models and baselines of `seeds` seeds whose true difference is `effect`, over ragged documents."""
    tokens = np.maximum(2, rng.lognormal(4, 1, documents)).astype(int)
    domain = np.arange(documents) % domains
    level = 3 + rng.normal(0, 0.5, documents)
    gain = effect + rng.normal(0, between_seeds, (seeds, 1)) + rng.normal(0, between_documents, documents)
    gain = gain + rng.normal(0, rest, (seeds, documents))
    baselines = [make_losses(level, tokens, domain, domains)] * seeds
    return [make_losses(level + row, tokens, domain, domains) for row in gain], baselines


def simulated(seeds, variation, average="micro", effect=0.0, data_sets=300, documents=60, **options):
    rng = np.random.default_rng(1)
    domains = 3 if average == "macro" else 1
    return [
        difference_over_seeds(
            *pipelines(rng, seeds, documents, *variation, effect, domains),
            average=average,
            n_resamples=400,
            seed=number,
            **{"minimum_effect": 0.0} | options,
        )
        for number in range(data_sets)
    ]


def covered(intervals, truth=0.0):
    return np.mean([interval.low <= truth <= interval.high for interval in intervals])


# standard deviations between seeds, between documents, and of what is left
DOCUMENTS, SEEDS, BOTH = (0.0, 0.3, 0.0), (0.05, 0.0, 0.1), (0.05, 0.3, 0.3)


@pytest.mark.parametrize(
    ("seeds", "variation", "average"),
    [
        (1, DOCUMENTS, "micro"),
        (3, DOCUMENTS, "macro"),
        (3, SEEDS, "micro"),
        (3, BOTH, "micro"),
        (3, BOTH, "macro"),
        (5, DOCUMENTS, "micro"),
        (5, BOTH, "micro"),
    ],
)
def test_95_percent_intervals_hold_the_truth_in_95_percent_of_300_data_sets(seeds, variation, average):
    """Less three binomial deviations of 1.3% and 1% for a few long documents; the quadrature adds up to 2.5%."""
    assert 0.9 <= covered(simulated(seeds, variation, average)) <= 0.995


def test_few_documents_and_two_seeds():
    assert 0.9 <= covered(simulated(1, DOCUMENTS, documents=12)) <= 0.985
    assert 0.92 <= covered(simulated(2, BOTH, documents=12)) <= 0.995


def test_documents_alone_would_be_sure_of_what_seeds_decide():
    """The control: an interval that leaves the seeds out is wrong far more often than it says."""
    rng, hits = np.random.default_rng(0), 0
    for number in range(200):
        models, baselines = pipelines(rng, 3, 60, 0.1, 0.3, 0.0)
        mean = make_losses(sum(m.sum_nll for m in models) / 3 / models[0].num_tokens, models[0].num_tokens)
        interval = paired_difference(mean, baselines[0], n_resamples=200, seed=number)
        hits += interval.low <= 0 <= interval.high
    assert hits / 200 < 0.8


def test_what_documents_and_seeds_share_is_counted_once(monkeypatch):
    """Pure noise of (document, seed) has one variance; without the correction it counts twice."""
    right = simulated(5, (0.0, 0.0, 0.3), data_sets=100)
    monkeypatch.setattr(module, "_own_share", lambda parts: 1.0)
    twice = simulated(5, (0.0, 0.0, 0.3), data_sets=100)
    assert covered(right) >= 0.91
    width = [np.mean([i.high - i.low for i in intervals]) for intervals in (right, twice)]
    assert width[0] < 0.9 * width[1]


@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_equal_models_are_claimed_different_in_at_most_about_5_percent(seeds):
    variation = BOTH if seeds > 1 else DOCUMENTS
    claims = [d.verdict != "not distinguishable" for d in simulated(seeds, variation)]
    assert np.mean(claims) <= 0.09


@pytest.mark.parametrize(("seeds", "effect"), [(1, 0.25), (3, -0.25), (5, -0.2)])
def test_power_at_a_stated_effect(seeds, effect):
    """Deviation 0.3 between 60 documents, 0.03 between seeds: these effects are found in 80% of the cases."""
    found = simulated(seeds, (0.03 * (seeds > 1), 0.3, 0.1), effect=effect, data_sets=100)
    verdict = "better" if effect < 0 else "worse"
    assert np.mean([d.verdict == verdict for d in found]) >= 0.8
    assert covered(found, effect) >= 0.88


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_error_of_the_documents_is_that_of_a_ratio_by_its_formula(seeds):
    """What seeds share of every document: sqrt(sum (d - mean n)^2) / sum n of differences d over n tokens."""
    models, baselines = pipelines(np.random.default_rng(2), seeds, 400, 0, 0.3, 0)
    found = difference_over_seeds(models, baselines, n_resamples=4000)
    tokens = models[0].num_tokens
    rest = models[0].sum_nll - baselines[0].sum_nll - found.estimate * tokens
    assert found.document_error == pytest.approx(math.sqrt((rest**2).sum()) / tokens.sum(), rel=0.05)


def test_one_seed_is_the_interval_over_documents_and_says_so():
    models, baselines = pipelines(np.random.default_rng(1), 1, 50, 0, 0.3, 0)
    ours = difference_over_seeds(models, baselines, seed=7)
    document = paired_difference(models[0], baselines[0], seed=7)
    assert (ours.estimate, ours.low, ours.high) == pytest.approx(
        (document.estimate, document.low, document.high)
    )
    assert "one seed: the interval knows nothing of seeds" in ours.words
    assert math.isnan(ours.seed_error)
    assert ours.seeds == 1


def test_values_by_hand():
    """Seeds with differences -0.3, -0.1, -0.2 in every document: the documents add nothing."""
    tokens, level = np.array([10, 20, 30, 40]), np.array([2.0, 3.0, 4.0, 5.0])
    base = make_losses(level, tokens)
    models = [make_losses(level + gain, tokens) for gain in (-0.3, -0.1, -0.2)]
    got = difference_over_seeds(models, [base] * 3, level=0.9)
    assert got.per_seed == pytest.approx((-0.3, -0.1, -0.2))
    assert got.seed_error == pytest.approx(0.1 / math.sqrt(3))
    assert got.document_error == pytest.approx(0, abs=1e-9)
    # t of 2 degrees of freedom at 90%
    assert got.low == pytest.approx(-0.2 - 2.919986 * 0.1 / math.sqrt(3), abs=1e-6)
    assert got.high == pytest.approx(-0.2 + 2.919986 * 0.1 / math.sqrt(3), abs=1e-6)
    bits = difference_over_seeds(models, [base] * 3, "bpb", level=0.9)
    assert bits.estimate == pytest.approx(-0.2 / 4 / math.log(2))
    assert seed_deviation(models) == pytest.approx(0.1)
    mean = loss_over_seeds(models, level=0.9)
    assert mean.estimate == pytest.approx(base.loss() - 0.2)
    assert mean.seed_error == pytest.approx(0.1 / math.sqrt(3))
    assert mean.document_error > 0.1


def test_micro_counts_tokens_and_macro_domains():
    domain = [0, 0, 1, 1]
    tokens, level = np.array([10, 10, 90, 90]), np.array([2.0, 2.0, 4.0, 4.0])
    losses = make_losses(level, tokens, domain, 3)
    assert loss_over_seeds([losses]).estimate == pytest.approx(3.8)
    assert loss_over_seeds([losses], average="macro").estimate == pytest.approx(3.0)
    assert loss_over_seeds([losses], "bpb", average="macro").estimate == pytest.approx(3 / 4 / math.log(2))
    assert loss_over_seeds([losses], domain=1).estimate == pytest.approx(4.0)
    assert loss_over_seeds([losses], domain=1).documents == 2
    other = make_losses(level + np.array([0, 0, 1, 1]), tokens, domain, 3)
    assert seed_deviation([losses, other], average="macro") == pytest.approx(0.5 / math.sqrt(2))
    assert seed_deviation([losses, other], domain=1) == pytest.approx(1 / math.sqrt(2))


def test_domains_of_a_macro_average_are_resampled_apart():
    """Equally large domains drawn by the same random numbers would look dependent and widen the interval."""
    rng = np.random.default_rng(3)
    tokens, noise = np.full(200, 50), rng.normal(0, 0.5, 100)
    losses = make_losses(3 + np.concatenate([noise, noise]), tokens, np.arange(200) // 100, 2)
    got = loss_over_seeds([losses], average="macro")
    assert got.document_error == pytest.approx(noise.std() / math.sqrt(200), rel=0.1)


def difference(estimate, low, high, minimum_effect=0.0, seeds=3, metric="loss"):
    return SeedDifference(
        estimate, low, high, 40, 0.95, (estimate,) * seeds, 0.01, 0.01, metric, minimum_effect
    )


@pytest.mark.parametrize(
    ("args", "verdict", "words"),
    [
        ((-0.05, -0.08, -0.02, 0.04), "better", "-0.0500 [-0.0800, -0.0200] nats a token"),
        ((0.05, 0.02, 0.08, 0.04), "worse", "(40 documents, 3 seeds): worse"),
        ((-0.05, -0.08, -0.02, 0.06), "not distinguishable", "significant but below the minimum effect of 0.0600"),
        ((-0.05, -0.11, 0.01, 0.0), "not distinguishable", "3 seeds): not distinguishable"),
        ((-4e-4, -5e-4, -3e-4, 0.0), "not distinguishable", "below the minimum effect of 0.0005"),
        ((-0.05, math.nan, math.nan, 0.0), "not distinguishable", "fewer than two documents"),
    ],
)  # fmt: skip
def test_verdict_needs_the_interval_and_the_minimum_effect(args, verdict, words):
    assert difference(*args).verdict == verdict
    assert words in difference(*args).words
    assert ("significant" in difference(*args).words) == ("below" in words)


def test_the_minimum_effect_is_twice_the_seed_deviation_of_the_baseline():
    tokens = np.full(50, 100)
    level = np.random.default_rng(2).normal(3, 0.5, 50)
    baselines = [make_losses(level + shift, tokens) for shift in (-0.1, 0.0, 0.1)]
    models = [make_losses(level + shift - 0.15, tokens) for shift in (-0.1, 0.0, 0.1)]
    got = difference_over_seeds(models, baselines)
    assert got.minimum_effect == pytest.approx(0.2)
    assert got.significant
    assert got.verdict == "not distinguishable"
    assert difference_over_seeds(models, baselines, minimum_effect=0.1).verdict == "better"
    assert difference_over_seeds(models[:1], baselines[:1]).minimum_effect == 0
    assert difference_over_seeds(models, [baselines[0]] * 3).minimum_effect == 0


def test_a_domain_of_one_document_gives_no_interval():
    losses = make_losses([3.0, 4.0, 5.0], [10, 10, 10], [0, 0, 1], 2)
    for options in ({"domain": 1}, {"average": "macro"}):
        got = loss_over_seeds([losses, losses], **options)
        assert math.isnan(got.low)
        assert not math.isnan(got.estimate)
        assert "fewer than two documents" in got.basis


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, b: difference_over_seeds([a, a], [a]), "cannot be paired"),
        (lambda a, b: difference_over_seeds([a], [b]), "same documents"),
        (lambda a, b: loss_over_seeds([a, b]), "same documents"),
        (lambda a, b: loss_over_seeds([]), "at least one seed"),
        (lambda a, b: loss_over_seeds([a], "perplexity"), "loss or bpb"),
        (lambda a, b: loss_over_seeds([a], average="mean"), "micro or macro"),
        (lambda a, b: seed_deviation([a], domain=0, average="macro"), "no domain"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_losses([1.0, 2.0], [3, 4]), make_losses([1.0, 2.0], [3, 5]))
