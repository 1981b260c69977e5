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
PRODUCTS, TRIALS = 8, 2


def prepare(threads: int, kept: bool = False) -> None:
    """Threads, the library of fp32 products and, with `kept`, an allocator that keeps freed memory.

    Of the two libraries that torch has for fp32 products the faster is taken, for all cases. Memory that is given
    back and asked for again costs page faults, more for models that hold all logits: `kept` takes that cost from
    all.
    """
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(faster_products())
    if kept and not keep_memory():
        warnings.warn("this C library has no mallopt: freed memory goes back to the system", stacklevel=2)


def faster_products(size: int = 1024) -> str:
    """torch's `float32_matmul_precision` whose fp32 products are fp32 arithmetic and take less time here."""
    if not fp32_stays("medium"):
        return "highest"
    square = torch.ones(size, size)
    seconds = {"highest": float("inf"), "medium": float("inf")}
    for _ in range(PRODUCTS):
        for setting in seconds:
            with float32_matmul(setting):
                started = time.process_time()
                torch.mm(square, square)
                seconds[setting] = min(seconds[setting], time.process_time() - started)
    return min(seconds, key=seconds.__getitem__)


def at_its_best(work: Callable[[], object]) -> Callable[[], object]:
    """`work` with the library of fp32 products in which it takes less time: one row wants another than many do."""
    settings = ("highest", "medium") if fp32_stays("medium") else ("highest",)
    seconds = dict.fromkeys(settings, float("inf"))
    for _ in range(TRIALS if len(settings) > 1 else 0):
        for setting in settings:
            with float32_matmul(setting):
                started = time.process_time()
                work()
                seconds[setting] = min(seconds[setting], time.process_time() - started)
    best = min(seconds, key=seconds.__getitem__)

    def chosen() -> object:
        with float32_matmul(best):
            return work()

    return chosen


def keep_memory() -> bool:
    """Ask glibc to keep what is freed; False where it cannot be asked."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, NEVER_TRIM))
