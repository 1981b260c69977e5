from __future__ import annotations

import pytest
import torch
from torch import nn

from nano_think.experts.transformer import TransformerExpert
from nano_think.nn.norm import RMSNorm
from nano_think.optim.groups import adamw, parameter_groups, roles


class Zoo(nn.Module):
    """One parameter of every kind that is treated differently, the embedding tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 10, bias=False)
        self.embedding = nn.Embedding(10, 6)
        self.head.weight = self.embedding.weight
        self.lm_head = nn.Linear(6, 10)
        self.hidden = nn.Linear(6, 6)
        self.conv = nn.Conv1d(6, 6, 3, groups=6)
        self.dt_proj = nn.Linear(2, 6)
        self.router = nn.Linear(6, 3)
        self.norm = RMSNorm(6)
        self.A_log = nn.Parameter(torch.ones(6, 4))
        self.A_log._no_weight_decay = True
        self.D = nn.Parameter(torch.ones(6))
        self.frozen = nn.Linear(6, 6).requires_grad_(False)


def test_decay_and_matrices_of_every_kind() -> None:
    table = {role.name: (role.decayed, role.hidden_matrix) for role in roles(Zoo())}
    assert table == {
        "head.weight": (False, False),
        "lm_head.weight": (True, False),
        "lm_head.bias": (False, False),
        "hidden.weight": (True, True),
        "hidden.bias": (False, False),
        "conv.weight": (True, False),
        "conv.bias": (False, False),
        "dt_proj.weight": (True, False),
        "dt_proj.bias": (False, False),
        "router.weight": (True, False),
        "router.bias": (False, False),
        "norm.weight": (False, False),
        "A_log": (False, False),
        "D": (False, False),
    }


def test_groups_of_a_transformer_cover_it_once() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(50, 16), "expert": TransformerExpert(16, 2, 2, 24)})
    groups = {group["name"]: group for group in parameter_groups(model, 1e-3, 0.1)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    members = {label: {names[id(p)] for p in group["params"]} for label, group in groups.items()}
    undecayed = {"embedding.weight", "expert.norm.weight"} | {
        f"expert.blocks.{i}.{norm}.weight" for i in (0, 1) for norm in ("mixer_norm", "ffn_norm")
    }
    assert members["model/no_decay"] == undecayed
    assert members["model/decay"] == set(names.values()) - undecayed
    assert groups["model/decay"]["weight_decay"] == 0.1
    assert groups["model/no_decay"]["weight_decay"] == 0.0
    assert sum(len(group["params"]) for group in groups.values()) == len(names)


def test_longest_prefix_scales_the_learning_rate_at_dots_only() -> None:
    model = nn.ModuleDict(
        {
            "router": nn.ModuleDict({"project": nn.Linear(4, 3), "other": nn.Linear(4, 4)}),
            "router_two": nn.Linear(4, 4, bias=False),
        }
    )
    groups = parameter_groups(model, 0.01, 0.1, {"router": 10.0, "router.other": 0.5})
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates[id(model["router"]["project"].weight)] == pytest.approx(0.1)
    assert rates[id(model["router"]["other"].bias)] == pytest.approx(0.005)
    assert rates[id(model["router_two"].weight)] == pytest.approx(0.01)
    assert sorted({group["name"] for group in groups}) == sorted(
        ["model/decay"] + [f"{p}/{d}" for p in ("router", "router.other") for d in ("decay", "no_decay")]
    )


def test_unknown_prefix_and_fully_frozen_module_are_refused() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="'rooter'"):
        parameter_groups(model, 0.1, 0.1, {"rooter": 2.0})
    with pytest.raises(ValueError, match="no trainable parameter"):
        adamw(model.requires_grad_(False), 0.1, 0.1)


def test_frozen_and_undecayed_parameters_stay_without_gradient() -> None:
    """One step with zero gradients moves exactly the decayed parameters, by the factor 1 - lr * decay."""
    model = Zoo()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(2.0)
    optimizer = adamw(model, lr=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed = {role.name for role in roles(model) if role.decayed}
    for name, parameter in model.named_parameters():
        expected = 2.0 * (1 - 0.1 * 0.5) if name in decayed else 2.0
        torch.testing.assert_close(parameter, torch.full_like(parameter, expected))


def test_adamw_equals_the_formula() -> None:
    """Three steps against arXiv 1711.05101, algorithm 2, with betas (0.9, 0.95)."""
    module = nn.Linear(3, 2, bias=False)
    weight = module.weight.detach().double().clone()
    optimizer = adamw(module, lr=0.01, weight_decay=0.1)
    first = second = torch.zeros_like(weight)
    for step in range(1, 4):
        gradient = torch.randn(2, 3, generator=torch.Generator().manual_seed(step))
        module.weight.grad = gradient.clone()
        optimizer.step()
        gradient = gradient.double()
        first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
        moved = (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        weight = weight - 0.01 * 0.1 * weight - 0.01 * moved
        torch.testing.assert_close(module.weight.detach().double(), weight, atol=1e-6, rtol=0)
