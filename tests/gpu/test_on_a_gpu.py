"""On a GPU what is promised on a CPU: the same numbers, the same promises about time, phases that run and resume.

Numbers are compared with those of the CPU. In fp32 to 1e-4 of the largest value (products in tf32 are off by
default), in bf16 to 2e-2.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nano_think.engine.generate import generate
from nano_think.engine.sampling import SamplingConfig
from nano_think.evals.audit.run import UNTRAINED, audit
from nano_think.experts.diffuser import DiffuserExpert
from nano_think.experts.state_space import StateSpaceExpert
from nano_think.experts.transformer import TransformerExpert
from nano_think.mla import MultiHeadLatentAttention
from nano_think.model import ExpertLM, NanoThink
from nano_think.nn.mixers.ssd import SSD
from nano_think.ops import elementwise
from nano_think.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from nano_think.ops.layout import Layout
from nano_think.ops.selective_scan import check_kernel, selective_scan, triton_problem

if not torch.cuda.is_available():
    pytest.skip("torch finds no CUDA device", allow_module_level=True)

ROOT = Path(__file__).parents[2]
VOCAB, D_MODEL, LENGTH = 61, 32, 48
HALF, SINGLE = 2e-2, 1e-4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_near(got: Tensor, want: Tensor, tolerance: float, name: str = "") -> None:
    want = want.detach().double().cpu()
    error = float((got.detach().double().cpu() - want).abs().max())
    assert error <= tolerance * float(want.abs().max()) + 1e-12, f"{name}: {error:.1e}"


def rows(count: int = 3) -> tuple[Tensor, Tensor, Layout]:
    """Tokens, labels with some left out, and a layout of several documents with pads at the end of a row."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (count, LENGTH), generator=generator)
    starts = torch.rand(tokens.shape, generator=generator) < 0.1
    starts[:, 0] = True
    segments = starts.long().cumsum(1) - 1
    order = torch.arange(LENGTH).expand_as(tokens)
    positions = order - order.masked_fill(~starts, 0).cummax(1).values
    segments[0, -5:], positions[0, -5:] = -1, torch.arange(5)
    labels = tokens.roll(-1, 1).masked_fill(starts.roll(-1, 1) | (segments < 0), -100)
    return tokens, labels, Layout(positions, segments)


def moved(layout: Layout) -> Layout:
    return Layout(layout.positions.cuda(), layout.segments.cuda())


def stirred(module: nn.Module) -> nn.Module:
    """No part that starts at zero is left there."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return module


def expert(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "transformer":
        return TransformerExpert(D_MODEL, 2, 2, 48, dropout=0.0)
    if name == "state_space":
        return StateSpaceExpert(D_MODEL, 2, 48, dropout=0.0)
    if name == "ssd":
        return StateSpaceExpert(
            D_MODEL, 2, dropout=0.0, mixer=lambda d_model: SSD(d_model, d_inner=64, head_dim=16)
        )
    diffuser = DiffuserExpert(D_MODEL, 2, 2, 48)
    diffuser.fit_statistics(draw(64, D_MODEL))
    return stirred(diffuser)


def model(name: str) -> nn.Module:
    """A language model of one expert, or the three fused."""
    torch.manual_seed(1)
    if name != "fused":
        return ExpertLM(nn.Embedding(VOCAB, D_MODEL), expert(name))
    experts = {kind: expert(kind) for kind in ("transformer", "diffuser", "state_space")}
    mla = MultiHeadLatentAttention(D_MODEL, num_heads=2)
    return stirred(NanoThink(experts, VOCAB, D_MODEL, mla=mla))


MODELS = ("transformer", "state_space", "ssd", "diffuser", "fused")


@pytest.mark.parametrize("recording", [True, False])
def test_the_kernels_of_triton_are_used_and_right(recording: bool) -> None:
    """Otherwise all below would pass by the slower means. Under autocast and without gradients too."""
    triton_problem.cache_clear()
    with torch.set_grad_enabled(recording), torch.autocast("cuda", torch.bfloat16):
        assert triton_problem() is None
    assert elementwise.gpu_kernels(draw(2, 3).cuda()) is not None


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(("length", "half"), [(2, False), (150, False), (513, False), (513, True)])
def test_scan_values_and_gradients(backend: str, length: int, half: bool) -> None:
    b, d, n = 2, 40, 16
    inputs = {"x": draw(b, length, d), "dt": draw(b, length, d, seed=1), "A": -draw(d, n, seed=2).abs()}
    inputs |= {"B": draw(b, length, n, seed=3), "C": draw(b, length, n, seed=4), "D": draw(d, seed=5)}
    inputs |= {"dt_bias": draw(d, seed=6), "z": draw(b, length, d, seed=7)}
    if half:
        inputs |= {k: v.bfloat16() for k, v in inputs.items() if k in ("x", "dt", "B", "C", "z")}
    inputs["state"] = draw(b, d, n, seed=8)
    starts = torch.rand(b, length, generator=torch.Generator().manual_seed(9)) < 0.02
    results = []
    for place, dtype, way in (("cuda", None, backend), ("cpu", torch.float64, "ref")):
        leaves = {k: v.detach().to(place, dtype).requires_grad_() for k, v in inputs.items()}
        y, last = selective_scan(**leaves, starts=starts.to(place), backend=way)
        upstream = [draw(*y.shape, seed=10), draw(*last.shape, seed=11)]
        if half:
            upstream[0] = upstream[0].bfloat16()
        upstream = [own.to(result) for own, result in zip(upstream, (y, last), strict=True)]
        results.append([y, last, *torch.autograd.grad([y, last], list(leaves.values()), upstream)])
    for name, got, want in zip(("y", "last", *inputs), *results, strict=True):
        rounded = half and name in ("y", "x", "dt", "B", "C", "z")
        assert_near(got, want, 2**-7 if rounded else SINGLE, name)


def test_the_check_of_the_scan_passes_at_every_tile() -> None:
    from nano_think.ops.scan_triton import TritonScan

    for chunk, block in ((16, 8), (64, 16), (128, 32)):
        check_kernel(TritonScan(chunk, block), torch.device("cuda"))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy(half: bool, weighted: bool) -> None:
    hidden, table = draw(2, 300, 24), draw(1000, 24, seed=1)
    labels = torch.randint(1000, (2, 300), generator=torch.Generator().manual_seed(2))
    labels[:, ::7] = -100
    weights = draw(2, 300, seed=3) if weighted else torch.full((2, 300), 0.25)
    a, b = hidden.cuda().requires_grad_(), table.cuda().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        got = linear_cross_entropy(a, b, labels.cuda(), chunk=128)
    wide = [tensor.double().requires_grad_() for tensor in (hidden, table)]
    want = linear_cross_entropy_reference(*wide, labels)
    tolerance = HALF if half else SINGLE
    assert_near(got, want, tolerance)
    assert (got[:, ::7] == 0).all()
    grads = torch.autograd.grad((got * weights.cuda()).sum(), (a, b))
    wanted = torch.autograd.grad((want * weights.double()).sum(), wide)
    for got_grad, want_grad in zip(grads, wanted, strict=True):
        assert_near(got_grad, want_grad, tolerance)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_a_cpu(name: str, half: bool) -> None:
    network = model(name).eval()
    tokens, labels, layout = rows()
    twin = model(name).eval()
    want = twin.token_nll(tokens, labels, layout)
    want.sum().backward()
    network.cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        got = network.token_nll(tokens.cuda(), labels.cuda(), moved(layout))
    got.sum().backward()
    assert_near(got, want, HALF if half else SINGLE, "losses")
    both = list(zip(network.named_parameters(), twin.parameters(), strict=True))
    largest = max(float(q.grad.abs().max()) for _, q in both if q.grad is not None)
    for (part, p), q in both:
        assert (p.grad is None) == (q.grad is None), part
        if q.grad is not None:
            # small gradients are differences of large ones, so that they are judged beside the largest
            error = float((p.grad.double().cpu() - q.grad).abs().max())
            assert error <= (3 * HALF if half else 5 * SINGLE) * largest, (
                f"{part}: {error:.1e} of {largest:.1e}"
            )


@pytest.mark.parametrize("name", MODELS)
def test_nothing_depends_on_later_tokens(name: str) -> None:
    network = model(name).cuda().eval()
    report = audit(network, VOCAB, checks=UNTRAINED)
    assert report.passed, report


@pytest.mark.parametrize("name", MODELS)
def test_cached_decoding_equals_the_full_forward(name: str) -> None:
    network = model(name).cuda().eval()
    tokens = rows()[0].cuda()
    with torch.no_grad():
        want = network(tokens).logits
        state = network.init_state(len(tokens), LENGTH)
        parts = [network.extend(tokens[:, :20], state).logits]
        parts += [network.extend(tokens[:, t : t + 1], state).logits for t in range(20, LENGTH)]
    assert_near(torch.cat(parts, dim=1), want, SINGLE)


@pytest.mark.parametrize("name", MODELS)
def test_a_replayed_step_writes_the_text_of_the_plain_one(name: str) -> None:
    """Through the graph, several rows of which one ends early; to the token in fp32."""
    network, prompts = model(name).cuda().eval(), rows()[0][:, :9].cuda()
    config = SamplingConfig(temperature=1.0, seed=2)
    want = generate(network, prompts, 80, config, native=False)
    end = want.tokens[1][30]
    want = generate(network, prompts, 80, config, eos_id=end, native=False)
    got = generate(network, prompts, 80, config, eos_id=end)
    assert got.tokens == want.tokens
    for a, b in zip(got.logprobs, want.logprobs, strict=True):
        assert_near(torch.tensor(a), torch.tensor(b), SINGLE)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_that_of_a_cpu(name: str) -> None:
    network, prompts = model(name).eval(), rows()[0][:, :9]
    want = generate(network, prompts, 12, SamplingConfig(temperature=0.0), native=False)
    got = generate(network.cuda(), prompts.cuda(), 12, SamplingConfig(temperature=0.0))
    assert got.tokens == want.tokens


def train(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "train.py", *arguments, f"run.root={folder}", "size=tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_every_phase_runs(tmp_path: Path) -> None:
    """From text to a fused model with memory, its evaluation and a continuation."""
    train(tmp_path, "phase=mla", "expert=all", "stage=7d")
    train(tmp_path, "phase=eval")
    train(tmp_path, "phase=audit")
    assert "In the" in train(tmp_path, "phase=generate", "prompt=In the")
