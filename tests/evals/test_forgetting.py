from __future__ import annotations

import copy

import pytest
import torch

from nano_think.evals.forgetting import forgetting
from nano_think.ops.layout import Layout


@pytest.fixture
def batches(data):
    return list(data().dataloader("validation", rows=2))


def test_a_frozen_expert_has_forgotten_nothing_whatever_else_was_trained(fused, batches):
    before = fused()
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.embedding.weight.mul_(2.0)
        after.router.bias.add_(1.0)
        after.experts["state_space"].entry.adaptor.weight.mul_(-1.0)
    found = forgetting(before, after, batches)
    assert found["transformer"]["before"] == found["transformer"]["after"]
    assert found["state_space"]["before"] != found["state_space"]["after"]


@torch.no_grad()
def test_a_loss_is_that_of_the_expert_alone_over_scored_tokens(fused, batches):
    model = fused().eval()
    found = forgetting(model, model, batches)
    for name in model.experts:
        weights = torch.tensor([float(other == name) for other in model.experts])
        total, tokens = 0.0, 0
        for batch in batches:
            # the latent attention of a fresh model adds nothing: the experts read the table itself
            layout = Layout(batch["positions"], batch["segments"])
            nll = model.token_nll(batch["tokens"], batch["labels"], layout, weights=weights)
            scored = batch["labels"] >= 0
            total, tokens = total + float(nll[scored].sum()), tokens + int(scored.sum())
        assert found[name]["before"] == pytest.approx(total / tokens, abs=1e-5)
