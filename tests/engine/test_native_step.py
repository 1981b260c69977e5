"""The native decode step against the plain one, token by token, and when it steps aside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nano_think.cache import AppendState
from nano_think.engine import generate as generation
from nano_think.engine import native_library
from nano_think.engine.generate import generate
from nano_think.engine.native_step import NativeStep, supports
from nano_think.engine.sampling import SamplingConfig
from nano_think.experts.state_space import StateSpaceExpert
from nano_think.experts.transformer import TransformerExpert
from nano_think.model import ExpertLM
from nano_think.nn.mixers.attention import CausalSelfAttention
from nano_think.nn.mixers.s6 import S6
from nano_think.ops.native import BuildError, find_compiler

VOCAB, WIDTH, NEW = 53, 36, 40  # no multiples of the tile: every padding is used
LENGTHS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 48, 70)
GREEDY = SamplingConfig(temperature=0.0)

try:
    find_compiler()
    COMPILER = True
except BuildError:
    COMPILER = False
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C++ compiler")


def attention(**options: Any) -> partial:
    return partial(CausalSelfAttention, **{"num_heads": 4, "head_dim": 10, **options})


EXPERTS = {
    "transformer": partial(TransformerExpert, num_heads=2, ffn_dim=40, num_layers=2),
    "one key head": partial(TransformerExpert, mixer=attention(num_kv_heads=1), ffn_dim=40, num_layers=2),
    "two key heads": partial(
        TransformerExpert,
        mixer=attention(num_kv_heads=2, head_dim=6, rope_layout="interleaved", rope_theta=500.0),
        ffn_dim=64,
        num_layers=2,
    ),
    "state space": partial(StateSpaceExpert, d_inner=44, d_state=5, num_layers=2),
    "no gate": partial(StateSpaceExpert, mixer=partial(S6, d_inner=48, gate=False, d_conv=3), num_layers=2),
    "attention without ffn": partial(StateSpaceExpert, mixer=attention(), num_layers=2),
    "scan with ffn": partial(TransformerExpert, mixer=partial(S6, d_inner=48), ffn_dim=40, num_layers=2),
}


@pytest.fixture
def model(randomise) -> Callable[..., ExpertLM]:
    return lambda name="transformer": randomise(ExpertLM((VOCAB, WIDTH), EXPERTS[name])).eval()


def tokens_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def plain_logits(model: ExpertLM, tokens: list[int], prompt: int) -> Tensor:
    """(n, V): after the prompt, then after every further token."""
    state = model.init_state(1, len(tokens))
    outputs = [model.extend(torch.tensor([tokens[:prompt]]), state).logits[0, -1]]
    outputs += [model.extend(torch.tensor([[token]]), state).logits[0, -1] for token in tokens[prompt:]]
    return torch.stack(outputs)


def native_logits(native: NativeStep, tokens: list[int], prompt: int) -> Tensor:
    outputs = [native.prefill(tokens[:prompt])]
    outputs += [native.step(token).clone() for token in tokens[prompt:]]
    return torch.stack(outputs)


@needs_compiler
@pytest.mark.parametrize("name", EXPERTS)
def test_fp32_equals_the_plain_step(model, name: str) -> None:
    plain = model(name)
    native = NativeStep(plain, max_len=max(LENGTHS) + NEW)
    for length in LENGTHS:
        tokens = tokens_of(length + NEW, seed=length)
        torch.testing.assert_close(
            native_logits(native, tokens, length), plain_logits(plain, tokens, length), atol=1e-4, rtol=0
        )


@needs_compiler
def test_every_prompt_length(model) -> None:
    plain, tokens = model(), tokens_of(72)
    native = NativeStep(plain, max_len=72)
    expected = plain_logits(plain, tokens, 1)
    for length in range(1, 71):
        torch.testing.assert_close(
            native_logits(native, tokens[: length + 2], length),
            expected[length - 1 : length + 2],
            atol=1e-4,
            rtol=0,
        )


def round_matrices(model: nn.Module, rounding: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy in which everything that the step keeps coarsely is rounded."""
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for module in rounded.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.copy_(rounding(module.weight))
    return rounded


def to_bf16(tensor: Tensor) -> Tensor:
    return tensor.bfloat16().float()


def to_int8(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scale).round() * scale


@pytest.fixture
def coarse_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain cache keeps keys and values rounded to bf16, as the step does beside coarse weights."""
    append = AppendState.append

    def rounded(self: AppendState, **entries: Tensor) -> tuple[Tensor, ...]:
        return append(self, **{name: to_bf16(entry) for name, entry in entries.items()})

    monkeypatch.setattr(AppendState, "append", rounded)


# A sum that differs by 1e-7 may round a key to the next bf16 number, 0.4% away, hence no 1e-5 here. The int8
# operand is rounded to 15 bits besides. Logits have a standard deviation of about 1.
@needs_compiler
@pytest.mark.parametrize(
    ("precision", "rounding", "tolerance"), [("bf16", to_bf16, 2e-3), ("int8", to_int8, 5e-3)]
)
@pytest.mark.parametrize("name", ["transformer", "two key heads", "state space", "scan with ffn"])
def test_coarse_weights_equal_the_plain_step_with_the_same_weights(
    model, coarse_cache, name: str, precision: Any, rounding: Callable[[Tensor], Tensor], tolerance: float
) -> None:
    plain = round_matrices(model(name), rounding)
    native = NativeStep(plain, precision, max_len=57)
    for length in (1, 17):
        tokens = tokens_of(length + NEW, seed=length)
        torch.testing.assert_close(
            native_logits(native, tokens, length), plain_logits(plain, tokens, length), atol=tolerance, rtol=0
        )


@needs_compiler
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", ["two key heads", "state space", "scan with ffn"])
def test_threads_change_no_bit(model, name: str, precision: Any) -> None:
    plain, tokens = model(name), tokens_of(26)
    results = [
        native_logits(NativeStep(plain, precision, max_len=26, threads=threads), tokens, 20)
        for threads in (1, 2, 3)
    ]
    for other in results[1:]:
        assert torch.equal(results[0], other)


@needs_compiler
def test_bytes_per_token(model) -> None:
    """Matrices shrink to a half and a quarter, padding and scales aside."""
    full, half, quarter = (NativeStep(model(), p).bytes_per_token for p in ("fp32", "bf16", "int8"))
    assert full >= sum(p.numel() for p in model().parameters()) * 4
    assert 1.9 < full / half < 2
    assert 3 < full / quarter < 4


@needs_compiler
def test_a_new_prompt_forgets_the_old_one(model) -> None:
    for name in ("transformer", "state space"):
        native = NativeStep(model(name), max_len=60)
        first = native_logits(native, tokens_of(20), 5)
        native_logits(native, tokens_of(60, seed=1), 50)
        assert torch.equal(native_logits(native, tokens_of(20), 5), first)


@needs_compiler
def test_a_changed_model_is_noticed(model) -> None:
    changes: list[Callable[[ExpertLM], Any]] = [
        lambda m: m.expert.blocks[0].ffn.up_proj.weight.add_(1),
        lambda m: m.load_state_dict(m.state_dict()),
        lambda m: setattr(m.expert.norm, "weight", nn.Parameter(torch.ones(WIDTH))),
    ]
    for change in changes:
        plain = model()
        native = NativeStep(plain)
        native.prefill([1, 2])
        with torch.no_grad():
            change(plain)
        with pytest.raises(RuntimeError, match="has changed since its weights were packed"):
            native.prefill([1, 2])


@needs_compiler
def test_limits_are_named(model) -> None:
    native = NativeStep(model(), max_len=4)
    with pytest.raises(ValueError, match="holds 5 positions, the native step 4"):
        native.prefill([1] * 5)
    native.prefill([1] * 4)
    with pytest.raises(ValueError, match="holds 4 positions"):
        native.step(1)
    native.prefill([1])
    for token in (-1, VOCAB):
        with pytest.raises(ValueError, match=f"outside the vocabulary of {VOCAB}"):
            native.step(token)
    with pytest.raises(ValueError, match="precision must be one of"):
        NativeStep(model(), "fp8")  # type: ignore[arg-type]


def test_what_it_does_not_support_is_named(model) -> None:
    class Odd(nn.Linear):
        """Any other arithmetic."""

    assert all(supports(model(name)) is None for name in EXPERTS)
    assert "ExpertLM" in supports(model().expert)
    assert "fp32" in supports(model().bfloat16())
    changed = model()
    changed.expert.blocks[1].ffn.up_proj = Odd(WIDTH, 40, bias=False)
    assert "Odd" in supports(changed)
    biased = model()
    biased.expert.blocks[1].ffn.up_proj = nn.Linear(WIDTH, 40)
    assert "bias" in supports(biased)
    uneven = model()
    uneven.expert.blocks[1].mixer.rope_theta = 5.0
    assert "rope_theta" in supports(uneven)
    with pytest.raises(ValueError, match="rope_theta"):
        NativeStep(uneven)


@needs_compiler
@pytest.mark.parametrize("name", ["transformer", "two key heads", "state space"])
def test_generate_gives_the_same_tokens(model, name: str) -> None:
    plain = model(name)
    for config in (GREEDY, SamplingConfig(0.8, top_k=20, top_p=0.9, seed=3)):
        prompt = [tokens_of(9)]
        expected = generate(plain, prompt, NEW, config, native=False)
        result = generate(plain, prompt, NEW, config, native=True)
        assert result.tokens == expected.tokens
        torch.testing.assert_close(
            torch.tensor(result.logprobs), torch.tensor(expected.logprobs), atol=1e-4, rtol=0
        )


@needs_compiler
def test_generate_chooses_by_the_number_of_tokens(model, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Counted(NativeStep):
        def __init__(self, *args: Any, **options: Any) -> None:
            made.append(args)
            super().__init__(*args, **options)

    monkeypatch.setattr(generation, "NativeStep", Counted)
    limit = generation.NATIVE_FROM
    generate(model(), [[1]], limit - 1, GREEDY)
    generate(model(), [[1], [2]], limit, GREEDY, native=False)
    assert made == []
    generate(model(), [[1]], limit, GREEDY)
    generate(model(), [[1], [2]], limit, GREEDY)
    assert len(made) == 2


@needs_compiler
def test_generate_in_another_precision(model) -> None:
    plain = round_matrices(model(), to_bf16)
    step = NativeStep(plain, "bf16", max_len=20)
    tokens = [int(step.prefill([1, 2, 3]).argmax())]
    for _ in range(4):
        tokens.append(int(step.step(tokens[-1]).argmax()))
    result = generate(plain, [[1, 2, 3]], 5, GREEDY, precision="bf16")
    assert result.tokens == [tokens]
    exact = generate(plain, [[1, 2, 3]], 5, GREEDY)
    assert result.logprobs != exact.logprobs
    torch.testing.assert_close(torch.tensor(result.logprobs), torch.tensor(exact.logprobs), atol=0.02, rtol=0)


def test_a_precision_that_cannot_be_had_is_named(model) -> None:
    biased = model()
    biased.expert.blocks[1].ffn.up_proj = nn.Linear(WIDTH, 40)
    generation._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="not in int8: .*bias"):
        result = generate(biased, [[1, 2]], 3, GREEDY, precision="int8")
    assert result.tokens == generate(biased, [[1, 2]], 3, GREEDY, native=False).tokens


def test_without_a_compiler_the_plain_step_runs_with_one_warning(
    model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Any) -> Any:
        raise BuildError("no C++ compiler was found")

    monkeypatch.setattr(native_library, "load", refuse)
    native_library.load_library.cache_clear()
    generation._warn_once.cache_clear()
    new = generation.NATIVE_FROM
    expected = generate(model(), [[1, 2]], new, GREEDY, native=False)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler") as caught:
        results = [generate(model(), [[1, 2]], new, GREEDY).tokens for _ in range(2)]
    assert len(caught) == 1
    assert results == [expected.tokens] * 2
    with pytest.raises(BuildError):
        generate(model(), [[1, 2]], new, GREEDY, native=True)
