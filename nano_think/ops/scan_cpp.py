"""The compiled selective scan, `selective_scan.cpp`."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nano_think.ops.native import load
from nano_think.ops.scan_kernel import ScanInputs

SOURCE = Path(__file__).with_name("selective_scan.cpp")
CHANNEL_MULTIPLE = 16  # the widest vector the source uses; narrower ones divide it

_POINTER = ctypes.c_void_p
_SHAPE = (ctypes.c_int64,) * 4 + (ctypes.c_int,)  # batch, length, channels, states; threads


@cache
def load_library() -> ctypes.CDLL:
    """The built library, loaded once a process; raises BuildError."""
    library = load(SOURCE)
    library.scan_forward.argtypes = [*[_POINTER] * 11, *_SHAPE]
    library.scan_backward.argtypes = [*[_POINTER] * 17, *_SHAPE]
    library.scan_forward.restype = library.scan_backward.restype = None
    library.scan_chunk.restype = library.scan_group.restype = ctypes.c_int64
    return library


class CppScan:
    """The `Kernel` for fp32 tensors on the CPU; raises BuildError where the library cannot be had."""

    def __init__(self) -> None:
        self.library = load_library()

    def forward(
        self, inputs: ScanInputs, starts: Tensor | None, state: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        batch, length, channels = inputs.x.shape
        packed = _pack(inputs)
        state = _pad(state.transpose(1, 2), channels)
        chunks = -(-length // self.library.scan_chunk())
        borders = state.new_empty(batch, chunks, *state.shape[1:]) if keep else None
        y, last = torch.empty_like(packed.x), torch.empty_like(state)
        self._call(self.library.scan_forward, packed, starts, state, y, borders, last)
        return y[..., :channels], last.transpose(1, 2)[:, :channels], borders

    def backward(
        self, inputs: ScanInputs, starts: Tensor | None, borders: Tensor, dy: Tensor, dlast: Tensor
    ) -> tuple[Tensor, ...]:
        channels = inputs.x.shape[2]
        packed = _pack(inputs)
        x, dt, rate, B, C, D = packed
        dy, dlast = _pad(dy, channels), _pad(dlast.transpose(1, 2), channels)
        groups = -(-x.shape[2] // self.library.scan_group())
        # Sums over rows and channels end here, so that threads share nothing and their number changes no bit.
        dx, ddt, dstate = torch.empty_like(x), torch.empty_like(dt), torch.empty_like(dlast)
        dA, dD = rate.new_empty(len(x), *rate.shape), D.new_empty(len(x), *D.shape)
        dB, dC = B.new_empty(groups, *B.shape), C.new_empty(groups, *C.shape)
        grads = (dx, ddt, dA, dB, dC, dD, dstate)
        self._call(self.library.scan_backward, packed, starts, borders, dy, dlast, *grads)
        return (
            dx[..., :channels],
            ddt[..., :channels],
            dA.sum(0).t()[:channels],
            dB.sum(0),
            dC.sum(0),
            dD.sum(0)[:channels],
            dstate.transpose(1, 2)[:, :channels],
        )

    def _call(self, function: Any, inputs: ScanInputs, starts: Tensor | None, *others: Tensor | None) -> None:
        marks = None if starts is None else starts.contiguous()
        addresses = [None if t is None else t.data_ptr() for t in (*inputs, marks, *others)]
        function(*addresses, *inputs.x.shape, len(inputs.A), threads())


def threads() -> int:
    """Threads the kernel may use: as many as torch."""
    return torch.get_num_threads()


def _pack(inputs: ScanInputs) -> ScanInputs:
    """Contiguous and padded, with A (n, d) as the exponent of 2, since exp(dt A) = 2^(dt A log2 e)."""
    x, dt, A, B, C, D = inputs
    channels = x.shape[2]
    x, dt, rate, D = (_pad(tensor, channels) for tensor in (x, dt, A.t() * math.log2(math.e), D))
    return ScanInputs(x, dt, rate, B.contiguous(), C.contiguous(), D)


def _pad(tensor: Tensor, channels: int) -> Tensor:
    """Contiguous, the last axis padded with zeros to a multiple of the vector width."""
    return F.pad(tensor, (0, -channels % CHANNEL_MULTIPLE)).contiguous()
