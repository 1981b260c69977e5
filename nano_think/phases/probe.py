"""Training steps on the side, before a fit: its values, its time and its memory on this machine."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nano_think.ops.products import float32_matmul
from nano_think.tasks.base import Batch, FitTask

# What a probe looks at: long enough that a step's parts have their usual shares, short enough not to be noticed.
PROBE_TOKENS = 2048
LIGHTNING_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Step:
    """One forward and backward pass: loss a label in nats, the gradient of every parameter, CPU seconds."""

    loss: float
    gradients: list[Tensor]
    seconds: float


class Probe:
    """Forward and backward passes of a task that leave no trace: buffers, random state and gradients come back.

    batch: rows of the fit, on the CPU like the task. Dropout is off, so that two passes can be compared.
    """

    def __init__(self, task: FitTask, batch: Batch) -> None:
        self.task, self.batch = task, batch
        self.parameters = [p for p in task.network.parameters() if p.requires_grad]

    @property
    def rows(self) -> int:
        """Rows of the batch there is."""
        return len(self.batch["tokens"])

    def step(self, precision: str, matmul: str) -> Step:
        """One pass in a precision by Lightning's name, under torch's setting for fp32 products."""
        batch = self.batch
        labels = int((batch["labels"] != -100).sum())
        with self._without_trace(), float32_matmul(matmul):
            started = time.process_time()
            loss = self._loss(batch, precision) / max(labels, 1)
            gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            seconds = time.process_time() - started
        made = [
            torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, gradients, strict=True)
        ]
        return Step(float(loss.detach()), made, seconds)

    def live_bytes(self, precision: str, rows: int) -> int:
        """The most bytes of tensors that one pass over the first rows holds at a time, gradients included."""
        with self._without_trace(), LiveTensors() as live:
            batch = {name: value[:rows] for name, value in self.batch.items()}
            loss = self._loss(batch, precision)
            torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return live.peak

    def _loss(self, batch: Batch, precision: str) -> Tensor:
        dtype = LIGHTNING_AUTOCAST.get(precision)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            return self.task.batch_loss(batch)["loss"]

    @contextmanager
    def _without_trace(self) -> Iterator[None]:
        buffers = {name: buffer.clone() for name, buffer in self.task.named_buffers()}
        dropouts = [m for m in self.task.modules() if isinstance(m, nn.Dropout) and m.training]
        for module in dropouts:
            module.eval()
        try:
            with torch.random.fork_rng(), self.task.aside():
                yield
        finally:
            for module in dropouts:
                module.train()
            with torch.no_grad():
                for name, buffer in self.task.named_buffers():
                    buffer.copy_(buffers[name])


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside it and still held; `peak` is the most there were.

    What an operator needs for itself and gives back before it ends is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage(), before)
        return out

    def _see(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in before or key in self._known:
            return  # a view, or written in place
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
