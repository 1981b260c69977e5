"""What the groups of a GPU share: where they work, exact gates, and the memory that each case takes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.case import Case, GateError, Group, Missing, Options, Work
from benchmarks.harness.statistics import Measured
from nano_think.ops.products import float32_matmul

LOSS_TOLERANCE = {False: 1e-3, True: 2e-2}  # nats, in fp32 and under bf16 autocast


class Gpu:
    """The GPU of this machine, or its CPU for a quick run where there is none.

    Remembers of every case what its set-up left on the GPU and the most that a unit of work added.
    """

    def __init__(self, options: Options) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.usable = self.device != "cpu" or options.quick
        self.peaks: dict[str, float] = {}

    @property
    def name(self) -> str:
        """For titles."""
        return torch.cuda.get_device_name() if self.device == "cuda" else "the CPU, at toy sizes"

    def empty(self, title: str) -> Group:
        """What a group is where nothing of it can run."""
        return Group(title, [], [Missing("every case", "torch finds no CUDA device")], device=self.device)

    def group(
        self, title: str, cases: Sequence[Case], missing: Sequence[Missing], notes: Sequence[str]
    ) -> Group:
        """The cases with the memory of each as derived figures."""
        derived = {f"peak memory of {case.name}, GB": partial(self._gigabytes, case.name) for case in cases}
        on_gpu = self.device == "cuda"
        return Group(f"{title} on {self.name}", cases, missing, notes, derived if on_gpu else {}, self.device)

    def case(self, name: str, setup: Callable[[], Work], **more: Any) -> Case:
        """A case whose memory is remembered, whose gate computes fp32 products in fp32."""
        if more.get("check") is not None:
            more["check"] = self.exact(more["check"])
        return Case(name, setup=partial(self._remembering, name, setup), **more)

    def exact(self, check: Callable[[], object]) -> Callable[[], object]:
        """`check` without TF32: cuDNN has it on, and the setting that suits a CPU may have switched on the rest.

        A gate that several cases share runs once if they share what this returns.
        """
        return check if isinstance(check, _Exact) else _Exact(check)

    def autocast(self, wanted: bool = True) -> torch.autocast:
        """bf16 autocast on the device."""
        return torch.autocast(self.device, torch.bfloat16, enabled=wanted)

    def send(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch on the device."""
        return {name: part.to(self.device) for name, part in batch.items()}

    def _gigabytes(self, name: str, measured: Measured) -> float:
        return self.peaks[name] / 1e9

    def _remembering(self, name: str, setup: Callable[[], Work]) -> Work:
        if self.device == "cpu":
            return setup()
        gc.collect()
        before = torch.cuda.memory_allocated()
        work = setup()
        gc.collect()
        own = torch.cuda.memory_allocated() - before

        def remembered() -> None:
            others = torch.cuda.memory_allocated() - own
            torch.cuda.reset_peak_memory_stats()
            work()
            self.peaks[name] = max(self.peaks.get(name, 0.0), torch.cuda.max_memory_allocated() - others)

        return remembered


class _Exact:
    """A gate with fp32 products and convolutions in fp32."""

    def __init__(self, check: Callable[[], object]) -> None:
        self.check = check

    def __call__(self) -> None:
        kept = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            with float32_matmul("highest"):
                self.check()
        finally:
            torch.backends.cudnn.allow_tf32 = kept


def same_nats(got: Tensor, want: Tensor, autocast: bool) -> None:
    """Raise GateError unless two mean losses agree as far as their arithmetic lets them."""
    one, other = float(got), float(want)
    if not abs(one - other) <= LOSS_TOLERANCE[autocast]:  # NaN fails too
        where = "under bf16 autocast" if autocast else "in fp32"
        raise GateError(f"the loss {where} is {one:.4f} instead of {other:.4f} nats")
