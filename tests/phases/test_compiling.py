from __future__ import annotations

import json

import pytest
import torch
from torch._dynamo.utils import counters

from nano_think.phases.compiling import compiled
from nano_think.phases.expert import expert_maker


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transformer", "state_space"])
def test_a_compiled_step_is_the_same_and_compiles_once(kind, objective, data, fresh_compiler):
    """Loss and gradients to 1e-4 of the eager ones, names as before, no graph after the first step."""
    task = objective(kind)
    names = list(task.network.state_dict())
    trained = [p for p in task.network.parameters() if p.requires_grad]
    batches = [batch for batch in data().dataloader("expert_train") if len(batch["tokens"]) == 8][:4]
    assert len({str(batch["segments"].tolist()) for batch in batches}) == len(batches)

    def step(batch):
        loss = task.batch_loss(batch)["loss"] / batch["labels"].numel()
        return [loss.detach(), *torch.autograd.grad(loss, trained)]

    eager = [step(batch) for batch in batches]
    graphs = []
    with compiled(task.network):
        for batch, want in zip(batches, eager, strict=True):
            for got, expected in zip(step(batch), want, strict=True):
                bound = 1e-4 * max(1e-3, float(expected.abs().max()))
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=bound)
            graphs.append(counters["stats"]["unique_graphs"])
        assert graphs[0] > 0
        assert graphs == graphs[:1] * len(batches)
        assert list(task.network.state_dict()) == names
    torch._dynamo.reset()
    counters.clear()
    step(batches[0])
    assert not counters["stats"]


def test_the_key_reaches_the_fit_and_not_the_identity(project, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: seen.append(type(module).__name__))
    settings = ("phase=expert", "expert=transformer", "trainer.max_steps=2")
    plain = project.new(*settings)
    folder = project.phase(*settings, "compile=true")
    assert seen == ["TransformerExpert"]
    used = json.loads((folder / "manifest.json").read_text())["artifacts"]
    assert expert_maker(plain, "transformer").recipe.hash in used


def test_a_diffuser_stays_eager(expert_lm):
    with compiled(expert_lm("diffuser")) as parts:
        assert parts == []
