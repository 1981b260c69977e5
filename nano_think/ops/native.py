"""Kernels in C++: built from a source beside their Python file by the system's compiler on first use.

The sources need no torch headers, so each builds in seconds. Libraries are kept in the user's cache folder under
a name made of source, its own headers, flags, compiler and processor, so that a new machine or compiler builds
its own.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from nano_think.files import atomic_write, hash_bytes

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC")


class BuildError(RuntimeError):
    """The library could not be built or loaded; the message says why."""


def cache_folder() -> Path:
    """Where built libraries live: $XDG_CACHE_HOME/nano_think, ~/.cache/nano_think without the variable.

    Raises BuildError for a user without a home.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nano_think"
    except RuntimeError as error:
        raise BuildError("there is no home folder to keep libraries in: set XDG_CACHE_HOME") from error


def find_compiler() -> str:
    """Path of $CXX or of the first common C++ compiler; raises BuildError where there is none."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise BuildError("no C++ compiler was found: install g++ or set CXX")


def load(source: Path) -> ctypes.CDLL:
    """The library of a source file, built where it is not in the cache; raises BuildError."""
    try:
        return ctypes.CDLL(str(build(source, cache_folder())))
    except OSError as error:
        raise BuildError(str(error)) from error


def build(source: Path, folder: Path) -> Path:
    """Compile a source file into `folder` unless the same build is there; raises BuildError."""
    compiler = find_compiler()
    errors = []
    for flags in ((*FLAGS, "-fopenmp"), FLAGS):  # some compilers come without OpenMP: one thread then
        # The verbose line names compiler version and the processor that -march=native stands for.
        target = _run(compiler, *flags, "-E", "-v", "-x", "c++", os.devnull)
        texts = [part.read_bytes() for part in sources(source)]
        key = hash_bytes(*texts, " ".join(flags).encode(), (target.stdout + target.stderr).encode())
        path = folder / f"{source.stem}-{key}.so"
        if path.exists():
            return path
        with tempfile.TemporaryDirectory() as temporary:
            built = Path(temporary) / "built.so"
            result = _run(compiler, *flags, str(source), "-o", str(built))
            if result.returncode == 0:
                atomic_write(path, built.read_bytes())
                return path
        errors.append(result.stderr.strip())
    raise BuildError(f"{compiler} failed: {errors[0][-500:]}")


def sources(source: Path) -> list[Path]:
    """A source file and every file it includes by `#include "..."`, directly or not; missing ones left out."""
    found, new = [source], [source]
    while new:
        including = new.pop()
        names = re.findall(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', including.read_text(), re.MULTILINE)
        included = [including.parent / name for name in names]
        new += [path for path in included if path.is_file() and path not in found + new]
        found += [path for path in new if path not in found]
    return found


def threads() -> int:
    """Threads a kernel may use: as many as torch."""
    return torch.get_num_threads()


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers begin, as kernels take it; None stands for a part that is not there."""
    return None if tensor is None else tensor.data_ptr()


def rows(tensor: Tensor) -> Tensor:
    """(B, L, ...) with a fixed distance between positions across rows: slices of a projection need no copy."""
    batch, length, _ = tensor.shape
    regular = tensor.stride(2) == 1 and (batch == 1 or tensor.stride(0) == length * tensor.stride(1))
    return tensor if regular else tensor.contiguous()


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
