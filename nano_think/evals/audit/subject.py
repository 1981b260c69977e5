"""What the audit asks of a model: read tokens, say something about each of them, perhaps in pieces.

Letters: B rows, L positions. Everything said about a position is kept under a name, as (B, L, F).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nano_think.evals.audit.trace import Trace, join, recording
from nano_think.ops.layout import Layout
from nano_think.retrieval import MemorySlots, Retriever

Said = dict[str, Tensor]
# What the model is given besides the tokens, under the name by which it is observed.
GIVEN = "neighbours"
# Which component is answerable for what is said under a name, in the order of computation.
COMPONENTS = {
    GIVEN: "retrieval",
    "context": "mla",
    "weights": "router",
    "expert_hidden": "experts",
    "hidden": "model",
    "logits": "model",
}


class CannotDecodeError(Exception):
    """There is a cache and `component` refuses to use it; the message is its own."""

    def __init__(self, message: str, component: str) -> None:
        super().__init__(message)
        self.component = component


class Subject:
    """A language model under audit, with the memory it reads.

    model: any callable from tokens (B, L) to logits (B, L, V), or to an object or mapping with `logits`. Beyond
    that, what is there is used: a `layout` argument (packing, padding), `init_state` and `extend` (decoding), a
    `memory` argument (with `retriever`).
    """

    def __init__(
        self, model: Callable[..., Any], vocab_size: int, retriever: Retriever | None = None
    ) -> None:
        self.model, self.vocab_size, self.retriever = model, vocab_size, retriever
        self.can_pack = _takes(model, "layout")
        self.can_decode = callable(getattr(model, "extend", None)) and callable(
            getattr(model, "init_state", None)
        )

    @property
    def module(self) -> nn.Module | None:
        """The model as a module, for hooks and parameters."""
        return self.model if isinstance(self.model, nn.Module) else None

    @property
    def device(self) -> torch.device:
        """Where the model reads. All else in an audit, what was said included, is on the CPU."""
        parameter = None if self.module is None else next(self.module.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def with_model(self, model: Callable[..., Any]) -> Subject:
        """The same memory before another model."""
        return Subject(model, self.vocab_size, self.retriever)

    def with_retriever(self, retriever: Retriever | None) -> Subject:
        """The same model before another memory."""
        return Subject(self.model, self.vocab_size, retriever)

    def read(
        self, tokens: Tensor, layout: Layout | None = None, memory: MemorySlots | None = None
    ) -> tuple[Any, MemorySlots | None]:
        """What one forward pass returns, and the slots it was given.

        memory: slots in place of those that the retriever finds.
        """
        options: dict[str, Any] = {}
        if layout is not None:
            moved = layout.positions.to(self.device), layout.segments.to(self.device)
            options["layout"] = dataclasses.replace(layout, positions=moved[0], segments=moved[1], _angles={})
        if memory is None and self.retriever is not None:
            memory = self.retriever.retrieve(tokens, layout)
        if memory is not None:
            options["memory"] = memory.to(self.device)
        return self.model(tokens.to(self.device), **options), memory

    @torch.no_grad()
    def observe(
        self, tokens: Tensor, layout: Layout | None = None, memory: MemorySlots | None = None
    ) -> Said:
        """Everything that one forward pass says about each position of tokens (B, L); arguments as `read`."""
        output, memory = self.read(tokens, layout, memory)
        return self.said(output, tokens, memory)

    def decode(self, tokens: Tensor, pieces: Sequence[int]) -> Said:
        """The same, read in pieces of these lengths through the cache."""
        reader = Decoding(self, len(tokens), tokens.shape[1])
        for piece in tokens.split(list(pieces), dim=1):
            reader.read(piece)
        return reader.said

    def said(self, output: Any, tokens: Tensor, memory: MemorySlots | None) -> Said:
        """Every tensor of an output that has a row and a position for each token, in the order of computation."""
        shape, found = tokens.shape, {}
        if memory is not None:
            found[GIVEN] = neighbour_ids(memory, 1 if self.retriever is None else max(self.retriever.k, 1))
        named = named_tensors(output)
        if named["logits"].shape[:2] != shape:
            raise ValueError(f"logits of shape {tuple(named['logits'].shape)} for tokens of {tuple(shape)}")
        for name in sorted(named, key=_order):
            # the weight of a single expert is always 1 and says nothing
            single = name == "weights" and named[name].shape[-1] == 1
            if named[name].shape[:2] == shape and not single:
                found[name] = named[name].detach().reshape(*shape, -1).cpu()
        return found


class Decoding:
    """One sequence a row being read through the caches of model and memory.

    said, trace: about the positions that the caches hold, so they forget with a rollback and move with a
    reordering.
    max_rollback: positions that may be taken back. like: a trace of one pass over everything; with it the
    modules are traced.
    Raises CannotDecodeError where the model refuses.
    """

    def __init__(
        self,
        subject: Subject,
        batch: int,
        max_len: int,
        max_rollback: int = 0,
        like: Trace | None = None,
    ) -> None:
        self.subject, self.like = subject, like
        with _refusals("model"):
            self.state: Any = subject.model.init_state(batch, max_len, max_rollback)  # type: ignore[attr-defined]
        with _refusals(component(GIVEN)):
            self.memory = None if subject.retriever is None else subject.retriever.init_state(batch)
        # by name what was said, by key what passed through modules
        self._pieces: list[dict[Any, Tensor]] = []

    @torch.no_grad()
    def read(self, tokens: Tensor) -> None:
        """The next tokens (B, n)."""
        with _refusals(component(GIVEN)):
            slots = None if self.memory is None else self.memory.step(tokens)
        device = self.subject.device
        options = {} if slots is None else {"memory": slots.to(device)}
        module, like = self.subject.module, self.like
        tracing = recording(module, tokens.shape, like) if module and like else nullcontext(Trace())
        with tracing as trace, _refusals("model"):
            output = self.subject.model.extend(tokens.to(device), self.state, **options)  # type: ignore[attr-defined]
        self._pieces.append({**self.subject.said(output, tokens, slots), **trace.tensors})

    def rollback(self, n: int) -> None:
        """Forget the last n positions."""
        with _refusals("model"):
            for state in self._states():
                state.rollback(n)
        self._each(lambda part: part[:, : part.shape[1] - n])

    def reorder(self, index: Tensor) -> None:
        """Make row i the former row index[i]."""
        with _refusals("model"):
            self.state.reorder(index.to(self.subject.device))
            if self.memory is not None:
                self.memory.reorder(index)
        self._each(lambda part: part[index])

    @property
    def said(self) -> Said:
        """Everything about the positions read, as `Subject.observe` of them."""
        return {name: value for name, value in join(self._pieces).items() if isinstance(name, str)}

    @property
    def trace(self) -> Trace:
        """What passed through the modules."""
        passed = {key: value for key, value in join(self._pieces).items() if not isinstance(key, str)}
        return Trace(passed) if self.like is None else dataclasses.replace(self.like, tensors=passed)

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self._pieces = [{name: change(value) for name, value in join(self._pieces).items()}]

    def _states(self) -> Iterator[Any]:
        yield self.state
        if self.memory is not None:
            yield self.memory


@contextmanager
def _refusals(component: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        raise CannotDecodeError(str(error), component) from error


def neighbour_ids(slots: MemorySlots, k: int) -> Tensor:
    """Ids (B, L, k) of the records that each token sees, -1 for none."""
    seen = torch.full((*slots.index.shape, k), -1, dtype=torch.int64)
    if slots.hits is not None and slots.values.shape[1]:
        rows = torch.arange(len(seen)).unsqueeze(1)
        seen = slots.hits.ids[rows, slots.index.clamp_min(0)]
    return seen.masked_fill((slots.index < 0).unsqueeze(-1), -1)


def named_tensors(output: Any) -> dict[str, Tensor]:
    """Every tensor that a model returned, by dotted name; raises TypeError where none are the logits."""
    named = {"logits": output} if isinstance(output, Tensor) else dict(_tensors(output))
    if "logits" not in named:
        raise TypeError(f"the model returned {type(output).__name__}, which is neither logits nor has them")
    return named


def component(name: str) -> str:
    """The part of a model that answers for what is said under `name`."""
    kind, _, rest = name.partition(".")
    if kind == "expert_hidden":
        return "expert" if rest == "expert" else f"experts.{rest}"
    return COMPONENTS.get(name, name)


def _order(name: str) -> int:
    """Of computation, where it is known; what others say besides comes before the logits."""
    known = list(COMPONENTS)
    kind = name.partition(".")[0]
    return known.index(kind) if kind in known else known.index("logits") - 1


def _tensors(output: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors inside a dataclass, mapping or sequence, by dotted name."""
    if isinstance(output, Tensor):
        yield prefix, output
        return
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        output = {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
    if isinstance(output, Mapping):
        for key, value in output.items():
            yield from _tensors(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(output, list | tuple):
        for i, value in enumerate(output):
            yield from _tensors(value, f"{prefix}.{i}")


def _takes(model: Callable[..., Any], argument: str) -> bool:
    function = model.forward if isinstance(model, nn.Module) else model
    try:
        return argument in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
