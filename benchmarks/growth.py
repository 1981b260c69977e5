"""What each expert costs as texts and networks grow: forward and backward, without table and head."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Group, Measured, Options, close
from benchmarks.harness.statistics import slope
from nano_think.experts.diffuser import DiffuserExpert
from nano_think.experts.state_space import StateSpaceExpert
from nano_think.experts.transformer import TransformerExpert

LENGTHS, QUICK_LENGTHS = (256, 512, 1024, 2048, 4096), (8, 16)
LENGTH = 512  # of the cases that differ in size
GATE_LENGTH = 48
# d_model and the keywords of each expert, as conf/expert states them for the size of that name
SIZES: dict[str, tuple[int, dict[str, dict[str, int]]]] = {
    "tiny": (64, {"transformer": {"num_layers": 2, "num_heads": 4, "ffn_dim": 128},
                  "diffuser": {"num_layers": 2, "num_heads": 4, "ffn_dim": 64},
                  "state space": {"num_layers": 2, "d_inner": 128}}),
    "small": (128, {"transformer": {"num_layers": 4, "num_heads": 4, "ffn_dim": 384},
                    "diffuser": {"num_layers": 3, "num_heads": 4, "ffn_dim": 256},
                    "state space": {"num_layers": 4, "d_inner": 256}}),
    "seed": (384, {"transformer": {"num_layers": 6, "num_heads": 6, "ffn_dim": 1536},
                   "diffuser": {"num_layers": 4, "num_heads": 6, "ffn_dim": 512},
                   "state space": {"num_layers": 6, "d_inner": 768}}),
}  # fmt: skip
CLASSES: dict[str, Callable[..., nn.Module]] = {
    "transformer": TransformerExpert,
    "diffuser": DiffuserExpert,
    "state space": StateSpaceExpert,
}
NOTES = (
    "One row, fp32, no dropout. The diffuser runs its clean stream and one noisy pass.",
    "A slope of 1 is linear in the length, 2 quadratic.",
)


def group(options: Options) -> Group:
    """Every expert at seed size over the lengths, and at every size at one length."""
    lengths = QUICK_LENGTHS if options.quick else LENGTHS
    largest, at = ("tiny", QUICK_LENGTHS[-1]) if options.quick else ("seed", LENGTH)
    cases = [_case(name, largest, length) for name in CLASSES for length in lengths]
    if not options.quick:
        cases += [_case(name, size, at) for name in CLASSES for size in SIZES if size != largest]
    derived = {
        f"slope of log time over log length, {name}": partial(_slope, name, largest, lengths)
        for name in CLASSES
    }
    title = f"experts, forward and backward, {largest} size over lengths, other sizes at {at} tokens"
    return Group(title, cases, (), NOTES, derived)


def _case(name: str, size: str, length: int) -> Case:
    setup = partial(forward_backward, name, size, length)
    return Case(f"{name} {size} {length}", setup=setup, tokens=length, check=_gate(name, size))


@cache
def _gate(name: str, size: str) -> Callable[[], object]:
    """One for all lengths, so that it runs once."""
    return partial(decoding_equals_forward, name, size)


def _slope(name: str, size: str, lengths: tuple[int, ...], measured: Measured) -> float:
    return measured.over_rounds(
        lambda seconds: slope(lengths, [seconds[f"{name} {size} {length}"] for length in lengths])
    )


def build(name: str, size: str) -> Any:
    """The expert with every parameter live: gates that start at zero would hide half of a fresh denoiser."""
    d_model, keywords = SIZES[size]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expert: Any = CLASSES[name](d_model, dropout=0.0, **keywords[name])
        if name == "diffuser":
            expert.fit_statistics(torch.randn(64, d_model))
        for parameter in expert.parameters():
            if not parameter.detach().any():
                nn.init.normal_(parameter, std=0.02)
    return expert.eval()


def _draw(size: str, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, length, SIZES[size][0], generator=generator)


def forward_backward(name: str, size: str, length: int) -> Callable[[], object]:
    """Gradients of every weight and of the input, for fixed weights on the output."""
    expert, x = build(name, size), _draw(size, length).requires_grad_()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))

    def work() -> None:
        x.grad = None
        expert.zero_grad(set_to_none=True)
        expert(x).backward(upstream)

    return work


@torch.no_grad()
def decoding_equals_forward(name: str, size: str) -> None:
    """One position at a time over the decode state gives what the whole pass gives."""
    expert, x = build(name, size), _draw(size, GATE_LENGTH)
    state = expert.init_state(1, GATE_LENGTH)
    steps = [expert.extend(position, state) for position in x.split(1, dim=1)]
    close(f"the output of the {name}", torch.cat(steps, dim=1), expert(x), 1e-3)
