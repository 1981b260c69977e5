"""State-space stack, forward and backward: ours, mambapy, Hugging Face Mamba and Mamba2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from benchmarks.harness import Case, Group, Measured, Missing, Options, close
from benchmarks.harness.case import installed
from benchmarks.harness.statistics import slope
from benchmarks.peers.state_space_models import BUILDERS, NORM_EPS, QUICK, Size

OURS = {"nano_think": "nano_think", "nano_think SSD": "nano_think SSD"}
# What must compute the same as which of ours, and what has to be installed for it.
TWINS = {"mambapy": "nano_think", "HF Mamba with mambapy": "nano_think", "HF Mamba": "nano_think"}
TWINS |= {"HF Mamba2": "nano_think SSD"}
NEEDS = {"mambapy": ("mambapy",), "HF Mamba with mambapy": ("transformers", "mambapy")}
NEEDS |= {"HF Mamba": ("transformers",), "HF Mamba2": ("transformers",)}
LENGTHS, SLOPE_LENGTHS = (512, 2048), (256, 512, 1024, 2048, 4096)
QUICK_LENGTHS = (8, 16)
GATE_LENGTH = 64
SLOW_ROUNDS = 9  # the loop over positions takes up to 25 s at length 512, quadratic in the length
NOTES = (
    "Inputs of one row, no embedding and no head, fp32.",
    "FLOPs of S6: projections, convolution, 6 a channel and state. Mamba-2 does other work and claims none.",
)


def group(options: Options) -> Group:
    """Stacks at two lengths; ours at more, for the slope of time over length."""
    size = QUICK if options.quick else Size()
    lengths = QUICK_LENGTHS if options.quick else LENGTHS
    slope_lengths = QUICK_LENGTHS if options.quick else SLOPE_LENGTHS
    names = [name for name in BUILDERS if all(installed(module) for module in NEEDS.get(name, ()))]
    cases = []
    for length in slope_lengths:
        at = replace(size, length=length)
        for name in names:
            if name == "nano_think" or (length in lengths and (length == lengths[0] or name != "HF Mamba")):
                cases.append(_case(at, name, names if length in lengths else ["nano_think"]))
    missing = [
        Missing(f"{name} {length}", f"pip install {' '.join(NEEDS[name])}")
        for name in BUILDERS
        if name not in names
        for length in lengths
    ]
    title = f"state-space stack, {size.num_layers} layers, inner {size.d_inner}, N {size.d_state}, fwd + bwd"
    derived = {"slope of log time over log length, nano_think": partial(length_slope, lengths=slope_lengths)}
    return Group(title, cases, missing, NOTES, derived)


def length_slope(measured: Measured, lengths: tuple[int, ...]) -> float:
    """Median over the rounds of the slope of our times."""
    return measured.over_rounds(
        lambda seconds: slope(lengths, [seconds[f"nano_think {length}"] for length in lengths])
    )


def _case(size: Size, name: str, present: list[str]) -> Case:
    rivals = [peer for peer in present if peer in TWINS and _meets(size, peer)]
    if name == "nano_think SSD":
        rivals = [peer for peer in rivals if peer == "HF Mamba2"]
    claims = name == "nano_think" or TWINS.get(name) == "nano_think"
    return Case(
        f"{name} {size.length}",
        setup=partial(forward_backward, size, name),
        tokens=size.tokens,
        flops=size.flops if claims else 0.0,
        peers=tuple(f"{peer} {size.length}" for peer in rivals) if name in OURS else (),
        check=partial(same_function, size, name) if name in TWINS else None,
        max_rounds=SLOW_ROUNDS if name == "HF Mamba" else None,
    )


def _meets(size: Size, peer: str) -> bool:
    """Whether a peer takes part at this length: the quadratic one does at the shortest only."""
    return peer != "HF Mamba" or size.length in (LENGTHS[0], QUICK_LENGTHS[0])


def forward_backward(size: Size, name: str) -> Callable[[], object]:
    """Forward, a sum with fixed weights, gradients of every weight and of the input."""
    model, stack = BUILDERS[name](size)
    x = size.draw()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))

    def work() -> None:
        x.grad = None
        model.zero_grad(set_to_none=True)
        stack(x).backward(upstream)

    return work


def same_function(size: Size, name: str) -> None:
    """Output and input gradient equal those of our stack with the same weights, to 1e-4 and 1e-3.

    Our entry's norm, the identity for these inputs but not for their gradients, is put before the other stack.
    """
    x = size.draw(min(GATE_LENGTH, size.length))
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    want = BUILDERS[TWINS[name]](size)[1](x)
    got = BUILDERS[name](size)[1](torch.nn.functional.rms_norm(x, (size.d_model,), eps=NORM_EPS))
    close("the output", got, want, 1e-4)
    (got_grad,), (want_grad,) = (torch.autograd.grad(out, x, upstream) for out in (got, want))
    close("the gradient of the input", got_grad, want_grad, 1e-3)
