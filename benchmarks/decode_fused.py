"""Decoding with all experts: the fused native step beside the sum of its parts, measured in the same run.

A part is what a step costs with it less what it costs without: a model without layers is the head, the same behind
an MLA is MLA, router and head, an expert alone less the head is its body. Each runs alone, again and again, and so
keeps what of its weights the caches hold.

The same parts in turn, one step of each a token, find the caches as they find them in the fused step: full of the
weights of the others. There the bodies have a head of a few rows, and their calls, which the fused step saves, are
taken off: those of as many models without layers.

A greedy step needs the likeliest token alone, and finds it by a coarse copy of the head; so do its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch

from benchmarks.harness import Case, Group, Measured, Missing, Options, close
from benchmarks.harness.process import at_its_best
from nano_think.engine.native_step import NativeStep, Precision
from nano_think.evals.audit.live import live_copy
from nano_think.experts.diffuser import DiffuserExpert
from nano_think.experts.state_space import StateSpaceExpert
from nano_think.experts.transformer import TransformerExpert
from nano_think.mla import MultiHeadLatentAttention
from nano_think.model import ExpertLM, NanoThink
from nano_think.ops.native import BuildError, find_compiler

TOLERANCES: dict[Precision, float] = {"fp32": 1e-4, "bf16": 5e-2, "int8": 1e-1}
PARTS = ("transformer", "diffuser", "state_space")
HEAD, FRONT = "head alone", "MLA, router and head"
IN_TURN, CALLS = "parts in turn", "calls of empty models"
NO_HEAD = 16  # rows of a head that costs nothing
GREEDY = " greedy"


@dataclass(frozen=True)
class Job:
    """The plan's model: vocabulary, width, heads, layers of the three experts; prompt and new tokens."""

    vocab_size: int = 32_000
    d_model: int = 384
    num_heads: int = 6
    layers: tuple[int, int, int] = (6, 4, 6)
    ffn: tuple[int, int] = (1536, 512)
    prompt: int = 128
    new: int = 64

    def experts(self) -> dict[str, Any]:
        """All three, without dropout."""
        d, heads, (first, second, third) = self.d_model, self.num_heads, self.layers
        return {
            "transformer": TransformerExpert(d, first, heads, self.ffn[0], dropout=0.0),
            "diffuser": DiffuserExpert(d, second, heads, self.ffn[1], dropout=0.0),
            "state_space": StateSpaceExpert(d, third, 2 * d, dropout=0.0),
        }

    def model(self, name: str, vocab_size: int | None = None) -> ExpertLM | NanoThink:
        """`fused`, one of PARTS, HEAD or FRONT, of fresh weights in which no path is zero."""
        vocab_size = vocab_size or self.vocab_size
        nothing = TransformerExpert(self.d_model, 0, self.num_heads, dropout=0.0)
        mla = partial(MultiHeadLatentAttention, num_heads=self.num_heads)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made: ExpertLM | NanoThink
            if name in ("fused", FRONT):
                experts = self.experts() if name == "fused" else {"nothing": nothing}
                made = NanoThink(experts, vocab_size, self.d_model, mla=mla)
            else:
                expert = nothing if name == HEAD else self.experts()[name]
                made = ExpertLM((vocab_size, self.d_model), expert)
            live, _ = live_copy(made)
        assert isinstance(live, ExpertLM | NanoThink)
        return live

    def tokens(self, length: int) -> torch.Tensor:
        """(1, length) at random."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(self.vocab_size, (1, length), generator=generator)


QUICK = Job(64, 32, 2, (1, 1, 1), (64, 64), 8, 8)


def group(options: Options) -> Group:
    """Every precision: the fused step, and what is added up beside it."""
    job = QUICK if options.quick else Job()
    title = (
        f"fused decoding, batch 1, three experts of {job.layers} layers, d {job.d_model}, vocabulary "
        f"{job.vocab_size:,}, prompt {job.prompt} + {job.new} new"
    )
    cases = [Case("fused plain fp32", setup=partial(plain, job), tokens=job.new, max_rounds=3)]
    try:
        find_compiler()
    except BuildError as error:
        return Group(title, cases, [Missing("native", str(error))])
    derived: dict[str, Callable[[Measured], float]] = {}
    for precision in get_args(Precision):
        check = partial(same_logits, job, precision)
        peers = ("fused plain fp32",)
        for name in ("fused", *PARTS, HEAD, FRONT):
            whole = {"peers": peers, "check": check} if name == "fused" else {}
            setup = partial(native, job, name, precision)
            cases.append(Case(f"{name} {precision}", setup=setup, tokens=job.new, **whole))
            if name in ("fused", FRONT):
                greedy = partial(native, job, name, precision, best=1)
                cases.append(Case(f"{name} {precision}{GREEDY}", setup=greedy, tokens=job.new))
        for name, setup in (
            (IN_TURN, partial(in_turn, job, precision)),
            (CALLS, partial(calls, job, precision)),
        ):
            cases.append(Case(f"{name} {precision}", setup=setup, tokens=job.new))
        for way in ("", GREEDY):
            name = f"fused {precision}{way}: step over the sum of its parts"
            derived[name] = partial(over_sum, precision=precision, way=way)
        derived[f"fused {precision}: step over its parts in turn"] = partial(over_turn, precision=precision)
    return Group(
        title, cases, (), ("Every step but greedy ones gives the logits of the whole vocabulary.",), derived
    )


def over_sum(measured: Measured, precision: Precision, way: str) -> float:
    """Median over the rounds."""

    def figure(seconds: Mapping[str, float]) -> float:
        bodies = sum(seconds[f"{name} {precision}"] - seconds[f"{HEAD} {precision}"] for name in PARTS)
        return seconds[f"fused {precision}{way}"] / (bodies + seconds[f"{FRONT} {precision}{way}"])

    return measured.over_rounds(figure)


def over_turn(measured: Measured, precision: Precision) -> float:
    """Median over the rounds."""

    def figure(seconds: Mapping[str, float]) -> float:
        parts = seconds[f"{IN_TURN} {precision}"] - seconds[f"{CALLS} {precision}"]
        return seconds[f"fused {precision}"] / parts

    return measured.over_rounds(figure)


def in_turn(job: Job, precision: Precision) -> Callable[[], object]:
    """As `native`, one step of every body and then of MLA, router and head for each token."""
    names = ((FRONT, job.vocab_size), *((name, NO_HEAD) for name in PARTS))
    steps = [NativeStep(job.model(*name), precision, max_len=job.prompt + job.new) for name in names]
    tokens = job.tokens(job.new)[0].tolist()

    def work() -> None:
        for step in steps:
            step.position = job.prompt
        for token in tokens:
            for step, (_, vocab_size) in zip(steps, names, strict=True):
                step.step(token % vocab_size)

    return work


def calls(job: Job, precision: Precision) -> Callable[[], object]:
    """As `native`, of models without layers and with hardly a head, one for each of PARTS."""
    step = NativeStep(job.model(HEAD, NO_HEAD), precision, max_len=job.prompt + job.new)

    def work() -> None:
        for position in range(job.prompt, job.prompt + job.new):
            for _ in PARTS:
                step.position = position
                step.step(0)

    return work


def native(job: Job, name: str, precision: Precision, best: int | None = None) -> Callable[[], object]:
    """From the prompt's end, the same tokens each time, behind keys of zeros: no value changes a time."""
    step = NativeStep(job.model(name), precision, max_len=job.prompt + job.new)
    tokens = job.tokens(job.new)[0].tolist()

    def work() -> None:
        step.position = job.prompt
        for token in tokens:
            step.step_rows([token], best=best)

    return work


def plain(job: Job) -> Callable[[], object]:
    """`NanoThink.extend`, one position at a time."""
    model, tokens = job.model("fused"), job.tokens(job.prompt + job.new)

    @torch.no_grad()
    def work() -> None:
        state = model.init_state(1, job.prompt + job.new)
        model.extend(tokens[:, :1], state)
        for position in range(1, job.new + 1):
            model.extend(tokens[:, position : position + 1], state)

    return at_its_best(work)


@torch.no_grad()
def same_logits(job: Job, precision: Precision) -> None:
    """The fused step's logits after eight further tokens, against one pass of the plain model."""
    model, tokens = job.model("fused"), job.tokens(job.prompt + 8)
    want = model(tokens).logits
    assert want is not None
    step = NativeStep(model, precision, max_len=job.prompt + 8)
    step.prefill(tokens[0, : job.prompt].tolist())
    for position in range(job.prompt, job.prompt + 8):
        got = step.step(int(tokens[0, position]))
        close(f"a fused logit in {precision}", got, want[0, position], TOLERANCES[precision])
