"""Selective scan (Gu and Dao, arXiv 2312.00752, eq. 2 and algorithm 2): one function, five backends.

`ref` is the recurrence written out, the oracle of the others. `torch` works in chunks with plain tensor
operations on any device, `compile` puts a chunk through torch.compile. `cpp` and `triton` are kernels for CPU and
GPU, compiled on first use. All but `ref` keep the states at chunk borders only and rebuild the rest in the
backward pass, whose cost is linear in the length. None divides by products of decays: these underflow after some
hundred positions.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from functools import cache
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nano_think.ops.native import BuildError
from nano_think.ops.products import float32_matmul
from nano_think.ops.scan_cpp import CppScan
from nano_think.ops.scan_kernel import Kernel, ScanInputs, TorchScan

Backend = Literal["auto", "ref", "torch", "compile", "cpp", "triton"]
BACKEND_VARIABLE = "NANO_THINK_SCAN"
FUSED = {"cpp": "cpu", "triton": "cuda"}  # kernels with softplus and gate inside, and where they run


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor | None = None,
    z: Tensor | None = None,
    starts: Tensor | None = None,
    state: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """y[t] = C[t] . h[t] + D x[t] with h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t], and the last h.

    x, dt: (B, L, d) inputs and step sizes >= 0; a step of 0 leaves the state exactly as it is.
    A: (d, n) < 0; B, C: (B, L, n); D: (d,).
    dt_bias: (d,); where given, the step size is softplus(dt + dt_bias), 0 for a dt of -inf.
    z: (B, L, d); where given, y is multiplied by silu(z).
    starts: (B, L) bool, True where a document begins: h[t-1] counts as 0 there. None: no such position.
    state: (B, d, n), h before the first position; None: zeros.
    backend: `auto` is `cpp` on the CPU where a compiler exists, `triton` on CUDA where it is installed and right
    (see `triton_problem`), neither for fp64, and `torch` otherwise; the environment variable NANO_THINK_SCAN
    overrides the argument. `cpp` is the fastest on the CPU at every length. A single position is always computed
    by `ref`, so that the step of cached decoding can be compiled and exported.

    Computes in fp32 (fp64 for fp64 inputs) whatever autocast says. Returns y (B, L, d) in the dtype of x and the
    last state (B, d, n) in the dtype of the computation. Every tensor argument but `starts` has a gradient.
    Raises ValueError for an unknown backend, for `cpp` and `triton` where they cannot run, and for other shapes.
    """
    _check_shapes(ScanInputs(x, dt, A, B, C, D, dt_bias, z), starts, state)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    # a compiler cannot follow the choice, which looks for libraries, and a single position has none
    single = x.shape[1] == 1 and torch.compiler.is_compiling()
    name = "ref" if single else choose_backend(backend, x.device, dtype)
    state = x.new_zeros(len(x), *A.shape, dtype=dtype) if state is None else state.to(dtype)
    A, D = A.to(dtype), D.to(dtype)
    dt_bias = None if dt_bias is None else dt_bias.to(dtype)
    sequences = [x, dt, B, C] if z is None else [x, dt, B, C, z]
    with torch.autocast(x.device.type, enabled=False):
        if name in FUSED and x.shape[1] > 1:
            half = all(tensor.dtype == torch.bfloat16 for tensor in sequences)
            x_, dt, B, C, *gate = sequences if half else (tensor.to(dtype) for tensor in sequences)
            inputs = ScanInputs(x_, dt, A, B, C, D, dt_bias, *gate)
            y, last = _run_kernel(_kernel(name), inputs, starts, state)
            return y.to(x.dtype), last
        x_, dt, B, C, *gate = (tensor.to(dtype) for tensor in sequences)
        dt = dt if dt_bias is None else F.softplus(dt + dt_bias)
        inputs = ScanInputs(x_, dt, A, B, C, D)
        if name in ("torch", "compile") and x.shape[1] > 1:
            y, last = _run_kernel(_kernel(name), inputs, starts, state)
        else:
            y, last = reference_scan(inputs, starts, state)
        return (y * F.silu(gate[0]) if gate else y).to(x.dtype), last


def _check_shapes(inputs: ScanInputs, starts: Tensor | None, state: Tensor | None) -> None:
    """Raise ValueError for what is not as `selective_scan` says: a kernel would read what lies beside it."""
    rows, (d, n) = tuple(inputs.x.shape), inputs.A.shape
    wanted = dict.fromkeys(("x", "dt", "z"), (*rows[:2], d)) | dict.fromkeys(("B", "C"), (*rows[:2], n))
    wanted |= {"D": (d,), "dt_bias": (d,), "starts": rows[:2], "state": (rows[0], d, n)}
    for name, tensor in {**inputs._asdict(), "starts": starts, "state": state}.items():
        if tensor is not None and tuple(tensor.shape) != wanted.get(name, (d, n)):
            raise ValueError(f"{name} of a scan must be {wanted[name]}, not {tuple(tensor.shape)}")
    if starts is not None and starts.dtype != torch.bool:
        raise ValueError(f"starts of a scan must be bool, not {starts.dtype}")


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of a backend, not `auto`, for a computation on `device` in `dtype`; see `selective_scan`."""
    backend = os.environ.get(BACKEND_VARIABLE) or backend
    if backend not in get_args(Backend):
        raise ValueError(f"scan backend must be one of {', '.join(get_args(Backend))}, not {backend!r}")
    if backend == "auto":
        here = (name for name, place in FUSED.items() if place == device.type and dtype == torch.float32)
        return next((name for name in here if problem_of(name) is None), "torch")
    if backend in FUSED:
        interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        if dtype != torch.float32 or (device.type != FUSED[backend] and not interpreted):
            place = {"cpu": "the CPU", "cuda": "CUDA devices"}[FUSED[backend]]
            raise ValueError(
                f"scan backend {backend!r} computes in fp32 on {place}, not in {dtype} on {device.type}"
            )
        if problem := problem_of(backend):
            raise ValueError(f"scan backend {backend!r} cannot be used, use 'auto' or 'torch': {problem}")
    return backend


def problem_of(backend: str) -> str | None:
    """Why one of the kernels cannot be used here, None where it can."""
    return cpp_problem() if backend == "cpp" else triton_problem()


@cache
def cpp_problem() -> str | None:
    """Why the compiled backend cannot be used here, None where it can; the first call builds it and warns."""
    try:
        CppScan()
    except BuildError as error:
        warnings.warn(f"selective scan falls back to the slower 'torch' backend: {error}", stacklevel=2)
        return str(error)
    return None


@cache
def triton_problem() -> str | None:
    """Why the Triton kernel cannot be used here, None where it can.

    The first call on a GPU compiles it and compares values and gradients with the reference; it warns where they
    differ or the compiler fails, so that no machine trains with a kernel that is wrong on it.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        kernel = _kernel("triton")
        if torch.cuda.is_available():
            check_kernel(kernel, torch.device("cuda"))
    except Exception as error:
        warnings.warn(f"selective scan falls back to the slower 'torch' backend: {error}", stacklevel=2)
        return str(error)
    return None


@torch.enable_grad()
def check_kernel(kernel: Kernel, device: torch.device, length: int = 150) -> None:
    """Raise RuntimeError unless a fused kernel gives the reference's values and gradients, to 1e-3.

    In fp32 and with gradients, whatever the caller computes in: the first scan of a process may come under
    autocast or where no gradients are recorded.
    """
    with torch.autocast(device.type, enabled=False), float32_matmul("highest"):
        _check_kernel(kernel, device, length)


def _check_kernel(kernel: Kernel, device: torch.device, length: int) -> None:
    g = torch.Generator().manual_seed(0)
    sizes = {
        "x": (2, length, 20),
        "dt": (2, length, 20),
        "A": (20, 5),
        "B": (2, length, 5),
        "C": (2, length, 5),
    }
    sizes |= {"D": (20,), "dt_bias": (20,), "z": (2, length, 20), "state": (2, 20, 5)}
    drawn = {name: torch.randn(size, generator=g).to(device) for name, size in sizes.items()}
    drawn["A"] = -drawn["A"].abs()
    starts = (torch.rand(2, length, generator=g) < 0.02).to(device)
    results = []
    for fused in (True, False):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in drawn.items()}
        *inputs, state = leaves.values()
        if fused:
            y, last = _run_kernel(kernel, ScanInputs(*inputs), starts, state)
        else:
            dt = F.softplus(leaves["dt"] + leaves["dt_bias"])
            plain = ScanInputs(leaves["x"], dt, *(leaves[name] for name in ("A", "B", "C", "D")))
            y, last = reference_scan(plain, starts, state)
            y = y * F.silu(leaves["z"])
        results.append([y, last, *torch.autograd.grad(y.sum() + last.sum(), list(leaves.values()))])
    for name, got, want in zip(("y", "last", *leaves), *results, strict=True):
        error = float((got - want).detach().abs().max() / want.detach().abs().max())
        if not error <= 1e-3:
            raise RuntimeError(f"its {name} is off by {error:.1e} of the largest value")


def reference_scan(inputs: ScanInputs, starts: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence position by position, differentiated by autograd. Also the step of cached decoding."""
    x, dt, A, B, C, D, _, _ = inputs
    outputs = []
    rows = zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True)
    for t, (x_t, dt_t, B_t, C_t) in enumerate(rows):
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None], 0)
        decay = torch.exp(dt_t.unsqueeze(-1) * A)
        state = decay * state + (dt_t * x_t).unsqueeze(-1) * B_t.unsqueeze(1)
        outputs.append((state @ C_t.unsqueeze(-1)).squeeze(-1) + D * x_t)
    return torch.stack(outputs, dim=1), state


@cache
def _kernel(name: str) -> Kernel:
    if name == "cpp":
        return CppScan()
    if name == "compile":  # both imports take seconds
        from nano_think.ops.scan_compile import CompileScan

        return CompileScan()
    if name == "triton":
        from nano_think.ops.scan_triton import TritonScan

        return TritonScan()
    return TorchScan()


def _run_kernel(
    kernel: Kernel, inputs: ScanInputs, starts: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (*inputs, state)
    ):
        return _Scan.apply(kernel, starts, state, *inputs)
    y, last, _ = kernel.forward(inputs, starts, state, keep=False)
    return y, last


class _Scan(torch.autograd.Function):
    """Autograd around a kernel: saves the inputs and the states at chunk borders."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, starts: Tensor | None, state: Tensor, *inputs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, last, borders = kernel.forward(ScanInputs(*inputs), starts, state, keep=True)
        ctx.kernel = kernel
        ctx.save_for_backward(starts, borders, *inputs)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        starts, borders, *inputs = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            *grads, dstate = ctx.kernel.backward(ScanInputs(*inputs), starts, borders, dy, dlast)
        return None, None, dstate, *grads
