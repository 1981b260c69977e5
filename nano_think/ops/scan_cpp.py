"""The compiled selective scan, `selective_scan.cpp`."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nano_think.ops.native import address, load, rows, threads
from nano_think.ops.scan_kernel import ScanGradients, ScanInputs

SOURCE = Path(__file__).with_name("selective_scan.cpp")
CHANNEL_MULTIPLE = 16  # the widest vector the source uses; narrower ones divide it

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_SEQUENCES = ("x", "dt", "B", "C", "z")


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in _SEQUENCES),
        *((f"{name}_step", _SIZE) for name in _SEQUENCES),
        *((name, _POINTER) for name in ("A", "D", "dt_bias", "starts")),
        *((name, _SIZE) for name in ("batch", "length", "channels", "n")),
    ]


class _Gradients(ctypes.Structure):
    _fields_ = [(name, _POINTER) for name in ("x", "dt", "z", "A", "B", "C", "D", "dt_bias", "state")]


@cache
def load_library() -> ctypes.CDLL:
    """The built library, loaded once a process; raises BuildError."""
    library = load(SOURCE)
    problem, gradients = ctypes.POINTER(_Problem), ctypes.POINTER(_Gradients)
    library.scan_forward.argtypes = [problem, *[_POINTER] * 4, *[ctypes.c_int] * 2]
    library.scan_backward.argtypes = [problem, *[_POINTER] * 3, gradients, *[ctypes.c_int] * 2]
    library.scan_forward.restype = library.scan_backward.restype = None
    library.scan_chunk.restype = library.scan_group.restype = _SIZE
    return library


class CppScan:
    """The `Kernel` for the CPU: sequences all in fp32 or all in bf16, the rest in fp32.

    Raises BuildError where the library cannot be had.
    """

    def __init__(self) -> None:
        self.library = load_library()

    def forward(
        self, inputs: ScanInputs, starts: Tensor | None, state: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        batch, length, channels = inputs.x.shape
        packed = _pack(inputs)
        state = _pad(state, channels, axis=1).contiguous()
        chunks = -(-length // self.library.scan_chunk())
        borders = state.new_empty(batch, chunks, *state.shape[:0:-1]) if keep else None
        y, last = packed.x.new_empty(packed.x.shape), torch.empty_like(state)
        marks = None if starts is None else starts.contiguous()
        self.library.scan_forward(
            _problem(packed, marks),
            *(address(tensor) for tensor in (state, y, borders, last)),
            y.dtype == torch.bfloat16,
            threads(),
        )
        return y[..., :channels], last[:, :channels], borders

    def backward(
        self, inputs: ScanInputs, starts: Tensor | None, borders: Tensor, dy: Tensor, dlast: Tensor
    ) -> ScanGradients:
        batch, length, channels = inputs.x.shape
        packed = _pack(inputs)
        dy, dlast = _pad(dy, channels).contiguous(), _pad(dlast, channels, axis=1).contiguous()
        groups = -(-dy.shape[2] // self.library.scan_group())
        A, n = packed.A, packed.A.shape[1]
        # Sums over rows and channels end here, so that threads share nothing and their number changes no bit.
        grads = {"x": torch.empty_like(dy), "dt": torch.empty_like(dy), "state": torch.empty_like(dlast)}
        grads["z"] = torch.empty_like(dy) if packed.z is not None else None
        grads["A"], grads["D"] = A.new_empty(batch, *A.shape), A.new_empty(batch, dy.shape[2])
        grads["dt_bias"] = None if packed.dt_bias is None else torch.empty_like(grads["D"])
        grads["B"], grads["C"] = (A.new_empty(groups, batch, length, n) for _ in range(2))
        marks = None if starts is None else starts.contiguous()
        self.library.scan_backward(
            _problem(packed, marks),
            *(address(tensor) for tensor in (borders, dy, dlast)),
            _Gradients(**{name: address(tensor) for name, tensor in grads.items()}),
            dy.dtype == torch.bfloat16,
            threads(),
        )
        bias, z = grads["dt_bias"], grads["z"]
        return ScanGradients(
            x=grads["x"][..., :channels],
            dt=grads["dt"][..., :channels],
            A=grads["A"].sum(0)[:channels],
            B=grads["B"].sum(0).to(dy.dtype),
            C=grads["C"].sum(0).to(dy.dtype),
            D=grads["D"].sum(0)[:channels],
            dt_bias=None if bias is None else bias.sum(0)[:channels],
            z=None if z is None else z[..., :channels],
            state=grads["state"][:, :channels],
        )


def _pack(inputs: ScanInputs) -> ScanInputs:
    """In the kernel's layout: regular rows, padded channels."""
    x, dt, A, B, C, D, dt_bias, z = inputs
    channels = x.shape[2]
    return ScanInputs(
        x=rows(_pad(x, channels)),
        dt=rows(_pad(dt, channels)),
        A=_pad(A, channels, axis=0).contiguous(),
        B=rows(B),
        C=rows(C),
        D=_pad(D, channels).contiguous(),
        dt_bias=None if dt_bias is None else _pad(dt_bias, channels).contiguous(),
        z=None if z is None else rows(_pad(z, channels)),
    )


def _pad(tensor: Tensor, channels: int, axis: int = -1) -> Tensor:
    """The axis of channels padded with zeros to a multiple of the vector width, `tensor` where it is one."""
    missing = -channels % CHANNEL_MULTIPLE
    if not missing:
        return tensor
    behind = tensor.ndim - 1 - axis % tensor.ndim
    return F.pad(tensor, (*(0, 0) * behind, 0, missing))


def _problem(packed: ScanInputs, starts: Tensor | None) -> _Problem:
    sequences = {name: getattr(packed, name) for name in _SEQUENCES}
    batch, length, channels = packed.x.shape
    return _Problem(
        **{name: address(tensor) for name, tensor in sequences.items()},
        **{f"{name}_step": 0 if t is None else t.stride(1) for name, t in sequences.items()},
        A=address(packed.A),
        D=address(packed.D),
        dt_bias=address(packed.dt_bias),
        starts=address(starts),
        batch=batch,
        length=length,
        channels=channels,
        n=packed.A.shape[1],
    )
