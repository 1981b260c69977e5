"""Autoregressive generation: one pass over the prompt, then one position a step, over one cache."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nano_think.engine import graph_step, native_sampling, sampling
from nano_think.engine.graph_step import GraphStep
from nano_think.engine.native_screen import LateLogprobs
from nano_think.engine.native_step import NativeStep, Precision, supports
from nano_think.engine.sampling import SamplingConfig, row_generators
from nano_think.ops.native import BuildError

NATIVE_FROM = 64  # new tokens from which a packed copy of the weights pays for itself

OnToken = Callable[[int, int, Tensor | None], None]


class LanguageModel(Protocol):
    """A module that reads tokens into a cache and returns logits for each."""

    @property
    def vocab_size(self) -> int:
        """Tokens it knows."""

    def init_state(self, batch: int, max_len: int, max_rollback: int = 0) -> Any:
        """An empty cache for `batch` rows of at most `max_len` positions."""

    def extend(self, tokens: Tensor, state: Any, **options: Any) -> Any:
        """Read new tokens (B, n): `logits` (B, n, V) and routing `weights` (B, n, N) or None.

        Asked for by `last_only`, logits may be those of the last token alone.
        """

    def modules(self) -> Iterator[nn.Module]:
        """As of nn.Module."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As of nn.Module."""

    def eval(self) -> Any:
        """As of nn.Module."""


class Memory(Protocol):
    """A reader of a vector store that follows the sequences of one batch."""

    def step(self, tokens: Tensor) -> Any:
        """Take in new tokens (B, n); returns the memory slots each of them may see, None for none."""


@dataclass
class Generation:
    """What `generate` produced, one entry a row.

    tokens: generated ids, with the end token where it was reached.
    logprobs: natural log-probability of each generated token, before temperature, top-k and top-p; empty where
    they were not asked for.
    weights: (n, N) routing weights at the positions that predicted the generated tokens, or None.
    prompt_weights: (P, N) routing weights at the prompt's positions; the last predicts the first new token.
    """

    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    weights: list[Tensor] | None = None
    prompt_weights: list[Tensor] | None = None


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    config: SamplingConfig | None = None,
    *,
    eos_id: int | None = None,
    banned_ids: Sequence[int] = (),
    row_ids: Sequence[int] | None = None,
    context: int | None = None,
    on_token: OnToken | None = None,
    memory: Memory | None = None,
    options: Mapping[str, Any] | None = None,
    native: bool | None = None,
    precision: Precision = "fp32",
    logprobs: bool = True,
) -> Generation:
    """Continue every prompt by up to max_new_tokens tokens; a row stops at `eos_id`.

    prompts: (B, P) token ids of one length P >= 1; an unconditional sample starts from the BOS token.
    banned_ids: never generated (padding, the start token).
    row_ids: names of the rows in the random streams, 0 .. B - 1 if None.
    context: most positions the model may read; generation ends when it is full.
    on_token: called as on_token(row, token id, routing weights (N,) or None) as each token is drawn.
    memory: its slots are passed to the model as `memory`.
    options: further arguments of `model.extend` (forced weights, knock-out).
    native: read the new tokens by `NativeStep`, on a GPU by `GraphStep`, which know neither memory nor options;
    None does so where the model allows it and max_new_tokens is at least NATIVE_FROM, and warns once where no
    compiler is found.
    precision: how the native step keeps the weights. Coarser ones than fp32 are not known to the plain step, so
    that asking for one uses the native step from the first new token on, and warns once where it cannot run.
    logprobs: whether those of the drawn tokens are wanted; one row is faster without, as they need the whole head.
    Raises ValueError for an empty or too long prompt, rows of unequal length, other than one name a row, and ids
    outside the vocabulary.
    """
    config = config or SamplingConfig()
    tokens = _prompt_tensor(prompts, model, context)
    batch, prompt_length = tokens.shape
    room = max_new_tokens if context is None else min(max_new_tokens, context - prompt_length + 1)
    if room < 1:
        raise ValueError(f"max_new_tokens must be at least 1, it is {max_new_tokens}")
    names = range(batch) if row_ids is None else row_ids
    if len(names) != batch:
        raise ValueError(f"row_ids must name {batch} rows, not {len(names)}")
    generators = row_generators(config.seed, names)
    rows = _Rows(batch, eos_id, on_token)
    banned = _token_ids(list(banned_ids), model, "banned")
    best = config.tokens_of_interest
    prompt_weights = None
    late: LateLogprobs | None = None
    with _evaluating(model):
        state = model.init_state(batch, prompt_length + room - 1)
        fast: NativeStep | GraphStep | None = None
        for step in range(room):
            if step == 1 and memory is None and not options:
                fast = _fast_step(model, state, prompt_length + room - 1, batch, room, native, precision)
            newest = [] if fast is None else [rows.tokens[row][-1] for row in rows.open]
            if isinstance(fast, GraphStep):
                logits, weights = fast.step_rows(newest, rows.open), fast.routing
            elif fast is not None:
                # the banned ones may be the likeliest
                logits = fast.step_rows(newest, rows.open, None if best is None else best + len(banned))
                weights = fast.routing
                if fast.screened and logprobs and late is None:
                    late = LateLogprobs(fast, banned, rows.logprobs[rows.open[0]])
            else:
                tokens = tokens if step == 0 else rows.last(tokens.device)
                slots = {} if memory is None else {"memory": memory.step(tokens)}
                output = model.extend(tokens, state, **(options or {}), **slots, last_only=True)
                if step == 0:
                    prompt_weights = output.weights
                logits = output.logits[rows.open, -1]  # a copy, as the step's are ours to write to
                weights = None if output.weights is None else output.weights[rows.open, -1]
            logits.index_fill_(-1, banned, -math.inf)
            choose = native_sampling.choose if isinstance(fast, NativeStep) else sampling.choose
            drawn, said = choose(logits, config, [generators[row] for row in rows.open])
            rows.add(drawn, said, weights)
            if late is not None:
                late.add(drawn[0])
            if not rows.open:
                break
    if late is not None:
        late.settle()
    return rows.generation(prompt_weights, logprobs)


def _fast_step(
    model: Any,
    state: Any,
    max_len: int,
    batch: int,
    new_tokens: int,
    wanted: bool | None,
    precision: Precision,
) -> NativeStep | GraphStep | None:
    """A step that goes on from `state` faster than the plain one, or None for that."""
    few = wanted is None and precision == "fp32" and new_tokens < NATIVE_FROM
    if wanted is False or few:
        return None
    if next(model.parameters()).is_cuda:
        return _graph_step(model, state, max_len, batch, precision)
    if wanted is None and (problem := supports(model)) is not None:
        if precision != "fp32":
            _warn_once(f"decoding with the model's own weights, not in {precision}: {problem}")
        return None
    try:
        fast = NativeStep(model, precision, max_len=max_len, batch=batch)
    except BuildError as error:
        if wanted:
            raise
        _warn_once(f"decoding by the plain PyTorch step, several times slower: {error}")
        return None
    fast.load(state)
    return fast


def _graph_step(model: Any, state: Any, max_len: int, batch: int, precision: Precision) -> GraphStep | None:
    """The plain step as a CUDA graph, in the model's own precision."""
    if precision != "fp32":
        _warn_once(f"decoding with the model's own weights, not in {precision}: that is for CPUs")
    if not graph_step.supports(model):
        return None
    fast = GraphStep(model, batch, max_len)
    try:
        fast.load(state)
    except RuntimeError as error:
        _warn_once(f"decoding by the plain PyTorch step, several times slower: {error}")
        return None
    return fast


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)


class _Rows:
    """The growing output. `open` names the rows that go on.

    The plain step still reads for a finished row, so that its batch keeps its shape; rows never see each other.
    """

    def __init__(self, batch: int, eos_id: int | None, on_token: OnToken | None) -> None:
        self.eos_id, self.on_token = eos_id, on_token
        self.open = list(range(batch))
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.logprobs: list[list[float]] = [[] for _ in range(batch)]
        self.weights: list[list[Tensor]] = [[] for _ in range(batch)]

    def last(self, device: torch.device) -> Tensor:
        """The newest token of every row, (B, 1)."""
        return torch.tensor([own[-1:] for own in self.tokens], device=device)

    def add(self, drawn: list[int], logprobs: list[float], weights: Tensor | None) -> None:
        """Of the n open rows keep the drawn tokens, their log-probabilities and routing weights (n, N)."""
        kept: Sequence[Tensor | None] = (
            [None] * len(drawn) if weights is None else list(weights.cpu().clone())
        )
        for row, token, logprob, own in zip(self.open, drawn, logprobs, kept, strict=True):
            self.tokens[row].append(token)
            self.logprobs[row].append(logprob)
            if own is not None:
                self.weights[row].append(own)
            if self.on_token is not None:
                self.on_token(row, token, own)
        self.open = [row for row in self.open if self.tokens[row][-1] != self.eos_id]

    def generation(self, prompt_weights: Tensor | None, logprobs: bool) -> Generation:
        """Everything kept that was asked for, with the prompt's routing weights (B, P, N)."""
        result = Generation(self.tokens, self.logprobs if logprobs else [])
        if prompt_weights is not None:
            prompt_weights = prompt_weights.cpu()
            result.prompt_weights = list(prompt_weights)
            none = prompt_weights.new_empty(0, prompt_weights.shape[-1])
            result.weights = [torch.stack(kept) if kept else none for kept in self.weights]
        return result


def _prompt_tensor(
    prompts: Tensor | Sequence[Sequence[int]], model: LanguageModel, context: int | None
) -> Tensor:
    if not isinstance(prompts, Tensor) and len({len(prompt) for prompt in prompts}) > 1:
        lengths = sorted({len(prompt) for prompt in prompts})
        raise ValueError(f"prompts of one batch must have one length, these have {lengths}: run them apart")
    tokens = _token_ids(prompts, model, "prompt")
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError("a prompt needs at least one token: start an empty one with the BOS token")
    if context is not None and tokens.shape[1] > context:
        raise ValueError(
            f"the prompt has {tokens.shape[1]} tokens but the model reads at most {context}: shorten it"
        )
    return tokens


def _token_ids(ids: Any, model: LanguageModel, kind: str) -> Tensor:
    """int64 on the model's device; ValueError for ids outside its vocabulary."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    tokens = torch.as_tensor(ids, dtype=torch.long, device=device)
    if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= model.vocab_size):
        raise ValueError(f"a {kind} token lies outside the vocabulary of {model.vocab_size} tokens")
    return tokens


@contextlib.contextmanager
def _evaluating(model: LanguageModel) -> Iterator[None]:
    """Dropout off meanwhile; every module gets its own mode back (frozen parts may differ from the rest)."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
