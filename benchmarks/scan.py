"""The selective scan alone, one layer, forward and backward: our backends, mambapy, the textbook loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.harness import Case, Group, Measured, Missing, Options, close
from benchmarks.harness.allocations import peak_bytes
from benchmarks.harness.case import installed
from benchmarks.harness.statistics import slope
from nano_think.ops.selective_scan import Backend, cpp_problem, selective_scan

D_INNER, D_STATE = 768, 16
LENGTHS, SLOPE_LENGTHS, MEMORY_LENGTHS = (512, 2048), (256, 512, 1024, 2048, 4096), (1024, 2048, 4096)
QUICK_LENGTHS = (8, 16)
GATE_LENGTH = 64
LOOP_ROUNDS = 2  # 4 s at length 512 and quadratic
NOTES = (
    "The loop over positions is mambapy's own sequential path.",
    f"Peak memory would be above {D_STATE} with any tensor of length x channels x states.",
)
Scan = Callable[..., Tensor]


def group(options: Options) -> Group:
    """Every backend at two lengths; the fastest at more, for the slope of time over length."""
    channels = 16 if options.quick else D_INNER
    lengths = QUICK_LENGTHS if options.quick else LENGTHS
    slope_lengths = QUICK_LENGTHS if options.quick else SLOPE_LENGTHS
    memory_lengths = QUICK_LENGTHS if options.quick else MEMORY_LENGTHS
    scans, missing = _scans(lengths, options.compiled)
    fastest = next(iter(scans))
    cases = [
        _case(name, scans, channels, length, length == lengths[0])
        for length in slope_lengths
        for name in scans
        if name == fastest or (length in lengths and (name != "textbook loop" or length == lengths[0]))
    ]
    derived = {f"slope of log time over log length, {fastest}": partial(_slope, fastest, slope_lengths)}
    derived |= {
        f"peak memory in tensors of length x channels, {fastest} {length}": partial(
            peak_tensors, scans[fastest], channels, length
        )
        for length in memory_lengths
    }
    title = f"selective scan, one layer, {channels} channels, N {D_STATE}, fwd + bwd, fp32"
    return Group(title, cases, missing, NOTES, derived)


def peak_tensors(scan: Scan, channels: int, length: int, _: Measured | None = None) -> float:
    """What forward and backward hold at most, without inputs, counted in fp32 tensors (length, channels)."""
    return peak_bytes(forward_backward(scan, channels, length)) / (4 * length * channels)


def _scans(lengths: tuple[int, ...], compiled: bool) -> tuple[dict[str, Scan], list[Missing]]:
    """What can run here, the fastest of ours first, and what cannot."""
    scans: dict[str, Scan] = {}
    missing = []
    if problem := cpp_problem():
        missing += [Missing(f"nano_think cpp {length}", problem) for length in lengths]
    else:
        scans["nano_think cpp"] = partial(_ours, backend="cpp")
    scans["nano_think torch"] = partial(_ours, backend="torch")
    if compiled:
        scans["nano_think compile"] = partial(_ours, backend="compile")
    if installed("mambapy"):
        from mambapy.mamba import MambaBlock

        scans["mambapy"] = partial(MambaBlock.selective_scan, None)
        scans["textbook loop"] = partial(_loop, MambaBlock.selective_scan_seq)
    else:
        missing += [
            Missing(f"{name} {length}", "pip install mambapy")
            for name in ("mambapy", "textbook loop")
            for length in lengths
        ]
    return scans, missing


def _ours(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, backend: Backend) -> Tensor:
    return selective_scan(x, dt, A, B, C, D, backend=backend)[0]


def _loop(method: Callable[..., Tensor], x: Tensor, *rest: Tensor) -> Tensor:
    return method(SimpleNamespace(config=SimpleNamespace(d_inner=x.shape[-1], d_state=D_STATE)), x, *rest)


def _case(name: str, scans: dict[str, Scan], channels: int, length: int, shortest: bool) -> Case:
    rivals = [
        peer for peer in ("mambapy", "textbook loop") if peer in scans and (shortest or peer == "mambapy")
    ]
    compared = name.startswith("nano_think") and length in (*LENGTHS, *QUICK_LENGTHS)
    return Case(
        f"{name} {length}",
        setup=partial(forward_backward, scans[name], channels, length),
        tokens=length,
        peers=tuple(f"{peer} {length}" for peer in rivals) if compared else (),
        check=partial(same_scan, scans[name], channels, min(length, GATE_LENGTH)),
        max_rounds=LOOP_ROUNDS if name == "textbook loop" else None,
    )


def _slope(name: str, lengths: tuple[int, ...], measured: Measured) -> float:
    return measured.over_rounds(
        lambda seconds: slope(lengths, [seconds[f"{name} {length}"] for length in lengths])
    )


def draw(channels: int, length: int, batch: int = 1) -> list[Tensor]:
    """x and dt (B, L, d), A (d, n), B and C (B, L, n), D (d,), all with a gradient."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, dt = noise(batch, length, channels), noise(batch, length, channels).sigmoid() / 10
    A = -torch.arange(1.0, D_STATE + 1).repeat(channels, 1)
    B, C, D = noise(batch, length, D_STATE), noise(batch, length, D_STATE), noise(channels)
    return [tensor.requires_grad_() for tensor in (x, dt, A, B, C, D)]


def forward_backward(scan: Scan, channels: int, length: int) -> Callable[[], object]:
    """One scan and the gradients of all its inputs."""
    inputs = draw(channels, length)
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    return lambda: torch.autograd.grad(scan(*inputs), inputs, upstream)


def same_scan(scan: Scan, channels: int, length: int) -> None:
    """Output and gradients equal those of the recurrence written out, to 1e-4."""
    inputs = draw(channels, length)
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    got, want = scan(*inputs), _ours(*inputs, backend="ref")
    close("the output", got, want, 1e-4)
    grads = [torch.autograd.grad(out, inputs, upstream) for out in (got, want)]
    for name, ours, theirs in zip(("x", "dt", "A", "B", "C", "D"), *grads, strict=True):
        close(f"the gradient of {name}", ours, theirs, 1e-4)
