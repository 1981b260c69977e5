from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from nano_think.experts.state_space import StateSpaceExpert
from nano_think.experts.transformer import TransformerExpert
from nano_think.optim.groups import roles
from nano_think.optim.muon import MuonWithAdamW, muon
from nano_think.optim.schedule import cosine


@pytest.fixture
def model(randomise) -> nn.ModuleDict:
    parts = {
        "embedding": nn.Embedding(20, 16),
        "expert": TransformerExpert(16, 1, 2, 24, dropout=0.0),
        "router": nn.Linear(16, 3),
    }
    return randomise(nn.ModuleDict(parts))


def put_gradients(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def run(module: nn.Module, *stepped: object, steps: int = 10, start: int = 0) -> None:
    for step in range(start, start + steps):
        put_gradients(module, step)
        for item in stepped:
            item.step()


def assert_same(one: nn.Module, two: nn.Module) -> None:
    for (name, left), right in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_equals_torch_muon_and_torch_adamw_over_ten_steps(model) -> None:
    twin = copy.deepcopy(model)
    run(model, muon(model, lr=0.02, weight_decay=0.1, lr_scale={"router": 5.0}))
    pick = {name: [r for r in roles(twin) if r.hidden_matrix == name] for name in (True, False)}
    assert len(pick[True]) == 8
    router = [r for r in pick[False] if r.name.startswith("router")]
    rest = [r for r in pick[False] if not r.name.startswith("router")]
    groups = [
        {"params": [r.parameter], "lr": lr, "weight_decay": 0.1 if r.decayed else 0.0}
        for part, lr in ((router, 0.1), (rest, 0.02))
        for r in part
    ]
    run(
        twin,
        torch.optim.Muon(
            [r.parameter for r in pick[True]], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True),
    )
    assert_same(model, twin)


def test_first_step_has_the_rms_of_adamw_on_hidden_matrices(model) -> None:
    """0.2 sqrt(max(rows, cols)) times a nearly orthogonal matrix has entries of RMS near 0.2 on wide ones."""
    before = copy.deepcopy(model)
    run(model, muon(model, lr=1.0, weight_decay=0.0), steps=1)
    weight = "gate_proj"
    new = getattr(model["expert"].blocks[0].ffn, weight).weight
    old = getattr(before["expert"].blocks[0].ffn, weight).weight
    assert 0.15 < (new - old).pow(2).mean().sqrt().item() < 0.25
    torch.testing.assert_close((model["router"].bias - before["router"].bias).abs(), torch.ones(3))


def test_state_dict_round_trip_continues_exactly(model) -> None:
    twin = copy.deepcopy(model)
    optimizer = muon(model, 0.02, 0.1)
    run(model, optimizer, steps=7)

    first = muon(twin, 0.02, 0.1)
    run(twin, first, steps=4)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = muon(twin, 123.0, 0.7)
    second.load_state_dict(torch.load(file))
    run(twin, second, steps=3, start=4)
    assert_same(model, twin)
    assert second.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_scheduler_drives_both_parts(model) -> None:
    twin = copy.deepcopy(model)
    optimizer = muon(model, 0.02, 0.1)
    run(model, optimizer, cosine(optimizer, total_steps=10))
    matrices = [r.parameter for r in roles(twin) if r.hidden_matrix]
    others = [r for r in roles(twin) if not r.hidden_matrix]
    parts = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": [r.parameter], "weight_decay": 0.1 if r.decayed else 0.0} for r in others],
            lr=0.02,
            betas=(0.9, 0.95),
            fused=True,
        ),
    ]
    run(twin, *parts, *(cosine(part, total_steps=10) for part in parts))
    assert_same(model, twin)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.002)


def test_rates_changed_after_loading_reach_both_parts(model) -> None:
    optimizer = muon(model, 0.02, 0.1)
    run(model, optimizer, steps=1)
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(model)
    run(model, optimizer, steps=2)
    assert_same(model, before)


def test_closure_runs_once_with_gradients_enabled(model) -> None:
    calls = []

    def closure() -> torch.Tensor:
        loss = model["router"](torch.ones(2, 16)).square().sum()
        loss.backward()
        calls.append(loss)
        return loss

    before = model["router"].weight.detach().clone()
    assert muon(model, 0.1, 0.0).step(closure) is calls[0]
    assert len(calls) == 1
    assert not torch.equal(before, model["router"].weight)


def test_hooks_fire_once_a_step(model) -> None:
    optimizer, fired = muon(model, 0.1, 0.0), []
    optimizer.register_step_post_hook(lambda *_: fired.append(1))
    run(model, optimizer, steps=3)
    assert len(fired) == 3


def test_router_alone_gets_adamw_alone(model) -> None:
    model.requires_grad_(False)
    model["router"].requires_grad_(True)
    before = copy.deepcopy(model)
    optimizer = muon(model, 0.1, 0.0)
    put_gradients(model["router"], 0)
    optimizer.step()
    assert set(optimizer.state) == set(model["router"].parameters())
    assert all("exp_avg" in state for state in optimizer.state.values())
    assert_same(model["expert"], before["expert"])
    with pytest.raises(ValueError, match="no trainable parameter"):
        muon(model.requires_grad_(False), 0.1, 0.0)


def test_no_two_groups_have_one_name(randomise) -> None:
    """A state-space layer has decayed matrices of both kinds; what logs learning rates refuses equal names."""
    groups = muon(randomise(StateSpaceExpert(16, 1, 32, 4)), 1e-3, 0.1).param_groups
    names = [group["name"] for group in groups]
    assert len(set(names)) == len(names) == 3


def test_a_vector_among_the_matrices_is_refused() -> None:
    group = {"params": [nn.Parameter(torch.ones(3))], "lr": 0.1, "weight_decay": 0.0}
    with pytest.raises(ValueError, match="2D"):
        MuonWithAdamW([group], [])
