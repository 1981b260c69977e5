"""Precision and the library of fp32 products: chosen by time among those whose values are right."""

from __future__ import annotations

import pytest
import torch

from nano_think.errors import UserError
from nano_think.ops.products import float32_matmul, fp32_stays
from nano_think.phases import arithmetic
from nano_think.phases.arithmetic import BF16, FP32
from nano_think.phases.probe import Probe, Step

TASKS = ("transformer", "state_space", "diffuser", "route")


@pytest.fixture
def probe(objective, data):
    """`probe(kind)`: eight rows of a ready task."""
    return lambda kind, **arguments: Probe(
        objective(kind, **arguments), next(iter(data().dataloader("fusion_train", rows=4, batch_size=8)))
    )


class Timed:
    """A probe with given seconds a step, and an error in the gradient."""

    def __init__(self, real, seconds, wrong=None):
        self.task, self.batch, self.seconds, self.wrong = real.task, real.batch, seconds, wrong or {}

    def step(self, precision, matmul):
        gradient = torch.tensor([1.0, self.wrong.get(precision, 0.0)])
        return Step(2.0, [gradient], self.seconds[precision, matmul])


TIMES = {(FP32, "highest"): 1.0, (FP32, "medium"): 0.8, (BF16, "highest"): 0.6}
CHOICES = [
    ({}, {}, BF16, "highest"),
    ({}, {BF16: 0.3}, FP32, "medium"),
    ({(BF16, "highest"): 0.9}, {}, FP32, "medium"),
    # a twentieth is what another arithmetic has to gain
    ({(BF16, "highest"): 0.97, (FP32, "medium"): 0.98}, {}, FP32, "highest"),
    # steps of a few milliseconds are not worth it
    ({key: value / 100 for key, value in TIMES.items()}, {}, FP32, "highest"),
]


@pytest.mark.parametrize(("times", "wrong", "precision", "matmul"), CHOICES)
def test_the_fastest_whose_gradient_is_right(probe, tmp_path, monkeypatch, times, wrong, precision, matmul):
    monkeypatch.setattr(arithmetic, "fp32_stays", lambda setting: True)
    made = arithmetic.settle(Timed(probe("transformer"), TIMES | times, wrong), "auto", tmp_path)
    assert (made["precision"], made["float32_matmul"]) == (precision, matmul)


def test_what_was_measured_is_remembered_for_equal_shapes_only(probe, tmp_path, monkeypatch):
    monkeypatch.setattr(arithmetic, "fp32_stays", lambda setting: True)
    first = arithmetic.settle(Timed(probe("transformer"), TIMES), "auto", tmp_path)
    slower = TIMES | {(BF16, "highest"): 5.0}
    assert arithmetic.settle(Timed(probe("transformer"), slower), "auto", tmp_path) == first
    other = arithmetic.settle(Timed(probe("state_space"), slower), "auto", tmp_path)
    assert other["precision"] == FP32


def test_a_named_precision_is_kept(probe, tmp_path):
    for name in (BF16, "64-true"):
        assert arithmetic.settle(probe("transformer"), name, tmp_path)["precision"] == name
    assert not list(tmp_path.iterdir())
    assert arithmetic.settle(probe("transformer"), FP32, tmp_path)["precision"] == FP32


@pytest.mark.parametrize("kind", TASKS)
def test_bf16_steps_are_within_the_tolerance_of_the_choice(kind, probe):
    """Loss to 2 per cent, the gradient to a tenth of its length; fp32 by either library to 1e-3."""
    made = probe(kind)
    plain = made.step(FP32, "highest")
    assert arithmetic._same(plain, made.step(BF16, "highest"), arithmetic.TOLERANCES[BF16])
    if fp32_stays("medium"):
        assert arithmetic._same(plain, made.step(FP32, "medium"), arithmetic.TOLERANCES[FP32])
    wrong = Step(plain.loss, [g * 1.2 for g in plain.gradients], 0.0)
    assert not arithmetic._same(plain, wrong, arithmetic.TOLERANCES[BF16])


def test_products_rounded_to_bf16_are_found_out(monkeypatch):
    assert fp32_stays("highest")
    real = torch.Tensor.__matmul__

    def rounded(a, b):
        half = a.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium"
        return real(a.bfloat16().float(), b.bfloat16().float()) if half else real(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert fp32_stays("highest")
    assert not fp32_stays("medium")
    assert (FP32, "medium") not in list(arithmetic._candidates("auto"))


@pytest.mark.parametrize("kind", TASKS)
def test_a_probe_leaves_no_trace(kind, probe):
    made = probe(kind)
    before = {name: value.clone() for name, value in made.task.state_dict().items()}
    modes = [module.training for module in made.task.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with float32_matmul("high"):
        made.step(BF16, "medium")
        made.live_bytes(FP32, 2)
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in made.task.state_dict().items())
    assert all(parameter.grad is None for parameter in made.task.parameters())
    assert modes == [module.training for module in made.task.modules()]


def test_on_a_gpu_auto_is_bf16_where_the_device_computes_it(monkeypatch):
    for supported, name in ((True, BF16), (False, FP32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s)
        assert arithmetic.on_gpu("auto")["precision"] == name
    assert arithmetic.on_gpu("16-mixed")["precision"] == "16-mixed"


def test_a_cpu_computes_no_fp16(probe, tmp_path):
    with pytest.raises(UserError, match="16-mixed is for GPUs: use precision=bf16-mixed"):
        arithmetic.settle(probe("transformer"), "16-mixed", tmp_path)
