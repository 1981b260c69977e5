import numpy as np
import pytest
import torch

from nano_think.evals.losses import DocumentLosses
from nano_think.evals.routing import DocumentWeights, analyse_routing, document_weights, knockout_matrix
from nano_think.metrics.routing import RoutingStats


def make_batches(count=5):
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        domain = torch.randint(0, 2, (4,), generator=generator)
        uid = (domain[:, None] + 2 * torch.randint(0, 9, (4, 2), generator=generator)).repeat_interleave(5, 1)
        labels = torch.randint(-2, 30, uid.shape, generator=generator)
        weights = torch.randn(*uid.shape, 3, generator=generator).softmax(-1)
        batches.append({"labels": labels, "doc_uid": uid, "domain": domain, "weights": weights})
    return batches


def test_document_weights_agree_with_the_metric_and_with_loops():
    batches = make_batches()
    result = document_weights(lambda batch: batch["weights"], batches, 3)
    stats = RoutingStats(["T", "D", "S"], ["a", "b", "c"])
    for batch in batches:
        shape = batch["labels"].shape
        stats.update(
            batch["weights"], batch["domain"], torch.zeros(shape, dtype=torch.long), batch["labels"] >= 0
        )
    assert np.allclose(result.domain_table(), stats.domain_table().numpy(), equal_nan=True)
    information = analyse_routing(result, permutations=10, n_resamples=10).information.estimate
    assert information == pytest.approx(float(stats.compute()["routing/mi_domain"]))
    uid = result.uid[3]
    chosen = [b["weights"][(b["doc_uid"] == uid) & (b["labels"] >= 0)] for b in batches]
    assert result.mean()[3] == pytest.approx(torch.cat(chosen).double().mean(0).numpy())
    assert result.num_tokens[3] == len(torch.cat(chosen))


def specialists(documents, effect, seed=0):
    rng = np.random.default_rng(seed)
    domain = np.arange(documents) % 2
    weight = 0.5 + effect * (2 * domain - 1) + rng.uniform(-0.05, 0.05, documents)
    tokens = rng.integers(50, 150, documents)
    weights = np.stack([weight, 1 - weight], axis=1) * tokens[:, None]
    return DocumentWeights(np.arange(documents), domain, weights, tokens, 2)


def test_analysis_tells_specialists_from_chance():
    analysis = analyse_routing(specialists(80, 0.3))
    assert analysis.specialised
    assert analysis.domain_table == pytest.approx(np.array([[0.2, 0.8], [0.8, 0.2]]), abs=0.02)
    # I = ln 2 - H(0.2, 0.8) for equally frequent domains
    expected = np.log(2) + 0.2 * np.log(0.2) + 0.8 * np.log(0.8)
    assert analysis.information.estimate == pytest.approx(expected, abs=0.02)
    assert analysis.information.low < analysis.information.estimate < analysis.information.high
    assert analysis.mean.sum() == pytest.approx(1)
    assert not analyse_routing(specialists(80, 0.0, seed=1)).specialised


def test_interval_of_the_information_has_the_width_of_repeated_sampling():
    estimates = [
        analyse_routing(specialists(60, 0.2, seed=s), permutations=1, n_resamples=1).information.estimate
        for s in range(300)
    ]
    interval = analyse_routing(specialists(60, 0.2, seed=301)).information
    repeated = np.quantile(estimates, 0.975) - np.quantile(estimates, 0.025)
    assert interval.high - interval.low == pytest.approx(repeated, rel=0.5)


def make_losses(nll):
    domain = np.array([0, 0, 0, 2, 2, 2])
    return DocumentLosses(np.arange(6), domain, np.asarray(nll, float), np.full(6, 10), np.full(6, 40), 3)


def test_knockout_matrix_by_hand():
    full = make_losses([10, 20, 30, 40, 50, 60])
    without_t = make_losses([20, 30, 40, 40, 50, 60])
    without_s = make_losses([9, 19, 29, 45, 55, 65])
    matrix = knockout_matrix(full, {"T": without_t, "S": without_s}, ["a", "b", "c"])
    assert {name: list(row) for name, row in matrix.items()} == {
        "T": ["all", "a", "c"],
        "S": ["all", "a", "c"],
    }
    assert matrix["T"]["a"].estimate == pytest.approx(1)
    assert matrix["T"]["c"].estimate == 0
    assert matrix["T"]["all"].estimate == pytest.approx(0.5)
    assert matrix["S"]["a"].verdict == "better"
    assert matrix["S"]["c"].verdict == "worse"
    assert matrix["T"]["c"].verdict == "not distinguishable"


def test_no_scored_token_is_refused():
    batch = make_batches(1)[0]
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with pytest.raises(ValueError, match="no scored token"):
        document_weights(lambda b: b["weights"], [batch], 2)
