"""The chunked scan of `scan_kernel` under torch.compile.

One chunk, forward and backward, is what is compiled: a whole sequence would unroll into thousands of operations.
The functions here do one position after another and write nothing in place, which the compiler turns into one loop
over channels and states; from the form that `TorchScan` runs it makes code five times as slow as uncompiled.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nano_think.ops.scan_kernel import CHUNK, ScanGradients, ScanInputs, TorchScan

_SEQUENCES = ("x", "dt", "B", "C")


class CompileScan(TorchScan):
    """Sequences are filled up to whole chunks with steps of 0, which move no state.

    So every length runs the same two programs; another batch size or width compiles its own.
    """

    def __init__(self) -> None:
        super().__init__(
            torch.compile(chunk_outputs, dynamic=False), torch.compile(chunk_gradients, dynamic=False)
        )

    def forward(
        self, inputs: ScanInputs, starts: Tensor | None, state: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        length = inputs.x.shape[1]
        y, last, borders = super().forward(_filled(inputs), _fill(starts), _plain(state), keep)
        return y[:, :length], last, borders

    def backward(
        self, inputs: ScanInputs, starts: Tensor | None, borders: Tensor, dy: Tensor, dlast: Tensor
    ) -> ScanGradients:
        length = inputs.x.shape[1]
        filled = super().backward(_filled(inputs), _fill(starts), borders, _fill(dy), _plain(dlast))
        return filled._replace(**{name: getattr(filled, name)[:, :length] for name in _SEQUENCES})


def chunk_outputs(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, starts: Tensor | None, A: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """As `scan_kernel.chunk_outputs`."""
    outputs = []
    for t in range(len(x)):
        before = _before(state, starts, t)
        state = torch.exp(dt[t].unsqueeze(-1) * A) * before + (dt[t] * x[t]).unsqueeze(-1) * B[t].unsqueeze(1)
        outputs.append((state * C[t].unsqueeze(1)).sum(-1))
    return torch.stack(outputs), state


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
    """As `scan_kernel.chunk_gradients`."""
    states = [border]
    for t in range(len(x)):
        before = _before(states[-1], starts, t)
        decay = torch.exp(dt[t].unsqueeze(-1) * A)
        states.append(decay * before + (dt[t] * x[t]).unsqueeze(-1) * B[t].unsqueeze(1))
    pieces, dA = [], torch.zeros_like(A)
    for t in reversed(range(len(x))):
        grad = carry + dy[t].unsqueeze(-1) * C[t].unsqueeze(1)
        carry = _before(grad * torch.exp(dt[t].unsqueeze(-1) * A), starts, t)
        exponent = carry * _before(states[t], starts, t)
        through_drive = (grad * B[t].unsqueeze(1)).sum(-1)
        dA = dA + (exponent * dt[t].unsqueeze(-1)).sum(0)
        pieces.append(
            (
                dt[t] * through_drive,
                (exponent * A).sum(-1) + x[t] * through_drive,
                (grad * (dt[t] * x[t]).unsqueeze(-1)).sum(1),
                (states[t + 1] * dy[t].unsqueeze(-1)).sum(1),
            )
        )
    dx, ddt, dB, dC = (torch.stack(parts[::-1]) for parts in zip(*pieces, strict=True))
    return dx, ddt, dB, dC, dA, carry


def _before(state: Tensor, starts: Tensor | None, t: int) -> Tensor:
    """What position t of a chunk sees of what lies before it: nothing where a document begins."""
    return state if starts is None else state.masked_fill(starts[t, :, None, None], 0)


def _filled(inputs: ScanInputs) -> ScanInputs:
    sequences = {name: _fill(getattr(inputs, name)) for name in _SEQUENCES}
    return inputs._replace(A=_plain(inputs.A), **sequences)


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous and without a gradient of its own: whether it wants one would be another program."""
    return tensor.detach().contiguous()


def _fill(sequence: Tensor | None) -> Tensor | None:
    """(B, L, ...) with zeros up to the next whole chunk, time first in memory: strides do not depend on L then."""
    if sequence is None:
        return None
    missing = -sequence.shape[1] % CHUNK
    time_first = F.pad(sequence.detach(), (*(0, 0) * (sequence.ndim - 2), 0, missing)).transpose(0, 1)
    return time_first.flatten(0, 1).unflatten(0, time_first.shape[:2]).transpose(0, 1)
