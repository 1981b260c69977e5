"""Experts whose next token is known: drafts, their acceptance and gaps can be written down."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nano_think.evals.drafting import (
    block_drafts,
    continue_greedily,
    decode_greedily,
    excerpts,
    fill_between,
    greedy_after,
    infilling,
    trivial_drafters,
)
from nano_think.experts.diffuser import DiffuserExpert
from nano_think.experts.transformer import TransformerExpert
from nano_think.model import ExpertLM

VOCAB = 12


class Counter(nn.Module):
    """Says that token n is followed by n + step; drafts the same, but is wrong from place `fails` on."""

    fused_steps, bidirectional = 1, False

    def __init__(self, step=1, fails=99):
        super().__init__()
        self.step, self.fails = step, fails

    def forward(self, x, layout=None):
        return x.roll(self.step, dims=-1)

    def draft(self, prompt, table, length, generator, steps):
        last = prompt[:, -1].argmax(-1, keepdim=True)
        drafted = (last + self.step * torch.arange(1, length + 1)) % VOCAB
        drafted[:, self.fails :] += 1
        return drafted % VOCAB

    def init_state(self, batch, max_len, max_rollback=0):
        return None

    def extend(self, x, state):
        return self(x)


def one_hot_lm(expert):
    model = ExpertLM((VOCAB, VOCAB), expert)
    with torch.no_grad():
        model.embedding.weight.copy_(torch.eye(VOCAB))
    return model.eval()


def counted(rows, length):
    """Row r counts upwards from r."""
    return (torch.arange(rows)[:, None] + torch.arange(length)) % VOCAB


def test_excerpts_are_beginnings_of_long_fragments_one_a_document():
    segments = torch.tensor([[0] * 6 + [1] * 4, [0] * 10, [0] * 8 + [-1] * 2])
    uid = torch.tensor([[5] * 6 + [6] * 4, [6] * 10, [7] * 8 + [-1] * 2])
    tokens = torch.arange(30).reshape(3, 10)
    texts, documents = excerpts([{"tokens": tokens, "segments": segments, "doc_uid": uid}], 6)
    assert documents.tolist() == [5, 6, 7]
    assert texts.tolist() == [list(range(6)), list(range(10, 16)), list(range(20, 26))]
    some, drawn = excerpts([{"tokens": tokens, "segments": segments, "doc_uid": uid}], 6, count=2, seed=1)
    assert some.shape == (2, 6)
    assert set(drawn) < {5, 6, 7}
    with pytest.raises(ValueError, match="shorter"):
        excerpts([{"tokens": tokens, "segments": segments, "doc_uid": uid}], 11)


def test_trivial_drafters():
    drafters = trivial_drafters(torch.tensor([0, 3, 9, 1]), 3)
    prompt = torch.tensor([[5, 6, 7, 5], [1, 2, 3, 4]])
    assert drafters["unigram"](prompt).tolist() == [[2, 2, 2], [2, 2, 2]]
    assert drafters["repeat last"](prompt).tolist() == [[5, 5, 5], [4, 4, 4]]
    # behind the earlier 5 stood 6, 7, 5; 4 never stood before
    assert drafters["copy"](prompt).tolist() == [[6, 7, 5], [4, 4, 4]]


def test_accepted_are_the_tokens_before_the_first_wrong_one():
    teacher, drafter = one_hot_lm(Counter()), one_hot_lm(Counter(fails=3))
    texts = counted(10, 14)
    unigram = F.one_hot(torch.tensor(9), VOCAB)
    found = block_drafts(drafter, teacher, texts, unigram, block=5, steps=(1, 4), n_resamples=50)
    json.dumps(found, allow_nan=False)
    assert (found["prompts"], found["prompt_tokens"], found["block"]) == (10, 9, 5)
    row = found["drafters"]["diffuser K=4"]
    assert row["prefix"] == [1, 1, 1, 0, 0]
    # behind its mistake it goes on counting, which the Transformer would do as well
    assert row["agreement"] == [1, 1, 1, 0, 1]
    assert row["truth"] == [1, 1, 1, 0, 0]
    assert row["accepted"]["estimate"] == 3
    assert row["network_passes"] == 8
    assert found["drafters"]["diffuser one by one"]["accepted"]["estimate"] == 5
    assert found["drafters"]["repeat last"]["accepted"]["estimate"] == 0
    # the prompt of one row ends on 8
    assert found["drafters"]["unigram"]["prefix"] == [0.1, 0, 0, 0, 0]
    assert found["transformer_seconds_per_block"] > 0


def test_gaps_are_found_from_the_left_where_counting_is_enough():
    network = one_hot_lm(Counter())
    network.expert.bidirectional = False
    texts = counted(6, 20)
    seen = []

    def fill(_, texts, start, span, steps, seed):
        seen.append((start, span, steps))
        return texts[:, start : start + span]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nano_think.evals.drafting.fill_between", fill)
        found = infilling(
            network,
            one_hot_lm(Counter(2)),
            texts,
            torch.ones(VOCAB),
            right=6,
            span=4,
            steps=(1, 3),
            n_resamples=20,
        )
    json.dumps(found, allow_nan=False)
    assert seen == [(10, 4, 1), (10, 4, 3)]
    assert (found["left"], found["span"], found["right"]) == (10, 4, 6)
    accuracy = {name: value["estimate"] for name, value in found["accuracy"].items()}
    assert accuracy["left context only, K=3"] == accuracy["both sides, untrained, K=1"] == 1
    assert accuracy["transformer one by one"] == accuracy["repeat last"] == 0
    assert "trained causally" in found["reason"]


@pytest.fixture(scope="module")
def diffuser(randomise):
    expert = partial(DiffuserExpert, num_layers=2, num_heads=2, ffn_dim=20, train_T=20, max_positions=64)
    network = randomise(ExpertLM((30, 16), expert), seed=1).eval()
    network.expert.fit_statistics(torch.randn(50, 16, generator=torch.Generator().manual_seed(2)))
    return network


def test_a_gap_is_filled_from_both_sides_and_never_from_itself(diffuser):
    texts = torch.randint(0, 30, (12, 15), generator=torch.Generator().manual_seed(3))

    def filled(changed=None, steps=4):
        some = texts.clone()
        if changed is not None:
            some[:, changed] = (some[:, changed] + 7) % 30
        with torch.no_grad():
            return fill_between(diffuser, some, 6, 4, steps, seed=0)

    assert filled().shape == (12, 4)
    assert torch.equal(filled(), filled())
    assert torch.equal(filled([6, 7, 8, 9]), filled())
    for outside in (2, 12):
        assert not torch.equal(filled([outside]), filled())
    assert diffuser.expert.bidirectional is False
    with torch.no_grad():
        left = diffuser.expert.draft(
            diffuser.embedding(texts[:, :6]),
            diffuser.embedding.weight,
            4,
            torch.Generator().manual_seed(0),
            4,
        )
    assert not torch.equal(left, filled())


def test_the_flag_comes_back_after_an_error(diffuser):
    with pytest.raises(ValueError, match="DDIM steps"):
        fill_between(diffuser, torch.zeros(1, 9, dtype=torch.long), 3, 2, 999, seed=0)
    assert diffuser.expert.bidirectional is False


def test_greedy_ways_agree(randomise):
    expert = partial(TransformerExpert, num_layers=1, num_heads=2, ffn_dim=20)
    model = randomise(ExpertLM((30, 16), expert)).eval()
    prompt = torch.randint(0, 30, (5, 7), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        continued = continue_greedily(model, prompt, 6)
        assert torch.equal(decode_greedily(model, prompt, 6), continued)
        assert torch.equal(greedy_after(model, prompt, continued), continued)
        other = (continued + 1) % 30
        assert torch.equal(greedy_after(model, prompt, other)[:, 0], continued[:, 0])
    assert len(np.unique(continued)) > 1
