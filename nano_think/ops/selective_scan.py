"""Selective scan (Gu and Dao, arXiv 2312.00752, eq. 2 and algorithm 2): one function, three backends.

`ref` is the recurrence written out, the oracle of the others. `torch` works in chunks with plain tensor
operations on any device. `cpp` is compiled on first use. The last two keep the states at chunk borders only and
rebuild the rest in the backward pass, whose cost is linear in the length. None divides by products of decays:
these underflow after some hundred positions.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nano_think.ops.scan_cpp import BuildError, CppScan

Backend = Literal["auto", "ref", "torch", "cpp"]
CHUNK = 16
BACKEND_VARIABLE = "NANO_THINK_SCAN"


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    starts: Tensor | None = None,
    state: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """y[t] = C[t] . h[t] + D x[t] with h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t], and the last h.

    x, dt: (B, L, d) inputs and step sizes >= 0; a step of 0 leaves the state exactly as it is.
    A: (d, n) < 0; B, C: (B, L, n); D: (d,).
    starts: (B, L) bool, True where a document begins: h[t-1] counts as 0 there. None: no such position.
    state: (B, d, n), h before the first position; None: zeros.
    backend: `auto` is `cpp` for fp32 on the CPU where a compiler exists, `torch` otherwise; the environment
    variable NANO_THINK_SCAN overrides the argument.

    Computes in fp32 (fp64 for fp64 inputs) whatever autocast says. Returns y (B, L, d) in the dtype of x and the
    last state (B, d, n) in the dtype of the computation. Every tensor argument but `starts` has a gradient.
    Raises ValueError for an unknown backend, or for `cpp` where it cannot run.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if state is None:
        state = x.new_zeros(len(x), *A.shape, dtype=dtype)
    tensors = tuple(tensor.to(dtype) for tensor in (x, dt, A, B, C, D, state))
    name = choose_backend(backend, tensors[0])
    with torch.autocast(x.device.type, enabled=False):
        if name == "ref" or x.shape[1] == 1:
            y, last = reference_scan(*tensors[:-1], starts, tensors[-1])
        else:
            y, last = _run_kernel(_kernel(name), tensors, starts)
    return y.to(x.dtype), last


def choose_backend(backend: str, x: Tensor) -> str:
    """`ref`, `torch` or `cpp` for inputs like `x`; see `selective_scan`."""
    backend = os.environ.get(BACKEND_VARIABLE) or backend
    if backend not in get_args(Backend):
        raise ValueError(f"scan backend must be one of {', '.join(get_args(Backend))}, not {backend!r}")
    fits = x.device.type == "cpu" and x.dtype == torch.float32
    if backend == "auto":
        return "cpp" if fits and cpp_problem() is None else "torch"
    if backend == "cpp" and not fits:
        raise ValueError(
            f"scan backend 'cpp' computes in fp32 on the CPU, not in {x.dtype} on {x.device.type}"
        )
    if backend == "cpp" and (problem := cpp_problem()):
        raise ValueError(f"scan backend 'cpp' cannot be built, use 'auto' or 'torch': {problem}")
    return backend


@cache
def cpp_problem() -> str | None:
    """Why the compiled backend cannot be used here, None where it can; the first call builds it and warns."""
    try:
        CppScan()
    except BuildError as error:
        warnings.warn(f"selective scan falls back to the slower 'torch' backend: {error}", stacklevel=2)
        return str(error)
    return None


def reference_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    starts: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """The recurrence position by position, differentiated by autograd. Also the step of cached decoding."""
    outputs = []
    rows = zip(*(tensor.unbind(1) for tensor in (x, dt, B, C)), strict=True)
    for t, (x_t, dt_t, B_t, C_t) in enumerate(rows):
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None], 0)
        decay = torch.exp(dt_t.unsqueeze(-1) * A)
        state = decay * state + (dt_t * x_t).unsqueeze(-1) * B_t.unsqueeze(1)
        outputs.append((state @ C_t.unsqueeze(-1)).squeeze(-1) + D * x_t)
    return torch.stack(outputs, dim=1), state


class Kernel(Protocol):
    """A scan with its own backward pass, on tensors of one dtype and device.

    Arguments are those of `selective_scan`. `borders` are the states in front of every chunk, in the kernel's
    own shape; backward receives them with the gradients of y and of the last state and returns those of
    x, dt, A, B, C, D and the initial state.
    """

    def forward(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        starts: Tensor | None,
        state: Tensor,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """y, the last state and, where `keep` asks for them, the borders."""

    def backward(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        starts: Tensor | None,
        borders: Tensor,
        dy: Tensor,
        dlast: Tensor,
    ) -> tuple[Tensor, ...]:
        """Gradients in the order above."""


@cache
def _kernel(name: str) -> Kernel:
    return CppScan() if name == "cpp" else TorchScan()


def _run_kernel(kernel: Kernel, tensors: tuple[Tensor, ...], starts: Tensor | None) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _Scan.apply(kernel, starts, *tensors)
    *inputs, state = tensors
    y, last, _ = kernel.forward(*inputs, starts, state, keep=False)
    return y, last


class _Scan(torch.autograd.Function):
    """Autograd around a kernel: saves the inputs and the states at chunk borders."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, starts: Tensor | None, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        *inputs, state = tensors
        y, last, borders = kernel.forward(*inputs, starts, state, keep=True)
        ctx.kernel = kernel
        ctx.save_for_backward(*inputs, starts, borders)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(dy.device.type, enabled=False):
            return None, None, *ctx.kernel.backward(*ctx.saved_tensors, dy, dlast)


class TorchScan:
    """Chunk by chunk: everything elementwise at once for a chunk, and one fused operation a position between."""

    def forward(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        starts: Tensor | None,
        state: Tensor,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        borders, outputs = [], []
        for x_c, dt_c, B_c, C_c, starts_c in _chunks(x, dt, B, C, starts):
            borders.append(state)
            states = _chunk_states(_decays(dt_c, A, starts_c), dt_c * x_c, B_c, state)
            outputs.append(torch.einsum("tbdn,tbn->tbd", states[1:], C_c))
            state = states[-1].clone()  # a view would keep all states of the chunk alive
        y = torch.cat(outputs).transpose(0, 1) + D * x
        return y, state, torch.stack(borders) if keep else None

    def backward(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        starts: Tensor | None,
        borders: Tensor,
        dy: Tensor,
        dlast: Tensor,
    ) -> tuple[Tensor, ...]:
        carry, dA = dlast, torch.zeros_like(A)
        pieces = []
        chunks = list(zip(_chunks(x, dt, B, C, starts), _time_chunks(dy), borders, strict=True))
        for (x_c, dt_c, B_c, C_c, starts_c), dy_c, border in reversed(chunks):
            decays, drive = _decays(dt_c, A, starts_c), dt_c * x_c
            states = _chunk_states(decays, drive, B_c, border)
            grads, carry = _chunk_gradients(decays, dy_c, C_c, carry)
            # What reaches h[t-1] times h[t-1] is the gradient of the exponent dt A.
            exponent = (grads * decays).mul_(states[:-1])
            through_drive = torch.einsum("tbdn,tbn->tbd", grads, B_c)
            dA += torch.einsum("tbdn,tbd->dn", exponent, dt_c)
            pieces.append(
                (
                    dt_c * through_drive,
                    torch.einsum("tbdn,dn->tbd", exponent, A) + x_c * through_drive,
                    torch.einsum("tbdn,tbd->tbn", grads, drive),
                    torch.einsum("tbdn,tbd->tbn", states[1:], dy_c),
                )
            )
        dx, ddt, dB, dC = (torch.cat(parts[::-1]).transpose(0, 1) for parts in zip(*pieces, strict=True))
        return dx + D * dy, ddt, dA, dB, dC, (dy * x).sum((0, 1)), carry


def _time_chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    """(B, L, ...) to pieces (<= CHUNK, B, ...)."""
    return tensor.transpose(0, 1).split(CHUNK)


def _chunks(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, starts: Tensor | None
) -> zip[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]]:
    pieces = [_time_chunks(tensor) for tensor in (x, dt, B, C)]
    marks = [None] * len(pieces[0]) if starts is None else _time_chunks(starts)
    return zip(*pieces, marks, strict=True)


def _decays(dt: Tensor, A: Tensor, starts: Tensor | None) -> Tensor:
    """exp(dt A) as (T, B, d, n), 0 where a document begins."""
    decays = torch.exp_(dt.unsqueeze(-1) * A)
    return decays if starts is None else decays.masked_fill_(starts[..., None, None], 0)


def _chunk_states(decays: Tensor, drive: Tensor, B: Tensor, border: Tensor) -> Tensor:
    """The state in front of a chunk and those after each of its positions, (T + 1, B, d, n)."""
    states = decays.new_empty(len(decays) + 1, *border.shape)
    states[0] = border
    torch.mul(drive.unsqueeze(-1), B.unsqueeze(2), out=states[1:])
    state = states[0]
    for decay, following in zip(decays.unbind(), states[1:].unbind(), strict=True):
        state = following.addcmul_(decay, state)
    return states


def _chunk_gradients(decays: Tensor, dy: Tensor, C: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the states (T, B, d, n) and of the state in front: g[t] = C[t] dy[t] + decay[t+1] g[t+1]."""
    grads = dy.unsqueeze(-1) * C.unsqueeze(2)
    for decay, grad in zip(reversed(decays.unbind()), reversed(grads.unbind()), strict=True):
        carry = decay * grad.add_(carry)
    return grads, carry
