"""Latency of the whole model: reading a prompt, per token at batch 1 and 16, and part by part.

The plan's model (vocabulary 32,000, d 384, three experts), or the checkpoint of `--checkpoint`, on the GPU where
there is one. Parts are timed by the plain PyTorch step at one row behind a prompt; what the native step spends on
each is in the group `decode_fused`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks.decode_fused import QUICK as QUICK_SIZES
from benchmarks.decode_fused import Job as Sizes
from benchmarks.harness import Case, Group, Measured, Missing, Options
from benchmarks.harness.case import Work
from nano_think.artifacts.checkpoint import load_checkpoint
from nano_think.engine.native_step import NativeStep, Precision, supports
from nano_think.evals.audit.live import filled_memory
from nano_think.model import ExpertLM, NanoThink
from nano_think.ops.native import BuildError, find_compiler
from nano_think.vector_records import Reader

PROMPTS, QUICK_PROMPTS = (128, 512), (8, 16)
ROWS = (1, 16)
NEW, QUICK_NEW = 32, 4
RECORDS, CHUNK = 10_000, 32
RECORDS_A_DOCUMENT = 4  # of `filled_memory`
NOTES = (
    "Memory: a search for the chunk just read, 3 of 10,000 records, once a chunk of 32 tokens.",
    "Parts are one row at the first position after the shorter prompt and those that follow it.",
)


@dataclass(frozen=True)
class Subject:
    """A model, where it is, and at which lengths it is timed."""

    name: str
    model: ExpertLM | NanoThink
    device: str
    prompts: tuple[int, ...]
    new: int

    def tokens(self, rows: int, length: int) -> Tensor:
        """(rows, length) at random."""
        drawn = torch.randint(
            self.model.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1)
        )
        return drawn.to(self.device)

    @cached_property
    def behind_prompt(self) -> Any:
        """The decode state of one row behind the shorter prompt."""
        return _filled(self, 1)


def group(options: Options) -> Group:
    """Prompts, tokens, parts."""
    subject = _subject(options)
    cases = [
        Case(f"prompt of {length}", setup=partial(prefill, subject, length), tokens=length)
        for length in subject.prompts
    ]
    missing: list[Missing] = []
    for rows in ROWS:
        setup = partial(plain, subject, rows)
        cases.append(Case(f"token, batch {rows}, plain", setup=setup, tokens=rows * subject.new))
    problem = _native_problem(subject)
    if problem is None:
        cases += [
            Case(
                f"token, batch {rows}, native {precision}",
                setup=partial(native, subject, rows, precision),
                tokens=rows * subject.new,
            )
            for rows in ROWS
            for precision in get_args(Precision)
        ]
    else:
        missing.append(Missing("native", problem))
    if isinstance(subject.model, NanoThink):
        parts = ["embedding and MLA", "router", *subject.model.experts, "fusion and head", "memory search"]
        cases += [
            Case(f"part: {part}", setup=partial(component, subject, part), tokens=subject.new)
            for part in parts
        ]
    derived = {
        f"{case.name}: ms": partial(milliseconds, case=case, steps=_steps(case, subject)) for case in cases
    }
    return Group(f"latency of {subject.name}", cases, missing, NOTES, derived, subject.device)


def milliseconds(measured: Measured, case: Case, steps: int) -> float:
    """Of one prompt, or of one step of all rows."""
    return measured.over_rounds(lambda seconds: 1e3 * seconds[case.name] / steps)


def _steps(case: Case, subject: Subject) -> int:
    return 1 if case.name.startswith("prompt") else subject.new


def _subject(options: Options) -> Subject:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompts, new = (QUICK_PROMPTS, QUICK_NEW) if options.quick else (PROMPTS, NEW)
    where = torch.cuda.get_device_name() if device == "cuda" else "the CPU"
    if options.checkpoint is None:
        sizes = QUICK_SIZES if options.quick else Sizes()
        model = sizes.model("fused")
        name = f"the plan's model, vocabulary {sizes.vocab_size:,}, d {sizes.d_model}, on {where}"
    else:
        checkpoint = load_checkpoint(options.checkpoint)
        model = checkpoint.model
        prompts = tuple(length for length in prompts if length + new <= checkpoint.spec["seq_len"])
        made = checkpoint.provenance.get("hash", "without a hash")
        name = f"checkpoint {checkpoint.name} {made} on {where}"
        if not prompts:
            raise SystemExit(
                f"{options.checkpoint} reads {checkpoint.spec['seq_len']} tokens: too few to time"
            )
    return Subject(name, model.to(device).eval(), device, prompts, new)


def _native_problem(subject: Subject) -> str | None:
    if subject.device != "cpu":
        return "it computes on the CPU"
    try:
        find_compiler()
    except BuildError as error:
        return str(error)
    return supports(subject.model)


@torch.no_grad()
def _filled(subject: Subject, rows: int) -> Any:
    state = subject.model.init_state(rows, subject.prompts[0] + subject.new)
    subject.model.extend(subject.tokens(rows, subject.prompts[0]), state)
    return state


def prefill(subject: Subject, length: int) -> Work:
    """One pass over a prompt into a fresh cache, as generation begins."""
    tokens = subject.tokens(1, length)

    @torch.no_grad()
    def work() -> None:
        subject.model.extend(tokens, subject.model.init_state(1, length))

    return work


def plain(subject: Subject, rows: int) -> Work:
    """`extend`, a position at a time, on a copy of the state behind the prompt."""
    state, tokens = _filled(subject, rows), subject.tokens(rows, subject.new)

    @torch.no_grad()
    def work() -> None:
        own = copy.deepcopy(state)
        for position in range(subject.new):
            subject.model.extend(tokens[:, position : position + 1], own)

    return work


def native(subject: Subject, rows: int, precision: Precision) -> Work:
    """One native call a position."""
    start = subject.prompts[0]
    step = NativeStep(subject.model, precision, max_len=start + subject.new, batch=rows)
    step.prefill(subject.tokens(rows, start))
    columns = subject.tokens(rows, subject.new).t().tolist()

    def work() -> None:
        step.position = start
        for tokens in columns:
            step.step_rows(tokens)

    return work


def component(subject: Subject, part: str) -> Work:
    """One part of the plain step, fed with what the parts before it would give."""
    steps = {"fusion and head": _head, "memory search": _search}.get(part, partial(_stateful, part=part))
    run = steps(subject)

    @torch.no_grad()
    def work() -> None:
        for _ in run():
            pass

    return work


def _stateful(subject: Subject, part: str) -> Callable[[], Iterator[None]]:
    """The MLA with the lookup, the router or an expert, over a copy of its state."""
    model: Any = subject.model
    name = "mla" if part == "embedding and MLA" else part
    module = getattr(model, name) if name in ("mla", "router") else model.experts[name]
    tokens = subject.tokens(1, subject.new)
    context = torch.randn(1, subject.new, model.embedding.embedding_dim, device=subject.device)
    state = subject.behind_prompt[name] if module is not None else None

    def run() -> Iterator[None]:
        own = copy.deepcopy(state)
        for i in range(subject.new):
            if name != "mla":
                module.extend(context[:, i : i + 1], own)
            elif module is None:
                model.embedding(tokens[:, i : i + 1])
            else:
                module.extend(model.embedding(tokens[:, i : i + 1]), own)
            yield

    return run


def _head(subject: Subject) -> Callable[[], Iterator[None]]:
    """The weighted sum and the logits."""
    model: Any = subject.model
    shape = (1, 1, model.embedding.embedding_dim)
    hidden = {name: torch.randn(shape, device=subject.device) for name in model.experts}
    weights = torch.full((1, 1, len(hidden)), 1 / len(hidden), device=subject.device)

    def run() -> Iterator[None]:
        for _ in range(subject.new):
            model.fuse(hidden, weights)
            yield

    return run


def _search(subject: Subject) -> Callable[[], Iterator[None]]:
    """One chunk looked up in a filled memory."""
    memory = filled_memory(subject.model.embedding.weight, CHUNK, documents=RECORDS // RECORDS_A_DOCUMENT)
    chunk = subject.tokens(1, CHUNK).cpu()

    def run() -> Iterator[None]:
        for _ in range(subject.new):
            memory.search(chunk, Reader())
            yield

    return run
