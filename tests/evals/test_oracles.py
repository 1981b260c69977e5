"""Oracles of hand-made losses, and weights a domain where each domain has its own best expert."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nano_think.evals.losses import DocumentLosses, evaluate_models
from nano_think.evals.oracles import (
    best_per_document,
    choose_per_domain,
    expert_per_domain,
    static_per_domain,
)
from nano_think.evals.pools import ExpertOutputs, SharedForward, expert_outputs
from nano_think.experts.transformer import TransformerExpert
from nano_think.model import NanoThink
from nano_think.ops.layout import Layout
from nano_think.ops.pooling import pool_nll


def make(nll, domain=(0, 0, 1, 1), num_domains=3, tokens=10):
    size = len(nll)
    return DocumentLosses(
        np.arange(size),
        np.asarray(domain),
        np.asarray(nll, dtype=float),
        np.full(size, tokens),
        np.full(size, 40),
        num_domains,
    )


TEST = {"a": make([10, 40, 30, 20]), "b": make([30, 10, 20, 40]), "c": make([35, 35, 35, 15])}


def test_best_expert_of_every_document():
    best = best_per_document(TEST)
    assert best.sum_nll.tolist() == [10, 10, 20, 15]
    assert best.domain.tolist() == [0, 0, 1, 1]
    assert best.loss() == pytest.approx(55 / 40)


def test_a_domains_expert_is_chosen_on_one_text_and_applied_to_another():
    validation = {"a": make([9, 9, 30, 30]), "b": make([20, 20, 30, 31]), "c": make([30, 30, 9, 9])}
    choice = choose_per_domain(validation)
    # domain 2 has no document: the best over all is a with 78, beside 101 of b; c has 78 too and comes later
    assert choice == ["a", "c", "a"]
    assert expert_per_domain(TEST, choice).sum_nll.tolist() == [10, 40, 35, 15]
    in_sample = expert_per_domain(TEST, choose_per_domain(TEST))
    assert choose_per_domain(TEST) == ["b", "a", "a"]
    assert in_sample.sum_nll.tolist() == [30, 10, 30, 20]
    assert in_sample.loss() < expert_per_domain(TEST, choice).loss()


def test_oracles_are_ordered():
    document, domain = best_per_document(TEST), expert_per_domain(TEST, choose_per_domain(TEST))
    assert document.loss() == pytest.approx(55 / 40)
    assert domain.loss() == pytest.approx(90 / 40)
    assert document.loss() <= domain.loss() <= min(losses.loss() for losses in TEST.values())


def test_other_documents_are_refused():
    other = {"a": make([1, 2, 3, 4]), "b": make([1, 2, 3, 4], tokens=11)}
    for call in (best_per_document, choose_per_domain):
        with pytest.raises(ValueError, match="b was not scored on the same"):
            call(other)


NAMES, D, VOCAB, LENGTH = ("a", "b"), 12, 19, 8


@pytest.fixture(params=["hidden", "prob"])
def model(request, randomise):
    expert = partial(TransformerExpert, num_layers=1, num_heads=2, ffn_dim=20)
    made = randomise(NanoThink(dict.fromkeys(NAMES, expert), VOCAB, D, fusion=request.param)).eval()
    with torch.no_grad():
        made.expert_gain.copy_(torch.tensor([1.3, 0.7]))
    return made


def batches(count=3):
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        tokens = torch.randint(VOCAB, (4, LENGTH), generator=generator)
        labels = torch.randint(VOCAB, tokens.shape, generator=generator)
        labels[:, -1] = -100
        made.append(
            {
                "tokens": tokens,
                "labels": labels,
                "positions": torch.arange(LENGTH).expand(4, -1),
                "segments": torch.zeros(4, LENGTH, dtype=torch.long),
                "doc_uid": (torch.arange(4) + 4 * number).unsqueeze(1).expand(-1, LENGTH),
                "domain": torch.tensor([0, 1, 1, 0]),
            }
        )
    return made


def test_oracle_a_token_and_experts_share_one_pass(model):
    shared, some = SharedForward(model), batches()
    losses = evaluate_models(
        {"a": shared.expert("a"), "b": shared.expert("b"), "token": shared.best_expert()},
        some,
        np.ones(VOCAB),
        2,
    )
    with torch.no_grad():
        by_hand = []
        for batch in some:
            layout = Layout(batch["positions"], batch["segments"])
            alone = [
                model.token_nll(batch["tokens"], batch["labels"], layout, weights=torch.tensor(one))
                for one in ([1.0, 0.0], [0.0, 1.0])
            ]
            torch.testing.assert_close(shared.expert_nll(batch), torch.stack(alone, -1), atol=1e-6, rtol=1e-6)
            by_hand.append(torch.minimum(*alone).sum(1))
    assert losses["token"].sum_nll == pytest.approx(torch.cat(by_hand).numpy(), rel=1e-5)
    document = best_per_document({name: losses[name] for name in NAMES})
    assert (losses["token"].sum_nll <= document.sum_nll).all()
    assert losses["token"].loss() < document.loss() - 0.1


def test_outputs_are_those_that_the_pool_reads(model):
    some = batches()
    outputs = expert_outputs(model, some, num_tokens=70)
    assert len(outputs.labels) == 70
    assert outputs.doc_uid[:14].tolist() == [0] * 7 + [1] * 7
    assert outputs.domain[:14].tolist() == [0] * 7 + [1] * 7
    weights = torch.tensor([0.3, 0.7])
    logits = torch.stack([F.linear(h, outputs.heads) for h in outputs.hidden.values()], dim=1)
    got = pool_nll(logits, weights, outputs.labels, "prob" if model.fusion == "prob" else "hidden")
    shared = SharedForward(model)
    want = torch.cat([shared.pooled(weights)(b)[b["labels"] >= 0] for b in some])[:70]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_weights_a_domain_reach_every_row_of_it(model):
    shared, some = SharedForward(model), batches(1)[0]
    table = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    got = shared.pooled_by_domain(table)(some)
    for domain, weights in enumerate(table):
        rows = some["domain"] == domain
        torch.testing.assert_close(got[rows], shared.pooled(weights)(some)[rows])


@pytest.mark.parametrize("space", ["hidden", "prob"])
def test_static_weights_a_domain_find_the_expert_that_knows_it(space):
    """Expert a knows the labels of domain 0 and b those of domain 1; together half of the weight is right."""
    generator = torch.Generator().manual_seed(0)
    head, labels = torch.eye(VOCAB), torch.randint(VOCAB, (400,), generator=generator)
    domain = torch.arange(400) % 2
    noise = torch.randn(2, 400, VOCAB, generator=generator)
    right = 4 * F.one_hot(labels, VOCAB)
    hidden = {name: noise[i] + right * (domain == i).unsqueeze(1) for i, name in enumerate(NAMES)}
    outputs = ExpertOutputs(hidden, head, labels, domain, torch.arange(400))
    weights = static_per_domain(outputs, 3, space)
    assert weights[0, 0] > 0.9
    assert weights[1, 1] > 0.9
    # a domain without text gets what suits all of it
    assert weights[2].tolist() == pytest.approx([0.5, 0.5], abs=0.1)
    logits = torch.stack(list(hidden.values()), dim=1)
    own = pool_nll(logits, weights[domain].float(), labels, space).mean()
    assert own < pool_nll(logits, weights[2].float(), labels, space).mean() - 0.1
