"""The step as one function of tensors: equal to the model, one graph for all positions, the same when exported."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nano_think.engine.compiled import Decoder, DecodeStep, compiled_decoder, export_step, exported_decoder
from nano_think.evals.audit.live import live_copy, strengthened
from nano_think.mla import MultiHeadLatentAttention
from nano_think.model import NanoThink
from nano_think.ops.native import BuildError, find_compiler

EXPERTS = ("transformer", "state_space", "diffuser")
MODELS = (*EXPERTS, "fused")
ROWS, PROMPT, LENGTH = 2, 7, 24


@pytest.fixture
def model(expert_lm) -> Callable[[str], nn.Module]:
    """One of MODELS with every path alive; the fused one has all experts behind an MLA."""

    def make(name: str) -> nn.Module:
        if name != "fused":
            return strengthened(live_copy(expert_lm(name))[0])
        experts = {name: expert_lm(name, seed).expert for seed, name in enumerate(EXPERTS)}
        mla = partial(MultiHeadLatentAttention, num_heads=2, memory=True)
        return strengthened(live_copy(NanoThink(experts, 259, 32, mla=mla))[0])

    return make


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def tokens() -> Tensor:
    return torch.randint(259, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))


def decode_and_compare(decoder: Decoder, plain: nn.Module) -> None:
    """A prompt, then token by token up to the last place there is, against one pass over everything."""
    with torch.no_grad():
        want = plain(tokens())
    got = [(decoder.prefill(tokens()[:, :PROMPT]), None)]
    got += [decoder.step(tokens()[:, i : i + 1]) for i in range(PROMPT, LENGTH)]
    logits = torch.stack([part[0] for part in got], dim=1)
    torch.testing.assert_close(logits, want.logits[:, PROMPT - 1 :], atol=1e-4, rtol=1e-4)
    if want.weights is not None:
        weights = torch.stack([part[1] for part in got[1:]], dim=1)
        torch.testing.assert_close(weights, want.weights[:, PROMPT:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_the_step_equals_the_model(model, name: str) -> None:
    plain = model(name)
    decode_and_compare(Decoder(DecodeStep(plain, ROWS, LENGTH)), plain)


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_serves_every_position(model, name: str) -> None:
    plain = model(name)
    keys = list(plain.state_dict())
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    decoder = compiled_decoder(plain, ROWS, LENGTH, backend=backend)
    decode_and_compare(decoder, plain)
    decode_and_compare(decoder, plain)  # another prompt: the state is new, the graph is not
    assert len(graphs) == 1
    assert list(plain.state_dict()) == keys


def test_compiled_code_equals_the_model(model) -> None:
    try:
        find_compiler()
    except BuildError:
        pytest.skip("no C++ compiler")
    plain = model("state_space")
    with torch._dynamo.config.patch(error_on_recompile=True):
        decode_and_compare(compiled_decoder(plain, ROWS, LENGTH), plain)


@pytest.mark.parametrize("name", MODELS)
def test_an_export_is_read_back_equal(model, name: str, tmp_path: Path) -> None:
    plain = model(name)
    export_step(tmp_path / "step.pt2", plain, ROWS, LENGTH)
    decode_and_compare(exported_decoder(tmp_path / "step.pt2", plain, ROWS, LENGTH), plain)


def test_what_lies_behind_the_position_cannot_reach_it(model) -> None:
    """Whatever an earlier sequence left in the room is masked."""
    plain = model("fused")
    step = DecodeStep(plain, ROWS, LENGTH)
    _, state = step.prefill(tokens()[:, :PROMPT])
    position = torch.tensor([PROMPT])
    clean, _ = step(tokens()[:, PROMPT : PROMPT + 1], position, [part.clone() for part in state])
    rooms = [part for part in state if part.shape[-2] == LENGTH]
    assert rooms
    for part in rooms:
        part[..., PROMPT + 1 :, :] = 1e4
    dirty, _ = step(tokens()[:, PROMPT : PROMPT + 1], position, state)
    assert torch.equal(clean, dirty)


def test_a_full_room_is_named(model) -> None:
    decoder = Decoder(DecodeStep(model("transformer"), ROWS, PROMPT))
    decoder.prefill(tokens()[:, :PROMPT])
    with pytest.raises(ValueError, match=f"holds {PROMPT} positions"):
        decoder.step(tokens()[:, :1])
    with pytest.raises(ValueError, match=f"{LENGTH} tokens, there is room for {PROMPT}"):
        decoder.prefill(tokens())
