"""What a format of files is to the harness, and the ways in which valid files are changed.

Files that are kept with their hash are given the right one again in most cases: the hash would else refuse all
that the reader behind it is meant to be tried with.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.reliability.mutations import HOSTILE_BYTES, HOSTILE_VALUES, Case, change_bytes, change_json

COMMITTED = Path(__file__).resolve().parents[1] / "data_files" / "checkpoints" / "schema_0"
Reached = Callable[[], None]
# The name of a file below a folder, and what it holds instead.
Change = tuple[str, bytes]


@dataclass(frozen=True)
class Format:
    """controls: inputs that must be taken, the first one being what was written."""

    name: str
    draw: Callable[[random.Random], Case]
    judge: Callable[[Any, Reached], None]
    controls: list[Any]


class Folder:
    """A folder of valid files, of which some are replaced for the time of a block."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = {f.relative_to(path).as_posix(): f.read_bytes() for f in path.rglob("*") if f.is_file()}

    @contextmanager
    def changed(self, *changes: Change) -> Iterator[Path]:
        """The folder with these files as they are given."""
        try:
            for name, data in changes:
                (self.path / name).write_bytes(data)
            yield self.path
        finally:
            for name, _ in changes:
                (self.path / name).write_bytes(self.files[name])


def change_json_file(data: bytes, rng: random.Random) -> Case:
    """A file of JSON with nodes changed, or bytes, or replaced by a single value."""
    chance = rng.random()
    if chance < 0.65:
        return Case(json.dumps(change_json(json.loads(data), rng)).encode(), True)
    if chance < 0.93:
        return Case(change_bytes(data, rng), True)
    return Case(junk(rng), False)


def junk(rng: random.Random) -> bytes:
    """A file that never was a valid one."""
    pick = rng.randrange(3)
    if pick == 0:
        return json.dumps(rng.choice(HOSTILE_VALUES)).encode()
    return rng.choice(HOSTILE_BYTES) * rng.randint(0, 3) if pick == 1 else rng.randbytes(rng.randint(0, 300))


def is_json(data: bytes) -> bool:
    """Whether this parses."""
    with suppress(ValueError, RecursionError):
        json.loads(data.decode())
        return True
    return False


def copied(source: str, folder: Path) -> Path:
    """A committed model without its provenance, which knows no hashes."""
    shutil.copytree(COMMITTED / source, folder)
    (folder / "provenance.json").unlink()
    return folder


def change_array(data: bytes, rng: random.Random) -> bytes:
    """A .npy file with other numbers, another shape or type, or changed bytes."""
    pick = rng.randrange(6)
    array = np.load(io.BytesIO(data))
    if pick < 3 and array.size:
        array = array.copy()
        extreme = (np.finfo if array.dtype.kind == "f" else np.iinfo)(array.dtype)
        values = [extreme.max, extreme.min, 0, -1, 1] + [np.nan, np.inf] * (array.dtype.kind == "f")
        array.reshape(-1)[rng.randrange(array.size)] = rng.choice(values)
    elif pick == 3:
        array = rng.choice(
            (array[:-1], array.T, array.astype("float64"), np.concatenate([array, array]), array[None])
        )
    else:
        header = 10 + int.from_bytes(data[8:10], "little")
        if pick == 4:
            return change_bytes(data, rng)
        text = data[10:header].replace(b"(", rng.choice((b"(1000000000000, ", b"(-1, ", b"((", b"[")), 1)[
            : header - 10
        ]
        return data[:10] + text + data[header:]
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def change_members(data: bytes, change: Callable[[str, bytes], bytes], rng: random.Random) -> bytes:
    """A zip archive in which one member is changed and its checksum is right again."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    chosen, buffer = rng.randrange(len(members)), io.BytesIO()
    with zipfile.ZipFile(
        buffer, "w", rng.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,))
    ) as archive:
        for number, (info, content) in enumerate(members):
            archive.writestr(info.filename, change(info.filename, content) if number == chosen else content)
    return buffer.getvalue()
