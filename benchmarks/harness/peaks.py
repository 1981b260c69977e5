"""What the machine can do at this moment: matrix products and reading memory, per CPU second."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.harness.case import Peak

GEMM_SIZES, QUICK_GEMM_SIZES = (1024, 2048), (256,)
READ_MIB, QUICK_READ_MIB = 256, 8
REPEATS = 3


class Peaks:
    """Square matrix products in fp32 and bf16 and sequential reading, with buffers made once.

    The rate of a peak is the best of its sizes and repeats in one call: what the machine can do, not its mean.
    In fp32 both settings of torch's matmul precision are tried, since they choose between two libraries.
    """

    def __init__(self, quick: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        sizes = QUICK_GEMM_SIZES if quick else GEMM_SIZES
        self.squares = [torch.randn(size, size, generator=generator) for size in sizes]
        self.halves = [square.bfloat16() for square in self.squares]
        self.memory = torch.ones((QUICK_READ_MIB if quick else READ_MIB) * 2**18)

    def measure(self) -> dict[Peak, float]:
        """FLOP per CPU second (`fp32`, `bf16`) and bytes per CPU second (`read`)."""
        return {"fp32": self._fp32(), "bf16": _gemm(self.halves), "read": self._read()}

    def _fp32(self) -> float:
        before = torch.get_float32_matmul_precision()
        rates = []
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            rates.append(_gemm(self.squares))
        torch.set_float32_matmul_precision(before)
        return max(rates)

    def _read(self) -> float:
        # the largest value needs every byte and next to no arithmetic
        return self.memory.numel() * 4 / best_cpu_seconds(self.memory.max)


def _gemm(squares: list[torch.Tensor]) -> float:
    rates = []
    for square in squares:
        out = torch.empty_like(square)
        seconds = best_cpu_seconds(partial(torch.mm, square, square, out=out))
        rates.append(2 * len(square) ** 3 / seconds)
    return max(rates)


def best_cpu_seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """The least CPU time of one call, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return max(min(times), 1e-9)
