"""What the machine can do at this moment: matrix products and reading memory, per CPU second.

On a GPU, per second of the wall clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.harness.case import Peak
from benchmarks.harness.reading import read_all
from nano_think.ops.products import float32_matmul, fp32_stays

GEMM_SIZES, GPU_GEMM_SIZES, QUICK_GEMM_SIZES = (1024, 2048), (4096, 8192), (256,)
READ_MIB, QUICK_READ_MIB = 256, 8
REPEATS = 3


class Peaks:
    """Square matrix products in fp32 and bf16 and sequential reading, with buffers made once.

    The rate of a peak is the best of its sizes and repeats in one call: what the machine can do, not its mean.
    In fp32 both settings of torch's matmul precision are tried, since they choose between two libraries, except
    that "medium" rounds to bf16 where there is AMX.
    """

    def __init__(self, quick: bool = False, device: str = "cpu") -> None:
        self.device = device
        generator = torch.Generator().manual_seed(0)
        sizes = QUICK_GEMM_SIZES if quick else GEMM_SIZES if device == "cpu" else GPU_GEMM_SIZES
        self.squares = [torch.randn(size, size, generator=generator).to(device) for size in sizes]
        self.halves = [square.bfloat16() for square in self.squares]
        self.memory = torch.ones((QUICK_READ_MIB if quick else READ_MIB) * 2**18, device=device)

    def measure(self) -> dict[Peak, float]:
        """FLOP per CPU second (`fp32`, `bf16`) and bytes per CPU second (`read`)."""
        return {"fp32": self._fp32(), "bf16": self._gemm(self.halves), "read": self._read()}

    def _fp32(self) -> float:
        rates = []
        for setting in ("highest", "medium"):
            if setting == "highest" or fp32_stays(setting):
                with float32_matmul(setting):
                    rates.append(self._gemm(self.squares))
        return max(rates)

    def _read(self) -> float:
        return self.memory.numel() * 4 / best_seconds(partial(read_all, self.memory), self.device)

    def _gemm(self, squares: list[torch.Tensor]) -> float:
        rates = []
        for square in squares:
            out = torch.empty_like(square)
            seconds = best_seconds(partial(torch.mm, square, square, out=out), self.device)
            rates.append(2 * len(square) ** 3 / seconds)
        return max(rates)


def best_seconds(work: Callable[[], object], device: str = "cpu", repeats: int = REPEATS) -> float:
    """The least time of one call after one that does not count: CPU time on a CPU, else the wall clock's."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    work()
    times = []
    for _ in range(repeats):
        wait_for(device)
        started = clock()
        work()
        wait_for(device)
        times.append(clock() - started)
    return max(min(times), 1e-9)


def wait_for(device: str) -> None:
    """Until a GPU has done all that it was given; a CPU has when the call returns."""
    if device != "cpu":
        torch.accelerator.synchronize()
