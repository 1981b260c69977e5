"""The compiled side of the native decode step, `native_step.cpp`: its structs, and packing for it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from nano_think.ops.native import load, threads

Precision: TypeAlias = Literal["fp32", "bf16", "int8"]

SOURCE = Path(__file__).with_name("native_step.cpp")
LANES = 16  # numbers of a vector; vectors are padded to a multiple of it
PANEL = 64  # rows of a packed matrix are padded to a multiple of it
COLUMNS = 4  # columns likewise

_number, _pointer = ctypes.c_int64, ctypes.c_void_p


class Part(ctypes.Structure):
    """The struct of that name in `native_worker.h`: sizes and buffers of one network, 0 for what it has not."""

    _fields_ = [
        *((name, _number) for name in (
            "kind", "num_layers", "ffn_dim",
            "num_heads", "num_kv_heads", "head_dim", "rope_dim", "latent_dim", "interleaved",
            "d_inner", "d_state", "d_conv", "dt_rank", "gate",
            "passes", "reads_out", "post_norm", "state_bytes",
        )),
        ("eps", ctypes.c_double),
        *((name, _pointer) for name in ("weights", "mixers", "rope", "noise", "state")),
    ]  # fmt: skip


class Model(ctypes.Structure):
    """The struct of that name."""

    _fields_ = [
        *((name, _number) for name in (
            "d_model", "vocab_size", "max_len", "num_experts", "raw_input", "mixes_probabilities",
            "span", "token_term",
        )),
        *((name, ctypes.c_double) for name in ("tau", "floor", "decay", "router_eps")),
        *((name, _pointer) for name in (
            "table", "router", "router_state", "head", "screen", "screen_errors",
        )),
        ("attention", ctypes.POINTER(Part)),
        ("experts", ctypes.POINTER(Part)),
    ]  # fmt: skip


class Rows(ctypes.Structure):
    """The struct of that name."""

    _fields_ = [
        ("count", _number),
        *((name, _pointer) for name in ("slot", "token", "position")),
        ("best", _number),
        ("hidden", _pointer),
    ]


@cache
def load_library() -> ctypes.CDLL:
    """The built library, loaded once a process; raises BuildError."""
    library = load(SOURCE)
    model, rows = ctypes.POINTER(Model), ctypes.POINTER(Rows)
    library.native_step.argtypes = [model, ctypes.c_int, rows, _pointer, _pointer, ctypes.c_int]
    library.pack_matrix.argtypes = [ctypes.c_int, _pointer, _number, _number, _pointer, ctypes.c_int]
    library.packed_bytes.argtypes = [ctypes.c_int, _number, _number]
    library.prefer_huge_pages.argtypes = [_pointer, _number]
    library.choose_tokens.argtypes = [
        *(_pointer, _number, _number, _number, ctypes.c_double, _number, ctypes.c_double),
        *(_pointer, _pointer, _pointer, ctypes.c_int),
    ]
    library.native_read_out.argtypes = [model, ctypes.c_int, _pointer, _number, _pointer, ctypes.c_int]
    library.token_logprobs.argtypes = [_pointer, _number, _number, _number, _pointer, _pointer, ctypes.c_int]
    for name in (
        "native_step", "native_read_out", "pack_matrix", "prefer_huge_pages", "choose_tokens", "token_logprobs",
    ):  # fmt: skip
        getattr(library, name).restype = None
    library.packed_bytes.restype = _number
    return library


def kind_of(precision: Precision) -> int:
    """The number that stands for a precision in the library; raises ValueError for an unknown one."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {get_args(Precision)}, not {precision!r}")
    return get_args(Precision).index(precision)


def padded(n: int, multiple: int = LANES) -> int:
    """n rounded up."""
    return -(-n // multiple) * multiple


def pad_vectors(tensor: Tensor) -> Tensor:
    """(..., n) with zeros behind each vector, up to a multiple of LANES."""
    return F.pad(tensor.detach(), (0, -tensor.shape[-1] % LANES)).contiguous()


def buffer(size: int) -> Tensor:
    """Bytes on large pages where the system has them: the stream does not stall at page borders."""
    made = torch.empty(size, dtype=torch.uint8)
    load_library().prefer_huge_pages(made.data_ptr(), size)
    return made


class Packer:
    """Collects weights in the order in which a step reads them; `finish` makes one buffer of them.

    precision: of matrices that name no other.
    """

    def __init__(self, precision: Precision) -> None:
        self.precision = precision
        self._items: list[
            tuple[int, Tensor, int]
        ] = []  # kind, addresses of the rows, columns; or -1, bytes, 0
        self._sizes: list[int] = []
        self._alive: list[Tensor] = []  # what the addresses point to

    def vectors(self, *tensors: Tensor) -> None:
        """Vectors (..., n) in fp32."""
        for tensor in tensors:
            data = pad_vectors(tensor.float()).flatten().view(torch.uint8)
            self._items.append((-1, data, 0))
            self._sizes.append(len(data))

    def matrix(self, *parts: Tensor, precision: Precision | None = None) -> None:
        """Matrices (rows, cols) below one another, as one."""
        weights = [_plain(part) for part in parts]
        self._add(torch.cat([_addresses(weight) for weight in weights]), weights, precision)

    def alternating(self, first: Tensor, second: Tensor) -> None:
        """Half a panel of rows of the one, half a panel of the other, and so on."""
        weights = [_plain(first), _plain(second)]
        halves = [
            F.pad(a, (0, -len(a) % (PANEL // 2))).view(-1, PANEL // 2) for a in map(_addresses, weights)
        ]
        self._add(torch.cat(halves, dim=1).flatten(), weights, None)

    @property
    def size(self) -> int:
        """Bytes collected so far: where the next item begins."""
        return sum(self._sizes)

    def finish(self) -> Tensor:
        """The packed bytes."""
        library, packed = load_library(), buffer(self.size)
        for (kind, rows, cols), target in zip(self._items, packed.split(self._sizes), strict=True):
            if kind < 0:
                target.copy_(rows)
            else:
                pointers = rows.data_ptr(), len(rows) // PANEL, cols, target.data_ptr()
                library.pack_matrix(kind, *pointers, threads())
        return packed

    def _add(self, rows: Tensor, weights: Sequence[Tensor], precision: Precision | None) -> None:
        rows = F.pad(rows, (0, -len(rows) % PANEL))
        kind, cols = kind_of(precision or self.precision), weights[0].shape[1]
        self._alive.extend(weights)
        self._items.append((kind, rows, cols))
        self._sizes.append(load_library().packed_bytes(kind, len(rows) // PANEL, cols))


def _plain(weight: Tensor) -> Tensor:
    weight = weight.detach()
    return weight if weight.stride(1) == 1 else weight.contiguous()


def _addresses(weight: Tensor) -> Tensor:
    """Where each row begins."""
    return weight.data_ptr() + torch.arange(weight.shape[0]) * (weight.stride(0) * weight.element_size())
