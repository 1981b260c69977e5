"""Correlation of losses against the closed form, numpy, and documents by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nano_think.evals.correlation import document_correlation, token_correlation
from nano_think.evals.losses import DocumentLosses


def make_batches(count=6):
    generator = torch.Generator().manual_seed(0)
    batches = []
    for number in range(count):
        labels = torch.randint(-1, 30, (3 + number, 400), generator=generator)
        shared, own = torch.randn(2, *labels.shape, generator=generator, dtype=torch.float64)
        batches.append({"labels": labels, "shared": shared, "own": own})
    batches[-1]["labels"].fill_(-100)
    return batches


# a large common level, which sums of squares in one go would drown in
MODELS = {
    "a": lambda b: 1e6 + b["shared"],
    "b": lambda b: 1e6 + 0.6 * b["shared"] + 0.8 * b["own"],
    "c": lambda b: 5 - 2 * b["shared"],
}


def test_tokens_against_the_closed_form_and_numpy():
    batches = make_batches()
    got = token_correlation(MODELS, batches)
    scored = np.stack(
        [torch.cat([model(b)[b["labels"] >= 0] for b in batches]).numpy() for model in MODELS.values()]
    )
    assert got.names == ("a", "b", "c")
    assert got.count == scored.shape[1]
    np.testing.assert_allclose(got.matrix, np.corrcoef(scored), atol=1e-8)
    np.testing.assert_allclose(got.deviation, scored.std(1), rtol=1e-8)
    np.testing.assert_allclose(got.mean, scored.mean(1))
    # corr(s, 0.6 s + 0.8 o) = 0.6 up to sampling
    np.testing.assert_allclose(got.matrix, [[1, 0.6, -1], [0.6, 1, -0.6], [-1, -0.6, 1]], atol=0.03)


def test_a_loss_that_does_not_vary_has_no_correlation():
    got = token_correlation({"a": MODELS["a"], "flat": lambda b: torch.ones_like(b["own"])}, make_batches(2))
    assert got.matrix[0, 0] == pytest.approx(1)
    assert math.isnan(got.matrix[0, 1])
    empty = make_batches(1)
    with pytest.raises(ValueError, match="no scored token"):
        token_correlation(MODELS, empty)


def documents(per_token, tokens):
    tokens = np.asarray(tokens)
    zeros = np.zeros(len(tokens), dtype=np.int64)
    return DocumentLosses(np.arange(len(tokens)), zeros, np.asarray(per_token) * tokens, tokens, tokens, 1)


def test_documents_count_by_their_tokens():
    """A document of two tokens is two equal documents of one."""
    a, b, tokens = [1.0, 2.0, 4.0], [3.0, 1.0, 2.0], [1, 2, 1]
    got = document_correlation({"a": documents(a, tokens), "b": documents(b, tokens)})
    repeated = np.corrcoef(np.repeat(a, tokens), np.repeat(b, tokens))
    np.testing.assert_allclose(got.matrix, repeated)
    assert got.count == 3
    with pytest.raises(ValueError, match="b was not scored on the same"):
        document_correlation({"a": documents(a, tokens), "b": documents(b, [1, 2, 2])})
