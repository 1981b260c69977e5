"""The native choice of tokens against the plain one: the same tokens from the same random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nano_think.engine import native_sampling, sampling
from nano_think.engine.sampling import SamplingConfig, row_generators
from nano_think.ops.native import BuildError, find_compiler

try:
    find_compiler()
    COMPILER = True
except BuildError:
    COMPILER = False
pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler")

GREEDY = SamplingConfig(temperature=0.0)
CONFIGS = [
    GREEDY,
    SamplingConfig(),
    SamplingConfig(0.7),
    SamplingConfig(1.3, top_k=1),
    SamplingConfig(1.3, top_k=40),
    SamplingConfig(top_k=10_000),
    SamplingConfig(top_p=1e-9),
    SamplingConfig(top_p=0.6),
    SamplingConfig(0.8, top_k=300, top_p=0.951),
    SamplingConfig(1e-40),
    SamplingConfig(1e6, top_p=0.999),
]
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "flat": lambda noise: noise * 1e-3,
    "usual": lambda noise: noise,
    "sharp": lambda noise: noise.pow(3) * 8,
    "tied": lambda noise: (noise * 2).round() / 2,
    "equal": torch.zeros_like,
    "half banned": lambda noise: noise.masked_fill(
        (noise > 0) & (noise < noise.amax(-1, keepdim=True)), -math.inf
    ),
    "one left": lambda noise: noise.masked_fill(noise != noise.max(dim=-1, keepdim=True).values, -math.inf),
    "far apart": lambda noise: noise * 1e30,
}


def logits_of(rows: int, vocab_size: int, kind: str = "usual", seed: int = 0) -> Tensor:
    return KINDS[kind](torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_same_tokens_and_log_probabilities(config: SamplingConfig, kind: str) -> None:
    for vocab_size in (1, 16, 17, 513, 1500):
        logits = logits_of(20, vocab_size, kind)
        results = [
            choose(logits, config, row_generators(5, range(20)))
            for choose in (native_sampling.choose, sampling.choose)
        ]
        (tokens, logprobs), (expected, expected_logprobs) = results
        assert tokens == expected
        torch.testing.assert_close(
            torch.tensor(logprobs), torch.tensor(expected_logprobs), atol=1e-5, rtol=1e-6
        )


@pytest.mark.parametrize(
    "config", [SamplingConfig(0.9, 7), SamplingConfig(1.1, None, 0.73), SamplingConfig(0.9, 9, 0.8)], ids=str
)
def test_limits_keep_the_same_tokens(config: SamplingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers just inside both ends of every kept token's share of [0, 1)."""
    for kind in ("usual", "tied", "half banned"):
        logits = logits_of(1, 50, kind, seed=1)
        ends = sampling.warp(logits, config).softmax(dim=-1).cumsum(dim=-1)[0].unique()
        starts = torch.cat((ends.new_zeros(1), ends[ends > 0][:-1]))
        numbers = torch.cat((starts + 1e-5, ends[ends > 0] - 1e-5))
        assert len(numbers) > 8
        for module in (sampling, native_sampling):
            monkeypatch.setattr(module, "uniforms", lambda generators, numbers=numbers: numbers)
        many, streams = logits.expand(len(numbers), -1), row_generators(0, range(len(numbers)))
        assert native_sampling.choose(many, config, streams)[0] == sampling.choose(many, config, streams)[0]


def test_extreme_numbers_point_at_possible_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.full((2, 40), -math.inf)
    logits[:, 17:20] = 0.0
    numbers = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    monkeypatch.setattr(native_sampling, "uniforms", lambda generators: numbers)
    assert native_sampling.choose(logits, SamplingConfig(), row_generators(0, range(2)))[0] == [17, 19]


def test_rows_may_lie_apart_and_do_not_see_each_other() -> None:
    wide, config = logits_of(6, 700), SamplingConfig(0.9, 50, 0.9)
    tokens, logprobs = native_sampling.choose(wide[:, :650], config, row_generators(1, range(6)))
    for row in range(6):
        own = native_sampling.choose(wide[row : row + 1, :650].clone(), config, row_generators(1, [row]))
        assert own == ([tokens[row]], [logprobs[row]])
    half = wide.double().t().contiguous().t()
    assert native_sampling.choose(half, GREEDY, [])[0] == wide.argmax(dim=-1).tolist()


@pytest.mark.parametrize("bad", [-math.inf, math.nan, math.inf])
@pytest.mark.parametrize("config", [GREEDY, SamplingConfig(0.7, 5, 0.9)], ids=str)
def test_nothing_to_draw_is_an_error(bad: float, config: SamplingConfig) -> None:
    logits = torch.zeros(2, 20)
    logits[1] = bad
    with pytest.raises(ValueError, match="no token can be drawn"):
        native_sampling.choose(logits, config, row_generators(0, range(2)))
    logits[1] = 0.0
    native_sampling.choose(logits, config, row_generators(0, range(2)))
    logits[1, 18] = math.nan
    with pytest.raises(ValueError, match="no token can be drawn"):
        native_sampling.choose(logits, config, row_generators(0, range(2)))
