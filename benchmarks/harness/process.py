"""Settings of the whole process: what one case had and another not would decide the comparison."""

from __future__ import annotations

import ctypes
import time
import warnings
from collections.abc import Callable

import torch

from nano_think.ops.products import float32_matmul, fp32_stays

# glibc's mallopt: never give the end of the heap back, never map large blocks one by one
TRIM_THRESHOLD, MMAP_MAX = -1, -4
NEVER_TRIM = 2**31 - 1
SQUARE, PRODUCTS, TRIALS = 1024, 8, 2


def prepare(threads: int, kept: bool = False) -> None:
    """Threads, the library of fp32 products and, with `kept`, an allocator that keeps freed memory.

    Of the two libraries that torch has for fp32 products the one that is faster for squares is taken, for all
    cases but those that are given theirs by `at_its_best`. Memory that is given back and asked for again costs
    page faults, more for models that hold all logits: `kept` takes that cost from all.
    """
    torch.set_num_threads(threads)
    square = torch.ones(SQUARE, SQUARE)
    torch.set_float32_matmul_precision(faster_products(lambda: torch.mm(square, square), PRODUCTS))
    if kept and not keep_memory():
        warnings.warn("this C library has no mallopt: freed memory goes back to the system", stacklevel=2)


def faster_products(work: Callable[[], object], trials: int) -> str:
    """torch's `float32_matmul_precision` with which `work` takes less time, its products being fp32 arithmetic."""
    if not fp32_stays("medium"):
        return "highest"
    seconds = {"highest": float("inf"), "medium": float("inf")}
    for _ in range(trials):
        for setting in seconds:
            with float32_matmul(setting):
                started = time.process_time()
                work()
                seconds[setting] = min(seconds[setting], time.process_time() - started)
    return min(seconds, key=seconds.__getitem__)


def at_its_best(work: Callable[[], object]) -> Callable[[], object]:
    """`work` with the library of fp32 products that suits it: one row wants another than many do."""
    best = faster_products(work, TRIALS)

    def chosen() -> object:
        with float32_matmul(best):
            return work()

    return chosen


def keep_memory() -> bool:
    """Ask glibc to keep what is freed; False where it cannot be asked."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, NEVER_TRIM))
