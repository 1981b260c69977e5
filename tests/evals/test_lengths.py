"""Planted models: one reads its position, one fails beyond its training length, one does not care."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from nano_think.evals.lengths import length_curve
from nano_think.experts.state_space import StateSpaceExpert
from nano_think.experts.transformer import TransformerExpert
from nano_think.model import ExpertLM

LENGTHS = (8, 16, 32)


def make_batch():
    """A document of 32 tokens; one of 20 and one of 8; one of 12 and pads."""
    segments = torch.tensor([[0] * 32, [0] * 20 + [1] * 8 + [-1] * 4, [0] * 12 + [-1] * 20])
    positions = torch.tensor([[*range(32)], [*range(20), *range(8), 0, 0, 0, 0], [*range(12), *[0] * 20]])
    uid = torch.tensor([[1] * 32, [2] * 20 + [3] * 8 + [-1] * 4, [4] * 12 + [-1] * 20])
    tokens = torch.randint(0, 29, segments.shape, generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1, dims=1).masked_fill(segments < 0, -100)
    labels[:, -1] = labels[1, 19] = labels[1, 27] = labels[2, 11] = -100
    return {
        "tokens": tokens,
        "labels": labels,
        "positions": positions,
        "segments": segments,
        "doc_uid": uid,
        "domain": torch.zeros(3, dtype=torch.long),
    }


class OfPosition:
    """Its loss is a function of the position and of nothing else."""

    def __init__(self, loss):
        self.loss, self.shapes = loss, []

    def __call__(self, tokens, layout, with_logits):
        assert not with_logits
        self.shapes.append(tuple(tokens.shape))
        return SimpleNamespace(positions=layout.positions)

    def nll(self, output, labels):
        return self.loss(output.positions.float())


def test_planted_models():
    learns = OfPosition(lambda p: 10 - p / 4)
    breaks = OfPosition(lambda p: torch.where(p < 8, 1.0, 6.0))
    flat = OfPosition(lambda p: 2 + 0 * p)
    models = {"learns": learns, "breaks": breaks, "flat": flat}
    found = length_curve(models, [make_batch()], LENGTHS, n_resamples=50)
    json.dumps(found, allow_nan=False)
    assert (found["train_length"], found["lengths"], found["rows"]) == (8, [8, 16, 32], 3)
    # the document of 8 tokens has nothing to gain; labels at the ends of the others are masked
    assert (found["tokens"], found["documents"]) == (31 + 19 + 11, 3)
    assert set(learns.shapes) == {(12, 8), (6, 16), (3, 32)}
    short, _, whole = found["models"]["learns"]
    assert [(b["from"], b["to"]) for b in whole["buckets"]] == [
        (0, 0),
        (1, 1),
        (2, 3),
        (4, 7),
        (8, 15),
        (16, 31),
    ]
    assert [b["tokens"] for b in whole["buckets"]] == [3, 3, 6, 12, 8 + 8 + 3, 15 + 3]
    for bucket in whole["buckets"][:4]:
        assert bucket["minus_cut"]["estimate"] == 0
    # from position 16 on, the cut ones stand 16 or 24 lower
    expected = -(15 * 16 + 3 * 16 + 7 * 8) / 4 / 18
    assert whole["buckets"][-1]["minus_cut"]["estimate"] == pytest.approx(expected)
    assert whole["buckets"][-1]["minus_cut"]["documents"] == 2
    assert all(bucket["to"] < 8 for bucket in short["buckets"])
    assert short["loss"]["estimate"] > whole["loss"]["estimate"]
    broken = found["models"]["breaks"][1]["buckets"]
    assert [b["minus_cut"]["estimate"] for b in broken] == [0, 0, 0, 0, 5]
    assert {b["loss"]["estimate"] for row in found["models"]["flat"] for b in row["buckets"]} == {2}
    assert short["tokens_per_second"] == pytest.approx(1 / short["seconds_per_token"])


def test_a_cut_text_is_read_as_if_it_began_there(randomise):
    """Against separate passes over each piece, for both kinds of networks."""
    experts = {
        "transformer": partial(TransformerExpert, num_layers=1, num_heads=2, ffn_dim=20),
        "state_space": partial(StateSpaceExpert, num_layers=1, d_inner=16, d_state=4),
    }
    models = {name: randomise(ExpertLM((29, 16), expert)).eval() for name, expert in experts.items()}
    batch = make_batch()
    found = length_curve(models, [batch], LENGTHS, n_resamples=10)
    tokens, labels = batch["tokens"][:1], batch["labels"][:1]
    other = batch["tokens"][1:2, :20], batch["labels"][1:2, :20]
    third = batch["tokens"][2:, :12], batch["labels"][2:, :12]
    for name, model in models.items():
        for row in found["models"][name]:
            total = 0.0
            for text, wanted in ((tokens, labels), other, third):
                pieces = zip(text.split(row["length"], 1), wanted.split(row["length"], 1), strict=True)
                with torch.no_grad():
                    total += sum(float(model.token_nll(*piece).sum()) for piece in pieces)
            assert row["loss"]["estimate"] == pytest.approx(total / 61, abs=1e-4)


def test_sampling_keeps_whole_documents():
    found = length_curve({"flat": OfPosition(lambda p: p)}, [make_batch()], LENGTHS, max_tokens=5, seed=2)
    assert found["documents"] == 1
    assert found["rows"] == 1
    assert found["tokens"] in (31, 19, 11)


def test_what_cannot_be_measured_is_refused():
    models = {"flat": OfPosition(lambda p: p)}
    with pytest.raises(ValueError, match="divide"):
        length_curve(models, [make_batch()], (8, 12, 32))
    with pytest.raises(ValueError, match="32 positions"):
        length_curve(models, [make_batch()], (8, 64))
    with pytest.raises(ValueError, match="longer than 32"):
        length_curve(models, [make_batch()], (32,))
