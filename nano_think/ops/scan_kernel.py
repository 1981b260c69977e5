"""What a kernel of the selective scan offers, and the one that needs nothing but torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

CHUNK = 16


class ScanInputs(NamedTuple):
    """x, dt, z (B, L, d); A (d, n); B, C (B, L, n); D, dt_bias (d,): see `selective_scan`. One device."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    dt_bias: Tensor | None = None
    z: Tensor | None = None


class ScanGradients(NamedTuple):
    """Gradients of everything in `ScanInputs`, in its order, and of the initial state."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    dt_bias: Tensor | None
    z: Tensor | None
    state: Tensor


class Kernel(Protocol):
    """A scan with its own backward pass.

    `borders` are the states in front of every chunk, in a shape that is the kernel's own: all that the backward
    pass needs besides the inputs.
    """

    def forward(
        self, inputs: ScanInputs, starts: Tensor | None, state: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """y (B, L, d), the last state (B, d, n) and, where `keep` asks for them, the borders."""

    def backward(
        self, inputs: ScanInputs, starts: Tensor | None, borders: Tensor, dy: Tensor, dlast: Tensor
    ) -> ScanGradients:
        """The gradients, given those of y and the last state."""


class TorchScan:
    """Chunk by chunk: everything elementwise at once for a chunk, and one fused operation a position between.

    The scan alone in one dtype; `dt_bias` and `z` are left to plain tensor operations around it.
    forward_chunk, backward_chunk: what is done with a chunk, as compiled elsewhere or as here.
    """

    def __init__(
        self,
        forward_chunk: Callable[..., Any] | None = None,
        backward_chunk: Callable[..., Any] | None = None,
    ) -> None:
        self.forward_chunk: Callable[..., Any] = forward_chunk or chunk_outputs
        self.backward_chunk: Callable[..., Any] = backward_chunk or chunk_gradients

    def forward(
        self, inputs: ScanInputs, starts: Tensor | None, state: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        borders, outputs = [], []
        for chunk in _chunks(inputs, starts):
            borders.append(state)
            output, state = self.forward_chunk(*chunk, inputs.A, state)
            outputs.append(output)
        y = torch.cat(outputs).transpose(0, 1) + inputs.D * inputs.x
        return y, state, torch.stack(borders) if keep else None

    def backward(
        self, inputs: ScanInputs, starts: Tensor | None, borders: Tensor, dy: Tensor, dlast: Tensor
    ) -> ScanGradients:
        carry, dA, pieces = dlast, torch.zeros_like(inputs.A), []
        chunks = list(zip(_chunks(inputs, starts), _time_chunks(dy), borders, strict=True))
        for chunk, dy_c, border in reversed(chunks):
            *piece, dA_c, carry = self.backward_chunk(*chunk, inputs.A, border, dy_c, carry)
            dA += dA_c
            pieces.append(piece)
        dx, ddt, dB, dC = (torch.cat(parts[::-1]).transpose(0, 1) for parts in zip(*pieces, strict=True))
        dx, dD = dx + inputs.D * dy, (dy * inputs.x).sum((0, 1))
        return ScanGradients(dx, ddt, dA, dB, dC, dD, dt_bias=None, z=None, state=carry)


def chunk_outputs(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, starts: Tensor | None, A: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """C . h (T, B, d) of a chunk, sequences time first, and the state (B, d, n) behind it."""
    states = _chunk_states(_decays(dt, A, starts), dt * x, B, state, starts)
    return torch.einsum("tbdn,tbn->tbd", states[1:], C), states[-1].clone()  # a view would keep all states


def chunk_gradients(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None,
    A: Tensor,
    border: Tensor,
    dy: Tensor,
    carry: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, B, C (without the part of D), A and the state in front, from dy and that behind."""
    decays, drive = _decays(dt, A, starts), dt * x
    states = _chunk_states(decays, drive, B, border, starts)
    grads, carry = _state_gradients(decays, dy, C, carry)
    # What reaches h[t-1] times h[t-1] is the gradient of the exponent dt A.
    exponent = (grads * decays).mul_(_reset(states[:-1], starts))
    through_drive = torch.einsum("tbdn,tbn->tbd", grads, B)
    return (
        dt * through_drive,
        torch.einsum("tbdn,dn->tbd", exponent, A) + x * through_drive,
        torch.einsum("tbdn,tbd->tbn", grads, drive),
        torch.einsum("tbdn,tbd->tbn", states[1:], dy),
        torch.einsum("tbdn,tbd->dn", exponent, dt),
        carry,
    )


def _time_chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    """(B, L, ...) to pieces (<= CHUNK, B, ...)."""
    return tensor.transpose(0, 1).split(CHUNK)


def _chunks(
    inputs: ScanInputs, starts: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]]:
    """x, dt, B, C and starts of every chunk, time first."""
    pieces = [_time_chunks(tensor) for tensor in (inputs.x, inputs.dt, inputs.B, inputs.C)]
    marks = [None] * len(pieces[0]) if starts is None else _time_chunks(starts)
    return zip(*pieces, marks, strict=True)


def _decays(dt: Tensor, A: Tensor, starts: Tensor | None) -> Tensor:
    """exp(dt A) as (T, B, d, n), 0 where a document begins."""
    decays = torch.exp_(dt.unsqueeze(-1) * A)
    return decays if starts is None else decays.masked_fill_(starts[..., None, None], 0)


def _reset(state: Tensor, starts: Tensor | None) -> Tensor:
    """`state` (..., B, d, n), 0 where `starts` (..., B) says so, even if it is not finite there."""
    return state if starts is None else state.masked_fill(starts[..., None, None], 0)


def _chunk_states(decays: Tensor, drive: Tensor, B: Tensor, border: Tensor, starts: Tensor | None) -> Tensor:
    """The state in front of a chunk and those after each of its positions, (T + 1, B, d, n)."""
    states = decays.new_empty(len(decays) + 1, *border.shape)
    states[0] = border
    torch.mul(drive.unsqueeze(-1), B.unsqueeze(2), out=states[1:])
    state = states[0]
    marks = [None] * len(decays) if starts is None else starts.unbind()
    for decay, following, start in zip(decays.unbind(), states[1:].unbind(), marks, strict=True):
        state = following.addcmul_(decay, _reset(state, start))
    return states


def _state_gradients(decays: Tensor, dy: Tensor, C: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the states (T, B, d, n) and of the state in front: g[t] = C[t] dy[t] + decay[t+1] g[t+1]."""
    grads = dy.unsqueeze(-1) * C.unsqueeze(2)
    for decay, grad in zip(reversed(decays.unbind()), reversed(grads.unbind()), strict=True):
        carry = decay * grad.add_(carry)
    return grads, carry
