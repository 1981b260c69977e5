"""The step that a GPU replays, run kernel by kernel on a CPU: what `extend` says, also when rows end early.

tests/gpu has the same with the graph.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nano_think.engine import generate as generate_module
from nano_think.engine.generate import generate
from nano_think.engine.graph_step import GraphStep, supports
from nano_think.engine.sampling import SamplingConfig
from nano_think.evals.audit.live import live_copy
from nano_think.model import NanoThink

EXPERTS = ("transformer", "state_space", "diffuser")
PROMPT, NEW = 6, 20


def network(expert_lm, name: str) -> nn.Module:
    if name != "fused":
        return live_copy(expert_lm(name))[0].eval()
    experts = {kind: expert_lm(kind, i).expert for i, kind in enumerate(EXPERTS)}
    return live_copy(NanoThink(experts, 259, 32))[0].eval()


def prompts(rows: int = 3) -> Tensor:
    return torch.randint(259, (rows, PROMPT), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def graph_step(model, state, max_len, batch, new_tokens, wanted, precision):
        fast = GraphStep(model, batch, max_len)
        fast.load(state)
        return fast

    monkeypatch.setattr(generate_module, "_fast_step", graph_step)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", [*EXPERTS, "fused"])
def test_texts_are_those_of_the_plain_step(expert_lm, monkeypatch, as_on_a_gpu, name, temperature) -> None:
    model, config = network(expert_lm, name), SamplingConfig(temperature=temperature, seed=1)
    got = generate(model, prompts(), NEW, config)
    monkeypatch.undo()
    want = generate(model, prompts(), NEW, config, native=False)
    assert got.tokens == want.tokens
    for a, b in zip(got.logprobs, want.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=1e-5, rtol=1e-5)
    for a, b in zip(got.weights or [], want.weights or [], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_rows_may_end_early(expert_lm, monkeypatch, as_on_a_gpu) -> None:
    model, config = network(expert_lm, "fused"), SamplingConfig(seed=3)
    end = generate(model, prompts(), NEW, config).tokens[1][4]
    got = generate(model, prompts(), NEW, config, eos_id=end)
    monkeypatch.undo()
    want = generate(model, prompts(), NEW, config, eos_id=end, native=False)
    assert got.tokens == want.tokens
    assert len({len(row) for row in got.tokens}) > 1
    assert [len(weights) for weights in got.weights] == [len(row) for row in got.tokens]


def test_no_more_positions_than_there_is_room_for(expert_lm) -> None:
    model = network(expert_lm, "transformer")
    assert supports(model)
    state = model.init_state(2, PROMPT + 1)
    with torch.no_grad():
        model.extend(prompts(2), state)
    step = GraphStep(model, 2, PROMPT + 1)
    step.load(state)
    assert step.step_rows([1, 2], [0, 1]).shape == (2, 259)
    with pytest.raises(ValueError, match="holds 7 positions"):
        step.step_rows([1, 2], [0, 1])
