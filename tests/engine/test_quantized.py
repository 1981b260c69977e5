"""Generation with coarse weights: the native step and the coarse layers compute the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nano_think.cache import AppendState
from nano_think.engine import quantized
from nano_think.engine.generate import generate
from nano_think.engine.native_step import NativeStep
from nano_think.engine.quantized import generate_quantized
from nano_think.engine.sampling import SamplingConfig
from nano_think.model import ExpertLM
from nano_think.nn.quantized import Kind, quantize
from nano_think.ops.native import BuildError, find_compiler

GREEDY = SamplingConfig(temperature=0.0)
KINDS: tuple[Kind, ...] = ("int8", "bf16")

try:
    find_compiler()
    COMPILER = True
except BuildError:
    COMPILER = False
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C++ compiler")


@pytest.fixture
def model(expert_lm, randomise) -> Callable[[str], ExpertLM]:
    return lambda name: randomise(expert_lm(name)).eval()


@pytest.fixture
def coarse_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain cache keeps keys and values rounded to bf16, as the step does beside coarse weights."""
    append = AppendState.append

    def rounded(self: AppendState, **entries: Tensor) -> tuple[Tensor, ...]:
        return append(self, **{name: entry.bfloat16().float() for name, entry in entries.items()})

    monkeypatch.setattr(AppendState, "append", rounded)


# Logits have a standard deviation of about 1; the native step rounds what it multiplies with int8 to 15 bits, and
# a sum that differs by 1e-7 may round a key to the next bf16 number.
@needs_compiler
@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 5e-3), ("bf16", 2e-3)])
@pytest.mark.parametrize("name", ["transformer", "state_space"])
@torch.no_grad()
def test_coarse_layers_compute_what_the_native_step_does(
    model, coarse_cache, name: str, kind: Kind, tolerance: float
) -> None:
    plain = model(name)
    coarse = quantize(copy.deepcopy(plain), kind)
    plain.embedding.weight.copy_(
        coarse.embedding.weight
    )  # the native step looks tokens up in the saved table
    native = NativeStep(plain, kind, max_len=40)
    tokens = torch.randint(259, (1, 40), generator=torch.Generator().manual_seed(2))
    state = coarse.init_state(1, 40)
    for token in tokens[0].tolist():
        native_first = native.position == 0
        got = native.prefill([token]) if native_first else native.step(token)
        want = coarse.extend(torch.tensor([[token]]), state).logits[0, -1]
        if native_first:  # it reads a prompt with the weights as they are: give it the coarse model's state
            native.load(state)
        else:
            torch.testing.assert_close(got, want, atol=tolerance, rtol=0)


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_one_row_goes_by_the_native_step(model, monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    used: list[Any] = []
    monkeypatch.setattr(quantized, "quantize", lambda model, kind: used.append(kind) or quantize(model, kind))
    plain = model("transformer")
    result = generate_quantized(plain, kind, [[3, 5, 7]], 20, GREEDY)
    assert used == []
    assert result.tokens == generate(plain, [[3, 5, 7]], 20, GREEDY, native=True, precision=kind).tokens
    assert generate_quantized(plain, kind, [[3, 5, 7]], 1, GREEDY).tokens[0] == result.tokens[0][:1]


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_compiler_coarse_layers_write(model, monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    def refuse() -> None:
        raise BuildError("no C++ compiler was found")

    monkeypatch.setattr(quantized, "find_compiler", refuse)
    plain = model("state_space")
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    want = generate(quantize(copy.deepcopy(plain), kind), [[3, 5]], 9, GREEDY)
    assert generate_quantized(plain, kind, [[3, 5]], 9, GREEDY).tokens == want.tokens
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_native_step_does_not_know_goes_by_coarse_layers(fused, randomise, kind: Kind) -> None:
    plain = randomise(fused()).eval()
    weights = torch.tensor([1.0, 0.0])
    options = {"weights": weights}
    want = generate(quantize(copy.deepcopy(plain), kind), [[3, 5]] * 2, 9, GREEDY, options=options)
    got = generate_quantized(plain, kind, [[3, 5]] * 2, 9, GREEDY, options=options)
    assert got.tokens == want.tokens
