"""The screened head: the likeliest tokens' logits to the bit, and generations as without it."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from nano_think.engine import native_screen
from nano_think.engine.generate import generate
from nano_think.engine.native_library import Packer
from nano_think.engine.native_screen import Screen, unpacked
from nano_think.engine.native_step import NativeStep
from nano_think.engine.sampling import SamplingConfig
from nano_think.experts.transformer import TransformerExpert
from nano_think.model import ExpertLM
from tests.engine.test_native_step import needs_compiler, tokens_of

VOCAB, WIDTH, NEW = 1000, 36, 60  # 16 panels, the last one in part
PRECISIONS = ("fp32", "bf16")
SAMPLINGS = {
    "greedy": SamplingConfig(temperature=0.0),
    "top 5": SamplingConfig(temperature=0.9, top_k=5, seed=3),
    "top 6, p": SamplingConfig(temperature=1.3, top_k=6, top_p=0.8, seed=4),
}

pytestmark = needs_compiler


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the processor has no fast products of int8."""
    pays = native_screen.pays
    monkeypatch.setattr(
        "nano_think.engine.native_step.pays",
        lambda best, rows, precision, vocab_size: (
            rows == 1 and precision != "int8" and 128 * best <= vocab_size
        ),
    )
    if native_screen.load_library().screens():
        assert pays(7, 1, "fp32", VOCAB)
        assert not pays(8, 1, "fp32", VOCAB)


@pytest.fixture
def model(randomise) -> ExpertLM:
    expert = partial(TransformerExpert, num_heads=2, ffn_dim=40, num_layers=2)
    return randomise(ExpertLM((VOCAB, WIDTH), expert)).eval()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("best", [1, 2, 7])
def test_the_likeliest_have_their_bits_and_the_rest_none(model, precision, best) -> None:
    tokens = tokens_of(40, seed=1)
    whole, part = (NativeStep(model, precision, threads=n) for n in (1, 2))
    whole.prefill(tokens[:4]), part.prefill(tokens[:4])
    left_out = 0
    for token in tokens[4:]:
        expected, found = whole.step(token), part.step_rows([token], best=best)[0]
        assert (part.screened, whole.screened) == (True, False)
        known = found.isfinite()
        assert torch.equal(found[known], expected[known])
        assert bool(known[expected.topk(best).indices].all())
        left_out += int((~known).sum())
        assert torch.equal(part.read_out(part.hidden[None])[0], expected)
    assert left_out > 0.9 * VOCAB * len(tokens[4:])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_ties_and_neighbours_are_all_kept(model, precision) -> None:
    """Rows that are equal, and rows that differ by less than int8 shows."""
    with torch.no_grad():
        factors = 1 + 1e-3 * torch.randn(40, 1, generator=torch.Generator().manual_seed(0))
        model.embedding.weight[100:140] = factors * model.embedding.weight[[7]]
        model.embedding.weight[500:520] = model.embedding.weight[[7]]
    whole, part = NativeStep(model, precision), NativeStep(model, precision)
    for token in (7, 100, 500, 3):
        expected, found = whole.step(token), part.step_rows([token], best=5)[0]
        likeliest = expected >= expected.topk(5).values[-1]
        assert torch.equal(found[likeliest], expected[likeliest])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_coarse_logit_is_further_off_than_its_bound(precision, scale) -> None:
    """The worst operand of a row is the direction of its own error."""
    generator = torch.Generator().manual_seed(5)
    head = scale * torch.randn(130, WIDTH, generator=generator) * torch.rand(130, 1, generator=generator)
    screen = Screen(head, precision)
    kept = head.bfloat16().float() if precision == "bf16" else head
    coarse = unpacked(screen.weights, *head.shape)
    apart = (kept - coarse).double()
    for operand in (apart, -apart, kept.double(), torch.randn(130, WIDTH, generator=generator).double()):
        wrong = (apart * operand).sum(dim=1).abs()
        bound = screen.errors[:130].double() * operand.norm(dim=1)
        assert bool((wrong <= bound).all())
        assert float((bound / (kept.double().norm(dim=1) * operand.norm(dim=1))).max()) < 0.03
    assert bool(screen.errors[130:].isinf().all())


def test_packed_int8_can_be_read_back() -> None:
    matrix = torch.randn(70, 10, generator=torch.Generator().manual_seed(2))
    packer = Packer("int8")
    packer.matrix(matrix)
    scales = matrix.abs().amax(dim=1, keepdim=True) / 127
    assert torch.equal(unpacked(packer.finish(), 70, 10), (matrix / scales).round() * scales)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_generations_are_those_of_the_whole_head(model, precision, sampling, monkeypatch) -> None:
    """Tokens and log-probabilities, with banned tokens that are the likeliest, ending before the room is used."""

    def run(**more):
        return generate(
            model, [tokens_of(5)], NEW, SAMPLINGS[sampling], native=True, precision=precision, **more
        )

    free = run().tokens[0]
    banned = [] if sampling == "top 6, p" else sorted(set(free))[:1]
    more = {"banned_ids": banned, "eos_id": run(banned_ids=banned).tokens[0][-7]}
    steps = _steps(monkeypatch)
    screened = run(**more)
    assert set(steps) == {True}
    monkeypatch.setattr("nano_think.engine.native_step.pays", lambda *args: False)
    steps.clear()
    whole = run(**more)
    assert set(steps) == {False}
    assert screened.tokens == whole.tokens
    assert screened.logprobs == whole.logprobs


def test_log_probabilities_that_nobody_wants_are_not_computed(model, monkeypatch) -> None:
    """The head is then never read as a whole; the tokens are the same."""

    def run(**more):
        return generate(model, [tokens_of(5)], NEW, SAMPLINGS["greedy"], native=True, **more)

    wanted = run()
    monkeypatch.delattr(NativeStep, "read_out")
    unwanted = run(logprobs=False)
    assert (unwanted.tokens, unwanted.logprobs) == (wanted.tokens, [])


def test_a_row_that_is_left_alone_is_screened(model, monkeypatch) -> None:
    """Others end before it; what it says stays the same."""

    def run():
        return generate(
            model, [tokens_of(5), tokens_of(5, 1)], NEW, SAMPLINGS["greedy"], eos_id=eos, native=True
        )

    eos = -1
    first, second = run().tokens
    eos = next(token for token in first if token not in second and first.index(token) > 4)
    steps = _steps(monkeypatch)
    found = run()
    assert all(a <= b for a, b in pairwise(steps))  # once alone, always
    assert (steps[0], steps[-1]) == (False, True)
    monkeypatch.setattr("nano_think.engine.native_step.pays", lambda *args: False)
    whole = run()
    assert (found.tokens, found.logprobs) == (whole.tokens, whole.logprobs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused_as_without_it(model, bad) -> None:
    with torch.no_grad():
        model.expert.norm.weight[3] = bad
    with pytest.raises(ValueError, match="no token can be drawn"):
        generate(model, [tokens_of(5)], 2, SAMPLINGS["greedy"], native=True, banned_ids=[0])


def _steps(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Filled with whether each native step was screened."""
    seen: list[bool] = []
    step_rows = NativeStep.step_rows

    def recorded(self: NativeStep, *args, **options) -> Tensor:
        logits = step_rows(self, *args, **options)
        seen.append(self.screened)
        return logits

    monkeypatch.setattr(NativeStep, "step_rows", recorded)
    return seen
