"""The native decode step of every kind of model, of several rows at once, against the plain step."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from nano_think.cache import AppendState
from nano_think.engine.generate import generate
from nano_think.engine.native_library import Precision
from nano_think.engine.native_step import NativeStep, supports
from nano_think.engine.sampling import SamplingConfig
from nano_think.experts.diffuser import DiffuserExpert
from nano_think.experts.state_space import StateSpaceExpert
from nano_think.experts.transformer import TransformerExpert
from nano_think.mla import ExpertRouter, MultiHeadLatentAttention
from nano_think.model import ExpertLM, NanoThink
from nano_think.nn.mixers.attention import CausalSelfAttention
from nano_think.nn.mixers.latent_attention import LatentAttention
from nano_think.nn.mixers.s6 import S6
from nano_think.ops.native import BuildError, find_compiler

VOCAB, WIDTH = 53, 36  # no multiples of the vectors and panels: every padding is used
GREEDY = SamplingConfig(temperature=0.0)

try:
    find_compiler()
except BuildError as error:
    pytest.skip(f"nothing can be compiled: {error}", allow_module_level=True)


def diffuser(**options: Any) -> Callable[..., DiffuserExpert]:
    sizes = {"num_layers": 3, "num_heads": 2, "ffn_dim": 40, "train_T": 20}
    return partial(DiffuserExpert, **{**sizes, **options})


def mla(**options: Any) -> partial:
    return partial(MultiHeadLatentAttention, **{"num_heads": 3, "rope_dim": 6, **options})


def router(pool: str, **options: Any) -> partial:
    return partial(ExpertRouter, pool=pool, **{"span": 14, "tau": 0.7, "floor": 0.05, **options})


DIFFUSERS = {
    "posterior": {},
    "three steps": {"fused_steps": 3},
    "x0": {"param": "x0", "fused_steps": 2},
    "v": {"param": "v", "fused_steps": 2, "input_scale": 0.5},
    "eps": {"param": "eps", "fused_steps": 2},
    "next embedding": {"target": "next_embed"},
    "from zeros": {"x_T": "zeros", "fused_steps": 2},
    "idle self-conditioning": {"self_cond": True},
    "one layer": {"num_layers": 1, "fused_steps": 2},
    "long table": {"max_positions": 1, "ffn_dim": 70},
    "no adaptor": {"adaptor": False},
}
FUSED: dict[str, dict[str, Any]] = {
    "hidden": {},
    "no attention": {"mla": None},
    "raw input": {"expert_input": "raw"},
    "logit": {"fusion": "logit"},
    "prob": {"fusion": "prob"},
    "full keys": {"mla": mla(kv="full")},
    "bottleneck": {"mla": mla(kv="seed_bottleneck", post_norm="rms")},
    "idle memory": {"mla": mla(memory=True, rope_layout="interleaved", rope_theta=100.0)},
    "token": {"router": router("token")},
    "ema": {"router": router("ema", decay=0.7)},
    "token term": {"router": router("cummean+token")},
    "prefix": {"router": router("prefix")},
    "two diffusers, the second from zeros": {"more": {"second": diffuser(x_T="zeros")}},
}
TRANSFORMER = partial(TransformerExpert, num_heads=2, ffn_dim=40, num_layers=2)
STATE_SPACE = partial(StateSpaceExpert, d_inner=44, d_state=5, num_layers=2)
STACKS = {
    "transformer": TRANSFORMER,
    "state space": STATE_SPACE,
    "transformer, no adaptor": partial(TRANSFORMER, adaptor=False),
}
KINDS = [*STACKS, *DIFFUSERS, *FUSED]


@pytest.fixture
def model(randomise) -> Callable[..., Any]:
    def make(name: str = "hidden") -> Any:
        if name in DIFFUSERS:
            network: nn.Module = ExpertLM((VOCAB, WIDTH), diffuser(**DIFFUSERS[name]))
        elif name in FUSED:
            experts = {"transformer": TRANSFORMER, "diffuser": diffuser(), "state_space": STATE_SPACE}
            options = {"mla": mla(), **FUSED[name]}
            network = NanoThink(experts | options.pop("more", {}), VOCAB, WIDTH, **options)
        else:
            network = ExpertLM((VOCAB, WIDTH), STACKS[name])
        return prepare(randomise(network))

    return make


def prepare(network: nn.Module) -> Any:
    """Statistics for every diffuser, with a variance of every feature that differs from the others'."""
    generator = torch.Generator().manual_seed(3)
    for module in network.modules():
        if isinstance(module, DiffuserExpert):
            module.fit_statistics(2 * torch.randn(50, module.d_model, generator=generator) + 1)
            if module.param == "posterior":
                module.variance.uniform_(0.2, 2.0, generator=generator)
            with torch.no_grad():  # noise levels far apart would amplify every rounding
                module.denoiser.modulation.weight.mul_(0.3)
    return network.eval()


def tokens_of(batch: int, length: int, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def plain_outputs(model: Any, tokens: Tensor, prompt: int) -> tuple[Tensor, Tensor | None]:
    """Logits (B, n, V) and routing weights (B, n, N) of the positions after the prompt."""
    state = model.init_state(len(tokens), tokens.shape[1])
    model.extend(tokens[:, :prompt], state)
    outputs = [model.extend(column, state) for column in tokens[:, prompt:].split(1, dim=1)]
    weights = None if outputs[0].weights is None else torch.cat([o.weights for o in outputs], dim=1)
    return torch.cat([o.logits for o in outputs], dim=1), weights


def native_outputs(
    native: NativeStep, tokens: Tensor, prompt: int, state: Any = None
) -> tuple[Tensor, Tensor | None]:
    """As plain_outputs, from a prefill or from the state that is given."""
    native.prefill(tokens[:, :prompt]) if state is None else native.load(state)
    logits, weights = [], []
    for column in tokens[:, prompt:].T.tolist():
        logits.append(native.step_rows(column).clone())
        weights.append(None if native.routing is None else native.routing.clone())
    return torch.stack(logits, dim=1), None if weights[0] is None else torch.stack(weights, dim=1)


def compare(result: Any, expected: Any, tolerance: float, routing_tolerance: float = 1e-5) -> None:
    """Logits within `tolerance` of their standard deviation."""
    scale = float(expected[0].std())
    torch.testing.assert_close(result[0], expected[0], atol=tolerance * scale, rtol=0)
    assert (result[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        torch.testing.assert_close(result[1], expected[1], atol=routing_tolerance, rtol=0)
        assert expected[1].std() > 100 * routing_tolerance


@pytest.mark.parametrize("name", KINDS)
def test_fp32_equals_the_plain_step(model, name: str) -> None:
    plain = model(name)
    native = NativeStep(plain, max_len=52, batch=3)
    for prompt in (1, 2, 15, 16, 17, 40):
        tokens = tokens_of(3, prompt + 12, seed=prompt)
        compare(native_outputs(native, tokens, prompt), plain_outputs(plain, tokens, prompt), 1e-4)


def test_random_shapes(randomise) -> None:
    for seed in range(16):
        draw = random.Random(seed)
        width, vocab, heads = draw.randrange(6, 70), draw.randrange(3, 150), draw.choice((1, 2, 3))
        sizes = {"head_dim": draw.choice((2, 6, 10, 16, 18)), "num_heads": heads}
        attention = partial(CausalSelfAttention, num_kv_heads=draw.choice((1, heads)), **sizes)
        experts = {
            "attention": partial(
                TransformerExpert,
                mixer=attention,
                ffn_dim=draw.randrange(1, 90),
                num_layers=draw.choice((1, 2)),
            ),
            "scan": partial(
                StateSpaceExpert, d_inner=draw.randrange(3, 80), d_state=draw.randrange(1, 7), num_layers=1
            ),
            "diffuser": partial(
                DiffuserExpert, num_heads=1, ffn_dim=draw.randrange(2, 60), num_layers=2, train_T=20
            ),
        }
        if width % 2:  # a diffuser's head is as wide as the model
            del experts["diffuser"]
        context = mla(latent_dim=draw.randrange(3, 40), rope_dim=draw.choice((2, 4)), **sizes)
        plain = prepare(randomise(NanoThink(experts, vocab, width, mla=context), seed))
        batch, prompt = draw.randrange(1, 9), draw.randrange(1, 20)
        tokens = tokens_of(batch, prompt + 6, seed, vocab)
        native = NativeStep(plain, max_len=prompt + 6, batch=batch)
        compare(native_outputs(native, tokens, prompt), plain_outputs(plain, tokens, prompt), 2e-4, 1e-5)


def to_bf16(weight: Tensor) -> Tensor:
    return weight.bfloat16().float()


def to_int8(weight: Tensor) -> Tensor:
    largest = weight.abs().amax(dim=-1, keepdim=True)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return (weight / scale).round() * scale


@torch.no_grad()
def round_matrices(model: nn.Module, rounding: Callable[[Tensor], Tensor]) -> Any:
    """A copy in which everything that the step keeps coarsely is rounded."""
    rounded = copy.deepcopy(model)
    for name, module in rounded.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        if name.endswith("k_up_proj"):  # kept head by head, and transposed
            heads = rounded.get_submodule(name.removesuffix(".k_up_proj")).head_dim
            parts = [rounding(part.t()).t() for part in module.weight.split(heads)]
            module.weight.copy_(torch.cat(parts))
        else:
            module.weight.copy_(rounding(module.weight))
    return rounded


# Keys, values and latents are bf16 beside coarse weights: a sum that differs by 1e-7 may round one to the next
# bf16 number, 0.4% away. The int8 operand is rounded to 15 bits besides.
@pytest.mark.parametrize(
    ("precision", "rounding", "tolerance"), [("bf16", to_bf16, 4e-3), ("int8", to_int8, 8e-3)]
)
@pytest.mark.parametrize(
    "name", ["transformer", "state space", "posterior", "next embedding", "hidden", "prob"]
)
def test_coarse_weights_equal_the_plain_step_with_the_same_weights(
    model, monkeypatch: pytest.MonkeyPatch, name: str, precision: Precision, rounding: Any, tolerance: float
) -> None:
    append = AppendState.append
    monkeypatch.setattr(
        AppendState,
        "append",
        lambda self, **entries: append(self, **{name: to_bf16(entry) for name, entry in entries.items()}),
    )
    plain, tokens = round_matrices(model(name), rounding), tokens_of(3, 40)
    native = NativeStep(plain, precision, max_len=40, batch=3)
    compare(native_outputs(native, tokens, 17), plain_outputs(plain, tokens, 17), tolerance, 1e-3)


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("name", ["transformer", "state space", "three steps", "hidden", "prob", "full keys"])
def test_rows_do_not_feel_each_other_nor_the_threads(model, name: str, precision: Precision) -> None:
    """Bit for bit: 16 rows at once by three threads, and each alone by one."""
    plain, tokens = model(name), tokens_of(16, 26)
    read = plain.init_state(16, 20)
    with torch.no_grad():
        plain.extend(tokens[:, :20], read)
    together = native_outputs(NativeStep(plain, precision, max_len=26, batch=16, threads=3), tokens, 20, read)
    for row in range(0, 16, 3):
        state = copy.deepcopy(read)
        state.reorder(torch.tensor([row]))
        single = NativeStep(plain, precision, max_len=26, threads=1)
        alone = native_outputs(single, tokens[row : row + 1], 20, state)
        for ours, theirs in zip(together, alone, strict=True):
            assert ours is theirs is None or torch.equal(ours[row], theirs[0])


@pytest.mark.parametrize("name", ["transformer", "state space", "posterior", "hidden", "prob"])
def test_rows_that_rest_stay_as_they_are(model, name: str) -> None:
    plain, tokens = model(name), tokens_of(4, 30)
    native = NativeStep(plain, max_len=30, batch=4)
    native.prefill(tokens[:, :9])
    seen: dict[int, list[Tensor]] = {row: [] for row in range(4)}
    for rows in ([0, 1, 2, 3], [3, 1], [2], [1, 2, 3], [3], [3, 0]):
        logits = native.step_rows([int(tokens[row, native.positions[row]]) for row in rows], rows)
        for row, own in zip(rows, logits, strict=True):
            seen[row].append(own.clone())
    assert native.positions == [11, 12, 12, 14]
    in_step = native_outputs(NativeStep(plain, max_len=30, batch=4), tokens[:, :14], 9)[0]
    for row, own in seen.items():
        assert torch.equal(torch.stack(own), in_step[row, : len(own)])


def test_a_full_state_and_foreign_rows_are_named(model) -> None:
    native = NativeStep(model("transformer"), max_len=4, batch=2)
    native.prefill(tokens_of(2, 3))
    native.step_rows([1], [0])
    with pytest.raises(ValueError, match="holds 4 positions"):
        native.step_rows([1, 1])
    native.step_rows([1], [1])
    for tokens, rows in (([1], [2]), ([1, 1], [0, 0]), ([1], None), ([1], [-1])):
        with pytest.raises(ValueError, match="one token for each of some of 2 rows"):
            native.step_rows(tokens, rows)
    with pytest.raises(ValueError, match="use step_rows"):
        native.step(1)
    for name in ("transformer", "state space", "posterior", "hidden"):
        with pytest.raises(ValueError, match="holds 3 rows, the native step 2"):
            NativeStep(model(name), max_len=4, batch=2).prefill(tokens_of(3, 3))


def test_packed_weights_are_kept_until_the_model_changes_or_goes(model) -> None:
    plain = model("hidden")
    first, second = NativeStep(plain, max_len=8)._packed, NativeStep(plain, max_len=20, batch=3)._packed
    assert first is second
    assert NativeStep(plain, "int8")._packed is not first
    for tensor in (plain.expert_gain, plain.experts["diffuser"].variance):
        native = NativeStep(plain)
        native.prefill([1, 2])
        with torch.no_grad():
            tensor.mul_(2)
        with pytest.raises(RuntimeError, match="has changed since its weights were packed"):
            native.prefill([1, 2])
        assert NativeStep(plain)._packed is not native._packed
    gone = weakref.ref(plain)
    del plain, native, tensor
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("name", ["transformer", "three steps", "hidden", "prob"])
def test_generate_gives_the_same_tokens_and_weights(model, name: str) -> None:
    """Rows that end at different times, with everything that is told about them."""
    plain, prompts, config = model(name), tokens_of(5, 7), SamplingConfig(0.9, top_k=20, seed=3)
    end = generate(plain, prompts, 9, config, native=False).tokens[2][8]
    told: list[list[Any]] = [[], []]
    results = [
        generate(
            plain, prompts, 25, config, eos_id=end, native=native,
            on_token=lambda row, token, weights, native=native: told[native].append((row, token)),
        )
        for native in (False, True)
    ]  # fmt: skip
    plainly, natively = results
    assert natively.tokens == plainly.tokens
    assert told[0] == told[1]
    assert len({len(row) for row in natively.tokens}) > 1
    for ours, theirs in zip(natively.logprobs, plainly.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-4, rtol=0)
    assert (natively.weights is None) == (plainly.weights is None) == (name not in FUSED)
    for ours, theirs in zip(natively.weights or (), plainly.weights or (), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_generate_leaves_options_and_memory_to_the_plain_step(model, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = model("hidden")
    options = {"knock_out": ["diffuser"]}
    expected = generate(plain, [[1, 2]], 4, GREEDY, options=options, native=False)
    monkeypatch.setattr(NativeStep, "step_rows", lambda *_: pytest.fail("the native step knows no options"))
    assert generate(plain, [[1, 2]], 4, GREEDY, options=options, native=True).tokens == expected.tokens


def test_what_it_does_not_support_is_named(model, randomise) -> None:
    assert all(supports(model(name)) is None for name in KINDS)
    options: dict[str, dict[str, Any]] = {
        "fresh noise": {"x_T": "rng"},
        "feeds its estimate back": {"self_cond": True, "fused_steps": 2},
        "later tokens": {"bidirectional": True},
    }
    for reason, option in options.items():
        assert reason in supports(prepare(ExpertLM((VOCAB, WIDTH), diffuser(**option))))
    assert "no target statistics" in supports(ExpertLM((VOCAB, WIDTH), diffuser()))
    experts = {"a": TRANSFORMER, "b": STATE_SPACE}
    for reason, option in {
        "LayerNorm": {"mla": mla(post_norm="layer")},
        "pool=window": {"router": router("window")},
        "pool=sequence": {"router": router("sequence")},
        "private tables": {
            "tables": {"b": nn.Embedding(VOCAB, WIDTH)}, "fusion": "prob", "expert_input": "raw",
        },
    }.items():  # fmt: skip
        assert reason in supports(NanoThink(experts, VOCAB, WIDTH, **option))
    foreign = partial(TransformerExpert, mixer=partial(LatentAttention, num_heads=2, rope_dim=4), ffn_dim=40)
    assert "mixer" in supports(ExpertLM((VOCAB, WIDTH), foreign))
    assert "as an expert" in supports(ExpertLM((VOCAB, WIDTH), S6(WIDTH)))


def test_a_changed_setting_is_noticed(model) -> None:
    """Packed weights hold it too; a model made anew with that setting says what is right."""
    network = model("hidden")
    before = generate(network, [[1, 2, 3]], 5, GREEDY, native=True)
    diffuser_, router_ = network.experts["diffuser"], network.router
    for part, name, value in ((diffuser_, "fused_steps", 2), (router_, "tau", 0.3), (router_, "floor", 0.2)):
        setattr(part, name, value)
        after = generate(network, [[1, 2, 3]], 5, GREEDY, native=True)
        assert after.logprobs != before.logprobs
        plain = generate(network, [[1, 2, 3]], 5, GREEDY, native=False)
        torch.testing.assert_close(
            torch.tensor(after.logprobs), torch.tensor(plain.logprobs), atol=1e-4, rtol=0
        )
        before = after
