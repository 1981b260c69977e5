"""Decoding one row: the native step, our plain PyTorch step, llama.cpp and Hugging Face Llama.

One unit is NEW greedy tokens after a prompt that was read before the clock started. `generate` cases read the
prompt too; ours finds its weights packed, by a call before, as they stay until the model changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks.harness import Case, Group, Measured, Missing, Options, close
from benchmarks.harness.case import installed
from benchmarks.harness.process import at_its_best
from benchmarks.harness.reading import read_all
from benchmarks.peers import llama_cpp_models as llama_cpp
from benchmarks.peers.language_models import Size, llama, ours
from nano_think.engine.compiled import compiled_decoder
from nano_think.engine.generate import generate
from nano_think.engine.native_step import NativeStep, Precision
from nano_think.engine.sampling import SamplingConfig
from nano_think.experts.state_space import StateSpaceExpert
from nano_think.model import ExpertLM
from nano_think.ops.native import BuildError, find_compiler

# Largest difference of a logit from the plain fp32 step, as a share of the largest logit.
TOLERANCES: dict[Precision, float] = {"fp32": 1e-4, "bf16": 3e-2, "int8": 6e-2}
# The same weights of llama.cpp, whose cache is f16 in all types.
LLAMA_TOLERANCES: dict[llama_cpp.Kind, float] = {"fp32": 2e-3, "f16": 2e-3, "bf16": 3e-2, "q8_0": 3e-2}
# What each precision of ours is held against.
LLAMA_RIVALS: dict[Precision, tuple[llama_cpp.Kind, ...]] = {
    "fp32": ("fp32",),
    "bf16": ("bf16", "f16"),
    "int8": ("q8_0",),
}
HF_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
READ = "read the {} weights"
SLOW = 9  # rounds of the peers that take seconds a unit
LONG = 4096  # context of the state-space cases, against the prompt's
NOTES = (
    "The share of the reading speed counts the weights alone; keys and values come on top.",
    "llama.cpp: without flash attention, which is the faster here; its cache of keys and values is f16.",
    "torch's products of fp32 are those of oneDNN or of MKL, whichever takes a case less time.",
    "Beside coarse weights keys and values are bf16. Hugging Face bf16 rounds activations too.",
)


@dataclass(frozen=True)
class Job:
    """A network, its prompts and how many tokens follow each."""

    size: Size = field(default_factory=Size)
    prompt: int = 128
    new: int = 128
    rows: int = 1

    def tokens(self) -> Tensor:
        """The prompts, (rows, prompt)."""
        return self.size.draw(self.rows, self.prompt)[0]


QUICK = Job(Size(num_layers=1, d_model=32, num_heads=2, ffn_dim=64, vocab_size=64, length=64), 8, 8)


def group(options: Options) -> Group:
    """Native precisions and both plain steps; whole generations; the state-space expert at two contexts."""
    job = QUICK if options.quick else Job()
    cases, missing = [_case(job, "plain fp32", plain_step)], []
    rivals: tuple[str, ...] = ("plain fp32",)
    if options.compiled:
        cases.append(_case(job, "compiled fp32", compiled_step, peers=rivals))
    if installed("transformers"):
        cases += [
            _case(
                job,
                f"HF {name}",
                partial(hugging_face, dtype=dtype),
                check=partial(same_network, job),
                max_rounds=SLOW,
            )
            for name, dtype in HF_TYPES.items()
        ]
        cases += [
            _case(job, f"HF generate {name}", partial(hugging_face_generate, dtype=dtype), max_rounds=SLOW)
            for name, dtype in HF_TYPES.items()
        ]
        rivals += tuple(f"HF {name}" for name in HF_TYPES)
    else:
        missing += [Missing(f"HF {name}", "pip install transformers") for name in HF_TYPES]
    llamas = llama_cases(job)
    cases, missing = cases + llamas, missing + ([] if llamas else [Missing("llama.cpp", llama_cpp.HOW)])
    try:
        find_compiler()
    except BuildError as error:
        return Group(_title(job), cases, [*missing, Missing("native", str(error))], NOTES)
    cases += [_case(job, READ.format(p), partial(reading, precision=p)) for p in get_args(Precision)]
    cases += [_native_case(job, precision, rivals, bool(llamas)) for precision in get_args(Precision)]
    whole = tuple(f"HF generate {name}" for name in HF_TYPES) if installed("transformers") else ()
    cases += [
        _case(job, f"nano_think generate {p}", partial(our_generate, precision=p), peers=whole)
        for p in get_args(Precision)
    ]
    contexts = (job.prompt, 2 * job.prompt if options.quick else LONG)
    cases += [
        _case(job, f"state space native, context {n}", partial(state_space, context=n)) for n in contexts
    ]
    derived: dict[str, Callable[[Measured], float]] = {
        f"native {p}: share of the reading speed": partial(read_share, precision=p)
        for p in get_args(Precision)
    }
    derived["state space: speed at the long context over that at the short one"] = partial(
        flat, contexts=contexts
    )
    return Group(_title(job), cases, missing, NOTES, derived)


def flat(measured: Measured, contexts: tuple[int, int]) -> float:
    """Median over the rounds."""
    short, long = (f"state space native, context {n}" for n in contexts)
    return measured.over_rounds(lambda seconds: seconds[short] / seconds[long])


def _title(job: Job) -> str:
    size = job.size
    return (
        f"decoding, batch 1, {size.num_layers} layers, d {size.d_model}, vocabulary {size.vocab_size:,}, "
        f"prompt {job.prompt} + {job.new} new"
    )


def _case(job: Job, name: str, setup: Callable[[Job], Any], **more: Any) -> Case:
    return Case(name, setup=partial(setup, job), tokens=job.new, **more)


def llama_cases(job: Job) -> list[Case]:
    """One a type; none where the library is not there."""
    if not llama_cpp.available():
        return []
    return [
        _case(
            job,
            f"llama.cpp {kind}",
            partial(llama_step, kind=kind),
            check=partial(same_llama, job, kind, tolerance),
        )
        for kind, tolerance in LLAMA_TOLERANCES.items()
    ]


def _native_case(job: Job, precision: Precision, rivals: tuple[str, ...], with_llama: bool) -> Case:
    theirs = tuple(f"llama.cpp {kind}" for kind in LLAMA_RIVALS[precision] if with_llama)
    return _case(
        job,
        f"native {precision}",
        partial(native, precision=precision),
        peers=(*rivals, *theirs),
        check=partial(same_logits, job, precision),
    )


def model_of(job: Job) -> ExpertLM:
    """Our network of the job's size."""
    model = ours(job.size).network
    assert isinstance(model, ExpertLM)
    return model.eval()


def reading(job: Job, precision: Precision) -> Callable[[], object]:
    """Read the packed weights once for each new token and do next to nothing with them."""
    weights = NativeStep(model_of(job), precision, max_len=1).weights

    def work() -> None:
        for _ in range(job.new):
            read_all(weights)

    return work


def read_share(measured: Measured, precision: Precision) -> float:
    """Time that reading the weights alone takes over that of the step, median over the rounds."""
    read, step = READ.format(precision), f"native {precision}"
    return measured.over_rounds(lambda seconds: seconds[read] / seconds[step])


def native(job: Job, precision: Precision) -> Callable[[], object]:
    """Always from the prompt's end; what was written behind it is overwritten."""
    step = NativeStep(model_of(job), precision, max_len=job.prompt + job.new)
    first = int(step.prefill(job.tokens()[0].tolist()).argmax())

    def work() -> None:
        token, step.position = first, job.prompt
        for _ in range(job.new):
            token = int(step.step(token).argmax())

    return work


def state_space(job: Job, context: int) -> Callable[[], object]:
    """The native step of a state-space expert of our size behind `context` tokens."""
    expert = StateSpaceExpert(job.size.d_model, job.size.num_layers, 2 * job.size.d_model)
    model = ExpertLM((job.size.vocab_size, job.size.d_model), expert).eval()
    step = NativeStep(model, max_len=context + job.new)
    first = int(step.prefill(job.size.draw(1, context)[0][0].tolist()).argmax())

    def work() -> None:
        token, step.position = first, context
        for _ in range(job.new):
            token = int(step.step(token).argmax())

    return work


def plain_step(job: Job) -> Callable[[], object]:
    """`ExpertLM.extend`, one position at a time."""
    model = model_of(job)
    state = model.init_state(1, job.prompt + job.new)
    with torch.no_grad():
        first = _last(model, job.tokens(), state)

    @torch.no_grad()
    def work() -> None:
        token = first
        for _ in range(job.new):
            token = _last(model, token, state)
        state.rollback(job.new)

    return at_its_best(work)


def compiled_step(job: Job) -> Callable[[], object]:
    """The plain step as one compiled function of tensors."""
    decoder = compiled_decoder(model_of(job), max_len=job.prompt + job.new)
    first = decoder.prefill(job.tokens()).argmax(dim=-1, keepdim=True)

    def work() -> None:
        token, decoder.position = first, job.prompt
        for _ in range(job.new):
            token = decoder.step(token)[0].argmax(dim=-1, keepdim=True)

    return work


def _last(model: ExpertLM, tokens: Tensor, state: Any) -> Tensor:
    logits = model.extend(tokens, state).logits
    assert logits is not None
    return logits[:, -1:].argmax(dim=-1)


def llama_step(job: Job, kind: llama_cpp.Kind) -> Callable[[], object]:
    """As `native`, from the prompt's end: all rows in one context, one call a position."""
    model = llama_cpp.LlamaCpp(job.size, kind, rows=job.rows, length=job.prompt + job.new)
    first = model.prefill(job.tokens()).argmax(dim=-1).tolist()

    def work() -> None:
        tokens = first
        model.forget(job.prompt)
        for position in range(job.prompt, job.prompt + job.new):
            tokens = model.step(tokens, position).argmax(dim=-1).tolist()

    return work


def hugging_face(job: Job, dtype: torch.dtype) -> Callable[[], object]:
    """`generate` with a cache that holds all of the prompt but its last token."""
    from transformers import DynamicCache

    model: Any = llama(job.size).network.eval().to(dtype)
    tokens, cache = job.tokens(), DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens[:, :-1], past_key_values=cache, use_cache=True)

    return at_its_best(lambda: model.generate(tokens, past_key_values=copy.deepcopy(cache), **_greedy(job)))


def hugging_face_generate(job: Job, dtype: torch.dtype) -> Callable[[], object]:
    """Prompt and new tokens."""
    model: Any = llama(job.size).network.eval().to(dtype)
    tokens = job.tokens()
    return at_its_best(lambda: model.generate(tokens, **_greedy(job)))


def _greedy(job: Job) -> dict[str, Any]:
    length = {"max_new_tokens": job.new, "min_new_tokens": job.new}
    return {"do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None, **length}


def our_generate(job: Job, precision: Precision) -> Callable[[], object]:
    """Prompt and new tokens, without log-probabilities, as Hugging Face's; the prompt is read in fp32."""
    model, prompt, greedy = model_of(job), job.tokens(), SamplingConfig(temperature=0.0)
    options: Any = {"native": True, "precision": precision, "logprobs": False}
    return at_its_best(lambda: generate(model, prompt, job.new, greedy, **options))


@torch.no_grad()
def same_logits(job: Job, precision: Precision) -> None:
    """The step's logits after the prompt and eight given tokens, against those of the plain fp32 step."""
    model, tokens = model_of(job), job.size.draw(1, job.prompt + 8)[0]
    step = NativeStep(model, precision, max_len=job.prompt + 8)
    step.prefill(tokens[0, : job.prompt].tolist())
    state = model.init_state(1, job.prompt + 8)
    model.extend(tokens[:, : job.prompt], state)
    for token in tokens[0, job.prompt :].tolist():
        want = model.extend(torch.tensor([[token]]), state).logits
        assert want is not None
        close(f"a logit in {precision}", step.step(token), want[0, -1], TOLERANCES[precision])


@torch.no_grad()
def same_network(job: Job) -> None:
    """Hugging Face's logits of the prompt's last token are ours."""
    network: Any = llama(job.size).network.eval()
    want = model_of(job)(job.tokens()).logits
    assert want is not None
    close("a logit of Hugging Face's model", network(job.tokens()).logits[0, -1], want[0, -1], 1e-4)


@torch.no_grad()
def same_llama(job: Job, kind: llama_cpp.Kind, tolerance: float) -> None:
    """llama.cpp's logits after the prompt and after four more tokens are ours."""
    tokens = job.size.draw(1, job.prompt + 4)[0]
    model = llama_cpp.LlamaCpp(job.size, kind, rows=1, length=job.prompt + 4)
    want = model_of(job)(tokens).logits
    assert want is not None
    got = model.prefill(tokens[:, : job.prompt])
    for position in range(job.prompt, job.prompt + 4):
        close(f"a logit of llama.cpp in {kind}", got, want[:, position - 1], tolerance)
        got = model.step(tokens[:, position].tolist(), position)
