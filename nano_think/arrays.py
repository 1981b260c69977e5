"""NumPy files of which the content is known beforehand: all else is refused before memory is asked for.

NumPy parses a header as Python and believes the shape that it states; an archive may unpack to any size.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

# dtype and shape of an array
Kind = tuple[str, tuple[int, ...]]


def read_npy(path: Path, kind: Kind, mapped: bool = False) -> np.ndarray:
    """The array in a file; mapped: left there and read when it is asked for.

    Raises OSError where there is no such file, ValueError where it holds anything but an array of this kind.
    """
    with open(path, "rb") as file:
        _check_header(file, kind, path.stat().st_size)
        if not mapped:
            return _array(file, kind)
        offset = file.tell()
    if 0 in kind[1]:
        return np.empty(kind[1], kind[0])  # nothing cannot be mapped
    return np.memmap(path, dtype=kind[0], mode="r", offset=offset, shape=kind[1])


def read_npz(path: Path, kinds: Mapping[str, Kind]) -> dict[str, np.ndarray]:
    """The arrays in an archive of `np.savez`, by name; raises as `read_npy`, also for other ones than `kinds`."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if set(members) != set(kinds) or len(archive.infolist()) != len(kinds):
                raise ValueError(f"holds other arrays than {', '.join(kinds)}")
            found = {}
            for name, kind in kinds.items():
                info = members[name]
                if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                    raise ValueError(f"{name} is packed")
                with archive.open(info) as file:
                    _check_header(file, kind, info.file_size)
                    found[name] = _array(file, kind)
            return found
    except (OSError, ValueError):
        raise
    except Exception as error:  # zipfile raises struct's, zlib's and its own errors, and a few plain ones
        raise ValueError(f"is no archive of arrays ({type(error).__name__})") from error


def _check_header(file: IO[bytes], kind: Kind, size: int) -> None:
    """Read up to the numbers; ValueError unless they are of this kind and all that is left of `size` bytes."""
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("another version of the format")
        shape, by_column, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # the header is parsed as Python
        raise ValueError("is no NumPy array") from error
    if (dtype, shape, by_column) != (np.dtype(kind[0]), kind[1], False):
        raise ValueError(f"holds {dtype} {shape}, expected {kind[0]} {kind[1]}"[:160])
    if size - file.tell() != _num_bytes(kind):
        raise ValueError(f"holds {size - file.tell()} bytes of numbers, expected {_num_bytes(kind)}")


def _array(file: IO[bytes], kind: Kind) -> np.ndarray:
    data: Any = bytearray(_num_bytes(kind))
    if file.readinto(data) != len(data) or file.read(1):  # type: ignore[attr-defined]
        raise ValueError("ends too early")
    return np.frombuffer(data, kind[0]).reshape(kind[1])


def _num_bytes(kind: Kind) -> int:
    count = np.dtype(kind[0]).itemsize
    for length in kind[1]:
        count *= length
    return count
