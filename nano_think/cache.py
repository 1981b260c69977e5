"""Decode states: everything a model remembers between two calls of `extend`.

Two kinds cover every mixer. An `AppendState` grows by one entry a position (keys and values, latents) and is
rolled back by forgetting its end. A `RingState` is overwritten at every position (convolution windows, scan
states, running sums) and is rolled back from snapshots. A `Cache` is a tree of both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from nano_think.ops.layout import Layout


class State(Protocol):
    """What decoding may do with any state; positions count from the start of the document."""

    @property
    def length(self) -> int:
        """Positions read so far."""

    def check_rollback(self, n: int) -> None:
        """Raise ValueError where the last n positions cannot be forgotten."""

    def rollback(self, n: int) -> None:
        """Forget the last n positions; raises ValueError, with nothing changed, where that cannot be."""

    def reorder(self, index: Tensor) -> None:
        """Make row i the former row index[i] (beam search)."""

    @property
    def num_bytes(self) -> int:
        """Bytes that the positions read so far occupy."""


class AppendState:
    """Named buffers (..., max_len, dim), filled along their second-last axis."""

    def __init__(self, max_len: int, **buffers: Tensor) -> None:
        self.max_len, self.buffers, self.length = max_len, buffers, 0

    @classmethod
    def empty(cls, max_len: int, like: Tensor, **shapes: tuple[int, ...]) -> AppendState:
        """Buffers of dtype and device of `like`; a shape (B, H, D) becomes a buffer (B, H, max_len, D)."""
        return cls(
            max_len,
            **{name: like.new_empty(*shape[:-1], max_len, shape[-1]) for name, shape in shapes.items()},
        )

    def append(self, **entries: Tensor) -> tuple[Tensor, ...]:
        """Write entries (..., n, dim) and return views of everything so far, in the order given."""
        n = next(iter(entries.values())).shape[-2]
        if self.length + n > self.max_len:
            raise ValueError(f"the cache holds {self.max_len} positions, {self.length + n} were needed")
        for name, entry in entries.items():
            self.buffers[name].narrow(-2, self.length, n).copy_(entry)
        self.length += n
        return tuple(self.buffers[name].narrow(-2, 0, self.length) for name in entries)

    def layout(self, n: int, device: torch.device) -> Layout:
        """Where n new positions stand, and what each of them sees of the buffers."""
        return Layout.span(self.length, n, device)

    def reach(self, n: int) -> int:
        """Positions that n more make, or more than these where only a bound is known."""
        return self.length + n

    def check_rollback(self, n: int) -> None:
        if not 0 <= n <= self.length:
            raise ValueError(f"cannot forget {n} of {self.length} positions")

    def rollback(self, n: int) -> None:
        self.check_rollback(n)
        self.length -= n

    def reorder(self, index: Tensor) -> None:
        self.buffers = {name: buffer.index_select(0, index) for name, buffer in self.buffers.items()}

    @property
    def num_bytes(self) -> int:
        return sum(b.narrow(-2, 0, self.length).numel() * b.element_size() for b in self.buffers.values())


class RingState:
    """Named tensors that are replaced as positions are read, with snapshots of the last `max_rollback`."""

    def __init__(self, max_rollback: int = 0, **values: Tensor) -> None:
        self.length, self.values = 0, values
        self.snapshots: deque[tuple[int, dict[str, Tensor]]] = deque(maxlen=max_rollback)

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def pieces(self, n: int) -> Iterator[slice]:
        """Cut n new positions so that the last `max_rollback` come one by one and can be rolled back to."""
        single = min(n, self.snapshots.maxlen or 0)
        if n > single:
            yield slice(0, n - single)
        for i in range(n - single, n):
            yield slice(i, i + 1)

    def advance(self, n: int, **values: Tensor) -> None:
        """Replace the values after reading n positions. New tensors, never in-place changes of the old."""
        self.snapshots.append((self.length, self.values))
        self.values = {**self.values, **values}
        self.length += n

    def check_rollback(self, n: int) -> None:
        if n and all(length != self.length - n for length, _ in self.snapshots):
            raise ValueError(f"no snapshot {n} positions back: ask for it with max_rollback in init_state")

    def rollback(self, n: int) -> None:
        self.check_rollback(n)
        target = self.length - n
        while self.length != target:
            self.length, self.values = self.snapshots.pop()

    def reorder(self, index: Tensor) -> None:
        def pick(values: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: value.index_select(0, index) for name, value in values.items()}

        self.values = pick(self.values)
        self.snapshots = deque(((n, pick(v)) for n, v in self.snapshots), maxlen=self.snapshots.maxlen)

    @property
    def num_bytes(self) -> int:
        """Bytes of the current values; snapshots are extra and bounded by max_rollback."""
        return sum(value.numel() * value.element_size() for value in self.values.values())


class Cache:
    """A named tree of states that moves as one."""

    def __init__(self, **states: State) -> None:
        self.states = states

    @classmethod
    def stack(cls, states: list[State]) -> Cache:
        """One state a layer, named by its number."""
        return cls(**{str(i): state for i, state in enumerate(states)})

    def __getitem__(self, name: str | int) -> Any:
        """The state of one part; what can be done with it beyond `State` is that part's business."""
        return self.states[str(name)]

    @property
    def length(self) -> int:
        """Positions read so far: every state has read the same ones, an empty tree none."""
        lengths = {state.length for state in self.states.values()}
        if len(lengths) > 1:
            raise RuntimeError(f"states of one cache disagree about their length: {sorted(lengths)}")
        return lengths.pop() if lengths else 0

    def check_rollback(self, n: int) -> None:
        for state in self.states.values():
            state.check_rollback(n)

    def rollback(self, n: int) -> None:
        self.check_rollback(n)
        for state in self.states.values():
            state.rollback(n)

    def reorder(self, index: Tensor) -> None:
        for state in self.states.values():
            state.reorder(index)

    @property
    def num_bytes(self) -> int:
        return sum(state.num_bytes for state in self.states.values())
