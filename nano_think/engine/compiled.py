"""One decode step as a function of tensors alone: for torch.compile, and to be exported and run elsewhere.

The cache of `extend` grows and counts in Python, which a compiler would have to follow from length to length.
Here buffers have all of their room from the start, the position is a tensor, and what lies behind it is masked.
Attention reads the whole room in each step; state-space layers keep what they had.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nano_think.cache import AppendState, Cache, RingState
from nano_think.files import atomic_write
from nano_think.ops.layout import Layout

# A cache by the names of its parts, or whether a state is a ring and the names of its tensors.
Tree: TypeAlias = "dict[str, Tree] | tuple[bool, list[str]]"


@dataclass(frozen=True, eq=False)
class RoomLayout(Layout):
    """New positions in front of buffers with `room` places, of which those up to the own position are visible."""

    room: int = 0

    @property
    def sight(self) -> tuple[Tensor | None, Tensor | None]:
        """A mask alone."""
        return self.mask, None

    @property
    def mask(self) -> Tensor:  # type: ignore[override]
        """(1, 1, n, room) bool."""
        places = torch.arange(self.room, device=self.positions.device)
        return (places <= self.positions.unsqueeze(-1)).unsqueeze(1)


class RoomState:
    """What an `AppendState` does for `extend`, written at a position that is a tensor."""

    def __init__(self, layout: RoomLayout, **buffers: Tensor) -> None:
        self._layout, self.buffers = layout, buffers

    def layout(self, n: int, device: torch.device) -> Layout:
        """The same for all layers."""
        return self._layout

    def reach(self, n: int) -> int:
        """All of the room."""
        return self._layout.room

    def append(self, **entries: Tensor) -> tuple[Tensor, ...]:
        """Write entries (..., 1, dim) in place and return the whole buffers, in the order given."""
        for name, entry in entries.items():
            self.buffers[name].index_copy_(-2, self._layout.positions[0], entry.to(self.buffers[name].dtype))
        return tuple(self.buffers[name] for name in entries)


class DecodeStep(nn.Module):
    """The step of a language model for `batch` rows of at most `max_len` positions.

    Called with tokens (batch, 1), the position (1,) int64 at which they stand and the tensors of the state, it
    returns logits (batch, V) and routing weights (batch, N) or None, and writes the state in place. It branches on
    no value, so that one compilation or export serves every position.
    """

    def __init__(self, model: Any, batch: int, max_len: int) -> None:
        super().__init__()
        self.model, self.batch, self.max_len = model, batch, max_len
        self._tree = _described(model.init_state(1, 1))

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Read prompts (batch, P) with the model itself; logits (batch, V) of the last token, and the state.

        Raises ValueError for more positions than there is room for.
        """
        if tokens.shape[1] > self.max_len:
            raise ValueError(f"the prompt has {tokens.shape[1]} tokens, there is room for {self.max_len}")
        state = self.model.init_state(self.batch, self.max_len)
        logits = self.model.extend(tokens, state, last_only=True).logits[:, -1]
        return logits, taken_over(state)

    def forward(
        self, tokens: Tensor, position: Tensor, state: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """One token a row."""
        positions = position.unsqueeze(0)
        layout = RoomLayout(positions, torch.zeros_like(positions), room=self.max_len)
        tree = _filled(self._tree, iter(state), layout)
        output = self.model.extend(tokens, tree)
        for old, new in zip(state, tensors_of(tree), strict=True):
            if old is not new:
                old.copy_(new)
        weights = None if output.weights is None else output.weights[:, -1]
        return output.logits[:, -1], weights


class Decoder:
    """Prompt and tokens of `batch` rows through one function of tensors, compiled or loaded from a file.

    run: what takes tokens, position and state; `DecodeStep` itself where not given.
    Raises ValueError where the room of `max_len` positions is full.
    """

    def __init__(self, step: DecodeStep, run: Any = None) -> None:
        self._step, self._run = step, step if run is None else run
        self._state: list[Tensor] = []
        self.position = 0

    def prefill(self, tokens: Tensor) -> Tensor:
        """Start anew with prompts (batch, P); logits (batch, V) of the last token."""
        logits, self._state = self._step.prefill(tokens)
        self.position = tokens.shape[1]
        return logits

    @torch.no_grad()
    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """The next tokens (batch, 1); logits (batch, V) and routing weights (batch, N) or None."""
        if self.position >= self._step.max_len:
            raise ValueError(f"the cache holds {self._step.max_len} positions, one more was needed")
        position = torch.full((1,), self.position, device=tokens.device)  # no copy to wait for
        result = self._run(tokens, position, self._state)
        self.position += 1
        return result


def compiled_decoder(model: Any, batch: int = 1, max_len: int = 512, **options: Any) -> Decoder:
    """A decoder whose step is compiled as one graph at its first use; options of torch.compile.

    The model keeps its class and the names of its weights; it has to be in eval mode.
    """
    step = DecodeStep(model, batch, max_len)
    return Decoder(step, torch.compile(step, fullgraph=True, dynamic=False, **options))


@torch.no_grad()
def export_step(path: str | Path, model: Any, batch: int = 1, max_len: int = 512) -> None:
    """Write the step as a torch.export program, weights included, that `torch.export.load` reads without our code.

    Its arguments are those of `DecodeStep`: tokens (batch, 1), position (1,), the list of the state's tensors.
    """
    step = DecodeStep(model, batch, max_len)
    device = next(model.parameters()).device
    tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    _, state = step.prefill(tokens)
    arguments = (tokens, torch.ones(1, dtype=torch.int64, device=device), state)
    program = io.BytesIO()
    torch.export.save(torch.export.export(step, arguments), program)
    atomic_write(path, program.getvalue())


def exported_decoder(path: str | Path, model: Any, batch: int = 1, max_len: int = 512) -> Decoder:
    """A decoder that reads prompts with `model` and further tokens with the program of `export_step`."""
    return Decoder(DecodeStep(model, batch, max_len), torch.export.load(path).module())


def parts_of(state: Any) -> Iterator[Any]:
    """The states of a tree of states that have no parts of their own, in order."""
    if isinstance(state, Cache):
        for child in state.states.values():
            yield from parts_of(child)
    else:
        yield state


def taken_over(state: Any) -> list[Tensor]:
    """The tensors of a state that `extend` filled, as `DecodeStep` takes them.

    Masked places have the weight 0, and 0 times what is no number is none: the room behind is cleared.
    """
    for part in parts_of(state):
        if isinstance(part, AppendState):
            for buffer in part.buffers.values():
                buffer.narrow(-2, part.length, part.max_len - part.length).zero_()
    return tensors_of(state)


def tensors_of(state: Any) -> list[Tensor]:
    """Every tensor of a tree of states, in order."""
    found: list[Tensor] = []
    for part in parts_of(state):
        found += part.values.values() if isinstance(part, RingState) else part.buffers.values()
    return found


def _described(state: Any) -> Tree:
    """A tree of states by names alone."""
    if isinstance(state, Cache):
        return {name: _described(child) for name, child in state.states.items()}
    ring = isinstance(state, RingState)
    return ring, list(state.values if ring else state.buffers)


def _filled(tree: Tree, tensors: Iterator[Tensor], layout: RoomLayout) -> Any:
    """A tree of states around the tensors, in order."""
    if isinstance(tree, dict):
        return Cache(**{name: _filled(child, tensors, layout) for name, child in tree.items()})
    ring, names = tree
    values = {name: next(tensors) for name in names}
    return RingState(**values) if ring else RoomState(layout, **values)
