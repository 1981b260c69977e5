"""Calibration of models whose reliability is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nano_think.evals.calibration import calibration, calibration_of, model_log_probs
from nano_think.experts.transformer import TransformerExpert
from nano_think.mla import MultiHeadLatentAttention
from nano_think.model import ExpertLM, NanoThink
from nano_think.ops.layout import Layout
from nano_think.retrieval import MemorySlots

D, VOCAB, LENGTH = 16, 11, 12


def drawn(tokens, seed=0, shift=0.0):
    """Confidences over 0.2 to 0.9 and answers that are right with that probability less `shift`."""
    rng = np.random.default_rng(seed)
    sure = rng.uniform(0.2, 0.9, tokens)
    return sure, rng.uniform(size=tokens) < sure - shift


def test_by_hand():
    sure = np.array([0.9, 0.1, 0.3, 0.7, 0.2, 0.8])
    right = np.array([True, False, True, True, False, False])
    got = calibration_of(sure, right, bins=3)
    assert [b.tokens for b in got.bins] == [2, 2, 2]
    assert [b.confidence for b in got.bins] == pytest.approx([0.15, 0.5, 0.85])
    assert [b.accuracy for b in got.bins] == [0, 1, 0.5]
    assert got.error == pytest.approx((0.15 + 0.5 + 0.35) / 3)
    assert (got.confidence, got.accuracy, got.tokens) == (pytest.approx(0.5), 0.5, 6)
    spread = [0.1 * 0.9 + 0.2 * 0.8, 0.3 * 0.7 * 2, 0.8 * 0.2 + 0.9 * 0.1]
    assert got.chance == pytest.approx(sum(math.sqrt(2 / math.pi * s) for s in spread) / 6)


def test_a_calibrated_model_errs_as_chance_says_and_a_shifted_one_by_its_shift():
    errors = [calibration_of(*drawn(3000, seed)).error for seed in range(100)]
    chance = calibration_of(*drawn(3000)).chance
    assert np.mean(errors) == pytest.approx(chance, rel=0.1)
    assert calibration_of(*drawn(200_000)).error < 0.004
    shifted = calibration_of(*drawn(50_000, shift=0.1))
    assert shifted.error == pytest.approx(0.1, abs=0.01)
    assert shifted.confidence - shifted.accuracy == pytest.approx(0.1, abs=0.01)
    # modest below and bold above: the mean hides it, the bins do not
    sure, right = drawn(50_000)
    bent = calibration_of(0.55 + 1.25 * (sure - 0.55), right)
    assert bent.error > 0.03
    assert abs(bent.confidence - bent.accuracy) < 0.01


def test_bins_hold_equally_many_tokens_and_few_tokens_make_few_bins():
    skewed = np.random.default_rng(0).beta(1, 20, 1003)
    counts = [b.tokens for b in calibration_of(skewed, skewed < 0, bins=10).bins]
    assert sum(counts) == 1003
    assert max(counts) - min(counts) <= 1
    assert len(calibration_of(skewed[:3], skewed[:3] < 0).bins) == 3
    with pytest.raises(ValueError, match="no scored token"):
        calibration_of(np.zeros(0), np.zeros(0, dtype=bool))


def batch(seed=0, rows=5):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (rows, LENGTH), generator=generator)
    labels = torch.randint(VOCAB, tokens.shape, generator=generator)
    labels[:, [3, 11]] = -100
    positions = torch.tensor([*range(4), *range(8)]).expand(rows, -1)
    return {
        "tokens": tokens,
        "labels": labels,
        "positions": positions,
        "segments": (torch.arange(LENGTH) >= 4).long().expand(rows, -1),
        "domain": torch.zeros(rows, dtype=torch.long),
    }


def test_pieces_of_batches_add_up_to_the_whole():
    batches = [batch(0), batch(1, rows=2), batch(2) | {"labels": torch.full((5, LENGTH), -100)}]
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(VOCAB, VOCAB, generator=generator).log_softmax(-1)
    seen = []

    def log_probs(part):
        seen.append(len(part["tokens"]))
        assert len(part["domain"]) == seen[-1]
        return table[part["tokens"]]

    got = calibration(log_probs, batches, bins=4, rows=2)
    assert seen == [2, 2, 1, 2]
    tokens = torch.cat([b["tokens"].flatten() for b in batches[:2]])
    labels = torch.cat([b["labels"].flatten() for b in batches[:2]])
    kept = labels >= 0
    top, guess = table[tokens[kept]].max(-1)
    whole = calibration_of(top.exp().numpy(), (guess == labels[kept]).numpy(), 4)
    assert got == whole
    with pytest.raises(ValueError, match="no scored token"):
        calibration(log_probs, batches[2:])


def slots(some):
    rows = len(some["tokens"])
    index = torch.where(some["positions"] >= 2, 0, -1)
    return MemorySlots(torch.ones(rows, 1, 3, D), torch.ones(rows, 1, 3, dtype=torch.bool), index)


@pytest.mark.parametrize("kind", ["expert", "hidden", "prob", "memory"])
def test_log_probs_of_models_are_normalised_and_those_of_their_losses(kind, randomise):
    expert = TransformerExpert(D, num_layers=1, num_heads=2, ffn_dim=20)
    if kind == "expert":
        model, memory = ExpertLM((VOCAB, D), expert), None
    else:
        mla = MultiHeadLatentAttention(D, num_heads=2, memory=True)
        other = TransformerExpert(D, num_layers=1, num_heads=2, ffn_dim=20)
        fusion = "prob" if kind == "prob" else "hidden"
        model = NanoThink({"a": expert, "b": other}, VOCAB, D, mla=mla, fusion=fusion)
        memory = slots if kind == "memory" else None
    model, some = randomise(model).eval(), batch()
    with torch.no_grad():
        log_p = model_log_probs(model, memory)(some)
        extra = (memory(some),) if memory else ()
        nll = model.token_nll(
            some["tokens"], some["labels"], Layout(some["positions"], some["segments"]), *extra
        )
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(5, LENGTH))
    at_label = -log_p.gather(-1, some["labels"].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(at_label.masked_fill(some["labels"] < 0, 0), nll, atol=1e-5, rtol=1e-5)
    assert calibration(model_log_probs(model, memory), [some]).tokens == 50
