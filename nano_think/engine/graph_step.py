"""Decoding on a GPU: the step of `DecodeStep`, captured once as a CUDA graph and replayed for every token.

A step of a small model is some hundreds of small kernels, and launching them one by one from Python takes several
times as long as they run. A graph launches them all at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nano_think.cache import AppendState, RingState
from nano_think.engine.compiled import DecodeStep, parts_of, taken_over

WARM_UP = 2  # steps before a capture, in which libraries make what they keep


def supports(model: Any) -> bool:
    """Whether everything the model remembers is of a kind that `DecodeStep` knows."""
    return all(isinstance(part, AppendState | RingState) for part in parts_of(model.init_state(1, 1)))


class GraphStep:
    """One more token for `batch` rows, going on from what `model.extend` left in a state.

    The model has to be in eval mode and its weights must stay where they are. Without a GPU the same step runs
    kernel by kernel.
    """

    def __init__(self, model: Any, batch: int, max_len: int) -> None:
        self._step = DecodeStep(model, batch, max_len)
        device = next(model.parameters()).device
        self._tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._newest = [0] * batch
        self._state: list[Tensor] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._read = 0
        self._result: tuple[Tensor, Tensor | None] | None = None
        self.routing: Tensor | None = None

    def load(self, state: Any) -> None:
        """Take over a state with room for max_len positions, which is not the caller's any longer."""
        self._state, self._read = taken_over(state), state.length
        self._position.fill_(state.length)
        if self._tokens.is_cuda:
            self._capture()

    def step_rows(self, tokens: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Read one more token of each of `rows`; logits (n, V), overwritten by the next step.

        The others read their last one again: a graph has one shape. Raises ValueError where the state is full.
        """
        if self._read >= self._step.max_len:
            raise ValueError(f"the state holds {self._step.max_len} positions, one more was needed")
        for row, token in zip(rows, tokens, strict=True):
            self._newest[row] = token
        self._tokens.copy_(torch.tensor(self._newest).unsqueeze(1))
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()
        self._read += 1
        assert self._result is not None
        logits, weights = self._result
        everything = len(rows) == len(self._newest)
        self.routing = weights if weights is None or everything else weights[list(rows)]
        return logits if everything else logits[list(rows)]

    @torch.no_grad()
    def _run(self) -> None:
        self._result = self._step(self._tokens, self._position, self._state)
        self._position.add_(1)

    def _capture(self) -> None:
        """Record one step; what was read stays as it is. Raises RuntimeError where the step cannot be recorded."""
        kept = [tensor.clone() for tensor in (self._position, *self._state)]
        graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    self._position.copy_(kept[0])
                    self._run()
            torch.cuda.current_stream().wait_stream(aside)
            # another thread of the process may go on to use the device
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._run()
        finally:
            for tensor, before in zip((self._position, *self._state), kept, strict=True):
                tensor.copy_(before)
        self._graph = graph
