"""Settings of the whole process: what one case had and another not would decide the comparison."""

from __future__ import annotations

import ctypes
import warnings

import torch

# glibc's mallopt: never give the end of the heap back, never map large blocks one by one
TRIM_THRESHOLD, MMAP_MAX = -1, -4
NEVER_TRIM = 2**31 - 1


def prepare(threads: int, kept: bool = False, precision: str = "medium") -> None:
    """Threads, matmul precision and, with `kept`, an allocator that keeps freed memory.

    `medium` lets torch choose oneDNN for fp32 products, which on CPUs without bf16 matrix units still computes in
    fp32 and is the faster; the peers get it too. Memory that is given back and asked for again costs page faults,
    more for models that hold all logits: `kept` takes that cost from all.
    """
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    if kept and not keep_memory():
        warnings.warn("this C library has no mallopt: freed memory goes back to the system", stacklevel=2)


def keep_memory() -> bool:
    """Ask glibc to keep what is freed; False where it cannot be asked."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, NEVER_TRIM))
