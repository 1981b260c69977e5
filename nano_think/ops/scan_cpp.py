"""The compiled selective scan: built from `selective_scan.cpp` by the system's C++ compiler on first use.

The library needs no torch headers, so it builds in about two seconds. It is kept in the user's cache folder
under a name made of source, flags, compiler and processor, so that a new machine or compiler builds its own.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nano_think.files import atomic_write, hash_bytes
from nano_think.ops.scan_kernel import ScanInputs

SOURCE = Path(__file__).with_name("selective_scan.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC")
CHANNEL_MULTIPLE = 16  # the widest vector the source uses; narrower ones divide it

_POINTER = ctypes.c_void_p
_SHAPE = (ctypes.c_int64,) * 4 + (ctypes.c_int,)  # batch, length, channels, states; threads


class BuildError(RuntimeError):
    """The library could not be built or loaded; the message says why."""


def cache_folder() -> Path:
    """Where built libraries live: $XDG_CACHE_HOME/nano_think, ~/.cache/nano_think without the variable."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nano_think"


def find_compiler() -> str:
    """Path of $CXX or of the first common C++ compiler; raises BuildError where there is none."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise BuildError("no C++ compiler was found: install g++ or set CXX")


def build(folder: Path) -> Path:
    """Compile the source into `folder` unless the same build is there; raises BuildError."""
    compiler, source = find_compiler(), SOURCE.read_bytes()
    errors = []
    for flags in ((*FLAGS, "-fopenmp"), FLAGS):  # some compilers come without OpenMP: one thread then
        # The verbose line names compiler version and the processor that -march=native stands for.
        target = _run(compiler, *flags, "-E", "-v", "-x", "c++", os.devnull)
        key = hash_bytes(source, " ".join(flags).encode(), (target.stdout + target.stderr).encode())
        path = folder / f"selective_scan-{key}.so"
        if path.exists():
            return path
        with tempfile.TemporaryDirectory() as temporary:
            built = Path(temporary) / "scan.so"
            result = _run(compiler, *flags, str(SOURCE), "-o", str(built))
            if result.returncode == 0:
                atomic_write(path, built.read_bytes())
                return path
        errors.append(result.stderr.strip())
    raise BuildError(f"{compiler} failed: {errors[0][-500:]}")


@cache
def load_library() -> ctypes.CDLL:
    """The built library, loaded once a process; raises BuildError."""
    try:
        library = ctypes.CDLL(str(build(cache_folder())))
    except OSError as error:
        raise BuildError(str(error)) from error
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


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)
