import math

import numpy as np
import pytest
from scipy import stats

from nano_think.evals import bootstrap as module
from nano_think.evals.bootstrap import (
    Difference,
    Interval,
    PermutationTest,
    bootstrap,
    domain_sums,
    paired_difference,
    permutation_test,
    resample,
    t_quantile,
)
from nano_think.evals.losses import DocumentLosses


def make_losses(nll, tokens, domain=None, num_domains=1):
    documents = len(nll)
    return DocumentLosses(
        uid=np.arange(documents),
        domain=np.zeros(documents, dtype=np.int64) if domain is None else np.asarray(domain),
        sum_nll=np.asarray(nll, dtype=float),
        num_tokens=np.asarray(tokens),
        num_bytes=np.asarray(tokens) * 4,
        num_domains=num_domains,
    )


def random_losses(rng, documents, mean=3.0, spread=0.5):
    tokens = rng.integers(20, 200, documents)
    return make_losses(tokens * rng.normal(mean, spread, documents), tokens)


def test_agrees_with_scipy():
    losses = random_losses(np.random.default_rng(0), 150)
    interval = bootstrap(losses, n_resamples=4000, seed=1)
    reference = stats.bootstrap(
        (losses.sum_nll, losses.num_tokens),
        lambda nll, tokens, axis: nll.sum(axis) / tokens.sum(axis),
        paired=True,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert interval.estimate == losses.loss()
    width = reference.high - reference.low
    assert interval.low == pytest.approx(reference.low, abs=0.06 * width)
    assert interval.high == pytest.approx(reference.high, abs=0.06 * width)
    assert interval.documents == 150


def test_coverage_is_about_nominal():
    """95% intervals over documents hold the true ratio in 95% of 400 data sets (binomial sd 1.1%)."""
    rng = np.random.default_rng(3)
    hits = 0
    for seed in range(400):
        interval = bootstrap(random_losses(rng, 80), n_resamples=400, seed=seed)
        hits += interval.low <= 3.0 <= interval.high
    assert 0.91 <= hits / 400 <= 0.985


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
def test_t_quantiles_are_those_of_scipy(level):
    for df in [*range(1, 12), 30, 31, 199, 200, 201, 1000, 10**6]:
        assert t_quantile(level, df) == pytest.approx(stats.t.ppf((1 + level) / 2, df), rel=1e-6), df


def test_ten_documents_get_the_wider_percentiles_they_need(monkeypatch):
    """Of ten equally long documents the exact interval is Student's; plain percentiles cover 5% less."""
    tokens = np.full(10, 50)
    data_sets = np.random.default_rng(11).normal(3, 0.5, (500, 10))

    def coverage():
        intervals = [
            bootstrap(make_losses(tokens * level, tokens), n_resamples=400, seed=seed)
            for seed, level in enumerate(data_sets)
        ]
        return np.mean([interval.low <= 3 <= interval.high for interval in intervals])

    exact = np.mean(stats.ttest_1samp(data_sets, 3, axis=1).pvalue > 0.05)
    assert coverage() == pytest.approx(exact, abs=0.02)
    monkeypatch.setattr(module, "t_quantile", lambda level, df: 1.96 * math.sqrt(0.9))
    assert coverage() < exact - 0.03


def test_documents_are_resampled_not_tokens():
    """Losses that agree inside a document leave few independent values, so the interval is wide."""
    rng = np.random.default_rng(4)
    tokens = np.full(20, 1000)
    level = rng.normal(3, 1, 20)
    interval = bootstrap(make_losses(tokens * level, tokens))
    expected = 2 * 1.96 * level.std() / math.sqrt(20)
    assert interval.high - interval.low == pytest.approx(expected, rel=0.15)


def test_seed_decides_and_chunks_do_not_matter(monkeypatch):
    losses = random_losses(np.random.default_rng(5), 60)
    first = bootstrap(losses, seed=7)
    assert first == bootstrap(losses, seed=7)
    assert first != bootstrap(losses, seed=8)
    monkeypatch.setattr(module, "_CHUNK_CELLS", 60 * 7)
    assert bootstrap(losses, seed=7).low == pytest.approx(first.low, rel=1e-12)


def test_perplexity_and_bpb_follow_from_loss():
    losses = random_losses(np.random.default_rng(6), 60)
    loss, perplexity, bpb = (bootstrap(losses, metric) for metric in ("loss", "perplexity", "bpb"))
    assert perplexity.low == pytest.approx(math.exp(loss.low))
    assert perplexity.high == pytest.approx(math.exp(loss.high))
    assert perplexity.estimate == losses.perplexity()
    # four bytes a token everywhere, so bits per byte are a fixed multiple
    assert bpb.low == pytest.approx(loss.low / 4 / math.log(2))


def test_one_domain_only_and_too_few_documents():
    losses = make_losses([30, 50, 90], [10, 10, 30], domain=[0, 0, 1], num_domains=3)
    assert bootstrap(losses, domain=0).estimate == 4
    assert bootstrap(losses, domain=0).low == 3
    single = bootstrap(losses, domain=1)
    assert (single.estimate, single.documents) == (3, 1)
    assert math.isnan(single.low)
    assert math.isnan(bootstrap(losses, domain=2).estimate)
    assert paired_difference(losses, losses, domain=1).verdict == "not distinguishable"


def test_pairing_removes_what_documents_share():
    rng = np.random.default_rng(7)
    baseline = random_losses(rng, 200, spread=1.0)
    gain = baseline.num_tokens * rng.normal(0.05, 0.02, 200)
    model = make_losses(baseline.sum_nll - gain, baseline.num_tokens)
    difference = paired_difference(model, baseline)
    assert difference.verdict == "better"
    assert paired_difference(baseline, model).verdict == "worse"
    assert difference.estimate == pytest.approx(model.loss() - baseline.loss())
    unpaired = bootstrap(model)
    assert difference.high - difference.low < (unpaired.high - unpaired.low) / 10
    hair = make_losses(baseline.sum_nll - 1e-4 * baseline.num_tokens, baseline.num_tokens)
    assert paired_difference(hair, baseline).high < 0  # beyond doubt, and nothing
    assert paired_difference(hair, baseline).verdict == "not distinguishable"
    noise = make_losses(baseline.sum_nll + rng.normal(0, 3, 200), baseline.num_tokens)
    assert paired_difference(noise, baseline).verdict == "not distinguishable"


def test_equal_models_are_claimed_different_in_about_five_percent():
    rng = np.random.default_rng(8)
    claims = 0
    for seed in range(300):
        baseline = random_losses(rng, 80)
        model = make_losses(baseline.sum_nll + rng.normal(0, 20, 80), baseline.num_tokens)
        difference = paired_difference(model, baseline, n_resamples=400, seed=seed)
        claims += difference.verdict != "not distinguishable"
    assert claims / 300 < 0.1


def test_pairing_needs_the_same_tokens():
    losses = make_losses([1, 2], [3, 4])
    with pytest.raises(ValueError, match="same documents"):
        paired_difference(losses, make_losses([1, 2], [3, 5]))
    with pytest.raises(ValueError, match="Compare loss or bpb"):
        paired_difference(losses, losses, "perplexity")


def test_interval_as_text():
    assert format(Interval(1.234, 1.1, 1.35, 9), ".2f") == "1.23 [1.10, 1.35]"
    assert format(Difference(1.234, math.nan, math.nan, 1), ".1f") == "1.2"


def test_resample_draws_every_document_once_on_average():
    sums = resample(np.eye(5), lambda totals: totals.sum(1), n_resamples=50)
    assert (sums == 5).all()
    first = resample(np.eye(5), lambda totals: totals[:, 0], n_resamples=5000)
    assert first.mean() == pytest.approx(1, abs=0.06)
    assert first.var() == pytest.approx(0.8, abs=0.08)


def weighted_documents(seed, effect):
    """Documents whose mean weight of expert 0 is 0.5 +- effect by domain, with noise per document."""
    rng = np.random.default_rng(seed)
    domain = rng.integers(0, 2, 60)
    weight = np.clip(0.5 + effect * (2 * domain - 1) + rng.normal(0, 0.1, 60), 0.01, 0.99)
    tokens = rng.integers(20, 200, 60)
    return np.stack([weight, 1 - weight], 1) * tokens[:, None], tokens, domain


def test_permutation_test_finds_specialisation_and_holds_its_level():
    found = permutation_test(*weighted_documents(0, 0.2), 2)
    assert found.p_value == 1 / 201
    assert len(found.null) == 200
    assert found.observed > 10 * np.median(found.null)
    p_values = [permutation_test(*weighted_documents(s, 0), 2, seed=s).p_value for s in range(200)]
    assert 0.01 <= np.mean(np.array(p_values) < 0.05) <= 0.1
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.08)


def test_permutation_test_finds_a_small_effect_in_most_cases():
    """Half the noise between documents (0.05 beside 0.1) in 60 documents: power above 80%, size as above."""
    p_values = [permutation_test(*weighted_documents(s, 0.05), 2, seed=s).p_value for s in range(100)]
    assert np.mean(np.array(p_values) < 0.05) >= 0.8


def test_p_value_counts_the_observed_value_itself():
    assert PermutationTest(1.0, np.array([0.5, 1.0, 2.0])).p_value == 0.75


def test_domain_sums_by_hand():
    values = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert domain_sums(values, np.array([1, 0, 1]), 3).tolist() == [[3, 4], [6, 8], [0, 0]]
