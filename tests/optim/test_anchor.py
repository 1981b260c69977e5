from __future__ import annotations

import pytest
import torch
from torch import nn

from nano_think.optim.anchor import AnchoredDecay
from nano_think.optim.groups import adamw
from nano_think.optim.muon import muon
from nano_think.optim.schedule import cosine


@pytest.mark.parametrize("factory", [adamw, muon])
def test_without_gradient_the_distance_shrinks_by_the_closed_form(factory) -> None:
    model = nn.Embedding(5, 4)
    reference = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    start = model.weight.detach().clone()
    optimizer = factory(model, lr=0.2, weight_decay=0.3)
    AnchoredDecay(model.weight, reference, coefficient=0.5).attach(optimizer)
    for _ in range(6):
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
    expected = reference + (start - reference) * (1 - 0.2 * 0.5) ** 6
    torch.testing.assert_close(model.weight.detach(), expected)


def test_the_pull_follows_the_schedule_of_its_own_group() -> None:
    model = nn.ModuleDict({"other": nn.Linear(4, 4), "table": nn.Embedding(5, 4)})
    start = model["table"].weight.detach().clone()
    optimizer = adamw(model, lr=0.1, weight_decay=0.0, lr_scale={"table": 3.0})
    scheduler = cosine(optimizer, total_steps=8)
    AnchoredDecay(model["table"].weight, torch.zeros(5, 4), coefficient=1.0).attach(optimizer)
    factor = 1.0
    for _ in range(8):
        factor *= 1 - 3.0 * 0.1 * scheduler.get_last_lr()[0] / 0.1
        model["table"].weight.grad = torch.zeros(5, 4)
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(model["table"].weight.detach(), start * factor)


def test_reference_is_a_copy_and_the_hook_can_be_removed() -> None:
    model = nn.Embedding(3, 2)
    optimizer = adamw(model, lr=0.5, weight_decay=0.0)
    handle = AnchoredDecay(model.weight, model.weight, coefficient=1.0).attach(optimizer)
    with torch.no_grad():
        model.weight.add_(1.0)
    moved = model.weight.detach().clone()
    model.weight.grad = torch.zeros(3, 2)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), moved - 0.5)
    handle.remove()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), moved - 0.5)


def test_bad_anchors_are_refused() -> None:
    model, other = nn.Embedding(3, 2), nn.Linear(2, 2)
    with pytest.raises(ValueError, match="shape"):
        AnchoredDecay(model.weight, torch.zeros(2, 2), 0.1)
    with pytest.raises(ValueError, match="negative"):
        AnchoredDecay(model.weight, torch.zeros(3, 2), -0.1)
    with pytest.raises(ValueError, match="not among"):
        AnchoredDecay(model.weight, torch.zeros(3, 2), 0.1).attach(adamw(other, 0.1, 0.0))
