"""What a kernel of the selective scan offers, and the one that needs nothing but torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

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
    """

    def forward(
        self, inputs: ScanInputs, starts: Tensor | None, state: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        borders, outputs = [], []
        for x, dt, B, C, starts_c in _chunks(inputs, starts):
            borders.append(state)
            states = _chunk_states(_decays(dt, inputs.A, starts_c), dt * x, B, state, starts_c)
            outputs.append(torch.einsum("tbdn,tbn->tbd", states[1:], C))
            state = states[-1].clone()  # a view would keep all states of the chunk alive
        y = torch.cat(outputs).transpose(0, 1) + inputs.D * inputs.x
        return y, state, torch.stack(borders) if keep else None

    def backward(
        self, inputs: ScanInputs, starts: Tensor | None, borders: Tensor, dy: Tensor, dlast: Tensor
    ) -> ScanGradients:
        carry, dA = dlast, torch.zeros_like(inputs.A)
        pieces = []
        chunks = list(zip(_chunks(inputs, starts), _time_chunks(dy), borders, strict=True))
        for (x, dt, B, C, starts_c), dy_c, border in reversed(chunks):
            decays, drive = _decays(dt, inputs.A, starts_c), dt * x
            states = _chunk_states(decays, drive, B, border, starts_c)
            grads, carry = _chunk_gradients(decays, dy_c, C, carry)
            # What reaches h[t-1] times h[t-1] is the gradient of the exponent dt A.
            exponent = (grads * decays).mul_(_reset(states[:-1], starts_c))
            through_drive = torch.einsum("tbdn,tbn->tbd", grads, B)
            dA += torch.einsum("tbdn,tbd->dn", exponent, dt)
            pieces.append(
                (
                    dt * through_drive,
                    torch.einsum("tbdn,dn->tbd", exponent, inputs.A) + x * through_drive,
                    torch.einsum("tbdn,tbd->tbn", grads, drive),
                    torch.einsum("tbdn,tbd->tbn", states[1:], dy_c),
                )
            )
        dx, ddt, dB, dC = (torch.cat(parts[::-1]).transpose(0, 1) for parts in zip(*pieces, strict=True))
        dx, dD = dx + inputs.D * dy, (dy * inputs.x).sum((0, 1))
        return ScanGradients(dx, ddt, dA, dB, dC, dD, dt_bias=None, z=None, state=carry)


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


def _chunk_gradients(decays: Tensor, dy: Tensor, C: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the states (T, B, d, n) and of the state in front: g[t] = C[t] dy[t] + decay[t+1] g[t+1]."""
    grads = dy.unsqueeze(-1) * C.unsqueeze(2)
    for decay, grad in zip(reversed(decays.unbind()), reversed(grads.unbind()), strict=True):
        carry = decay * grad.add_(carry)
    return grads, carry
