"""Side by side: the scan backends and causal attention, forward and backward, one run each.

    python benchmarks/scan.py

Times are CPU seconds of this process on one thread, the best of three, so that a busy machine matters little.
The ratio column compares with the reference in the same table; it is one run on one machine, not a claim.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

import torch
from rich.console import Console
from torch import Tensor

from nano_think.evals.report import Table, render_table
from nano_think.ops.attention import attention
from nano_think.ops.selective_scan import cpp_problem, selective_scan

BATCH, LENGTH, D_MODEL, D_STATE, HEADS = 2, 512, 256, 16, 4


def cpu_seconds(work: Callable[[], Tensor], inputs: list[Tensor], repeats: int = 3) -> float:
    """Best CPU time of `work` with its backward pass, after one run that does not count."""
    times = []
    for _ in range(repeats + 1):
        for tensor in inputs:
            tensor.grad = None
        started = time.process_time()
        work().square().sum().backward()
        times.append(time.process_time() - started)
    return min(times[1:])


def scan_table() -> Table:
    """The reference loop, the chunked torch version, the compiled one where a compiler exists."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, dt = noise(BATCH, LENGTH, D_MODEL), noise(BATCH, LENGTH, D_MODEL).sigmoid() / 10
    B, C, D = noise(BATCH, LENGTH, D_STATE), noise(BATCH, LENGTH, D_STATE), noise(D_MODEL)
    A = -torch.arange(1.0, D_STATE + 1).repeat(D_MODEL, 1)
    inputs = [tensor.requires_grad_() for tensor in (x, dt, A, B, C, D)]
    names = ["ref", "torch"] + ["cpp"] * (cpp_problem() is None)
    seconds = {
        name: cpu_seconds(lambda name=name: selective_scan(*inputs, backend=name)[0], inputs)
        for name in names
    }
    title = f"selective scan, B {BATCH} L {LENGTH} d {D_MODEL} n {D_STATE}"
    return _table(title, seconds, "ref")


def attention_table() -> Table:
    """The fused kernel against the same with a mask written out, as packed documents need it."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, HEADS, LENGTH, D_MODEL // HEADS)
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for _ in range(3)]
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    seconds = {
        "mask": cpu_seconds(lambda: attention(*inputs, mask), inputs),
        "causal": cpu_seconds(lambda: attention(*inputs, None, causal=True), inputs),
    }
    return _table(f"attention, B {BATCH} L {LENGTH} d {D_MODEL} heads {HEADS}", seconds, "mask")


def _table(title: str, seconds: dict[str, float], reference: str) -> Table:
    rows = [[name, value * 1e3, seconds[reference] / value] for name, value in seconds.items()]
    return Table(
        ["variant", "CPU ms", f"times as fast as {reference}"], rows, title=title, formats=["", ".1f", ".2f"]
    )


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    console = Console()
    console.print(f"{platform.machine()}, torch {torch.__version__}, one thread, forward and backward")
    for table in (scan_table(), attention_table()):
        render_table(table, console)


if __name__ == "__main__":
    main()
