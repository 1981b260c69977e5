"""Decoding 16 rows at once: the native step, the plain one, llama.cpp with 16 sequences, Hugging Face Llama.

One unit is NEW greedy tokens of every row after prompts that were read before the clock started. The work is
products of matrices with 16 columns, so shares are of the GEMM peak: 2 FLOPs a weight, row and token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch

from benchmarks.decode import (
    HF_TYPES,
    LLAMA_RIVALS,
    LLAMA_TOLERANCES,
    QUICK,
    SLOW,
    TOLERANCES,
    Job,
    llama_step,
    model_of,
)
from benchmarks.decode import hugging_face as hugging_face_rows
from benchmarks.harness import Case, Group, Missing, Options, close
from benchmarks.harness.case import Peak, installed
from benchmarks.harness.process import at_its_best
from benchmarks.peers import llama_cpp_models as llama_cpp
from nano_think.engine.native_step import NativeStep, Precision
from nano_think.ops.native import BuildError, find_compiler

ROWS = 16
PEAKS: dict[str, Peak] = {"fp32": "fp32", "bf16": "bf16"}


def group(options: Options) -> Group:
    """Each precision against its peers."""
    job = replace(QUICK if options.quick else Job(), rows=ROWS)
    cases, missing = [_case(job, "plain fp32", plain_rows, peak="fp32")], []
    rivals = ["plain fp32"]
    if installed("transformers"):
        for name, dtype in HF_TYPES.items():
            setup = partial(hugging_face_rows, dtype=dtype)
            cases.append(_case(job, f"HF {name}", setup, peak=PEAKS[name], max_rounds=SLOW))
            rivals.append(f"HF {name}")
    else:
        missing += [Missing(f"HF {name}", "pip install transformers") for name in HF_TYPES]
    with_llama = llama_cpp.available()
    if with_llama:
        cases += [_llama_case(job, kind) for kind in LLAMA_TOLERANCES]
    else:
        missing.append(Missing("llama.cpp", llama_cpp.HOW))
    try:
        find_compiler()
        cases += [_native_case(job, precision, rivals, with_llama) for precision in get_args(Precision)]
    except BuildError as error:
        missing.append(Missing("native", str(error)))
    size = job.size
    title = (
        f"decoding, batch {ROWS}, {size.num_layers} layers, d {size.d_model}, vocabulary {size.vocab_size:,}, "
        f"prompt {job.prompt} + {job.new} new"
    )
    return Group(title, cases, missing, ("llama.cpp reads the 16 sequences in one call.",))


def _case(job: Job, name: str, setup: Callable[[Job], Any], peak: Peak | None = None, **more: Any) -> Case:
    tokens = job.rows * job.new
    flops = {"flops": 2.0 * job.size.parameters * tokens, "peak": peak} if peak else {}
    return Case(name, setup=partial(setup, job), tokens=tokens, **flops, **more)


def _llama_case(job: Job, kind: llama_cpp.Kind) -> Case:
    check = partial(same_llama, job, kind, LLAMA_TOLERANCES[kind])
    return _case(job, f"llama.cpp {kind}", partial(llama_step, kind=kind), check=check, peak=PEAKS.get(kind))


def _native_case(job: Job, precision: Precision, rivals: list[str], with_llama: bool) -> Case:
    theirs = [f"llama.cpp {kind}" for kind in LLAMA_RIVALS[precision] if with_llama]
    return _case(
        job,
        f"native {precision}",
        partial(native_rows, precision=precision),
        peers=(*rivals, *theirs),
        check=partial(same_rows, job, precision),
        peak=None if precision == "int8" else "fp32",  # bf16 weights meet fp32 activations
    )


def native_rows(job: Job, precision: Precision) -> Callable[[], object]:
    """One native call a position for all rows."""
    step = NativeStep(model_of(job), precision, max_len=job.prompt + job.new, batch=job.rows)
    first = step.prefill(job.tokens()).argmax(dim=-1).tolist()

    def work() -> None:
        tokens, step.position = first, job.prompt
        for _ in range(job.new):
            tokens = step.step_rows(tokens).argmax(dim=-1).tolist()

    return work


def plain_rows(job: Job) -> Callable[[], object]:
    """`ExpertLM.extend` of all rows, one position at a time."""
    model = model_of(job)
    state = model.init_state(job.rows, job.prompt + job.new)

    @torch.no_grad()
    def read(tokens: torch.Tensor) -> torch.Tensor:
        logits = model.extend(tokens, state).logits
        assert logits is not None
        return logits[:, -1:].argmax(dim=-1)

    first = read(job.tokens())

    def work() -> None:
        tokens = first
        for _ in range(job.new):
            tokens = read(tokens)
        state.rollback(job.new)

    return at_its_best(work)


@torch.no_grad()
def same_rows(job: Job, precision: Precision) -> None:
    """Logits of all rows after the prompt and three further tokens, against one pass of the plain model."""
    tokens = job.size.draw(job.rows, job.prompt + 3)[0]
    model = model_of(job)
    want = model(tokens).logits
    assert want is not None
    step = NativeStep(model, precision, max_len=job.prompt + 3, batch=job.rows)
    step.prefill(tokens[:, : job.prompt])
    for position in range(job.prompt, job.prompt + 3):
        got = step.step_rows(tokens[:, position].tolist())
        close(f"a logit of {job.rows} rows in {precision}", got, want[:, position], TOLERANCES[precision])


@torch.no_grad()
def same_llama(job: Job, kind: llama_cpp.Kind, tolerance: float) -> None:
    """Logits of all of llama.cpp's sequences, against one pass of ours."""
    tokens = job.size.draw(job.rows, job.prompt + 2)[0]
    want = model_of(job)(tokens).logits
    assert want is not None
    model = llama_cpp.LlamaCpp(job.size, kind, rows=job.rows, length=job.prompt + 2)
    got = model.prefill(tokens[:, : job.prompt])
    for position in range(job.prompt, job.prompt + 2):
        close(f"a logit of llama.cpp in {kind}", got, want[:, position - 1], tolerance)
        got = model.step(tokens[:, position].tolist(), position)
