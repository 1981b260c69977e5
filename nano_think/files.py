"""Crash-safe writing: everything appears under its final name complete, or not at all.

Content goes to a temporary neighbour, is synced and renamed, and the folder is synced too. A process that is
killed leaves its temporary name behind. While it lives it holds a lock on it, which is how `remove_abandoned`
tells what nobody will finish from what somebody is writing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Names of what is being written, and of locks.
_TEMPORARY = re.compile(r"\..+\.(\d+-[0-9a-f]{8}\.tmp|lock)")
_ATTEMPTS = 5
# Handles that hold a lock. A forked process (a worker of a loader) must not inherit them: the lock would outlive
# the process that writes.
_locks: set[int] = set()


def _close_inherited() -> None:
    for handle in _locks:
        os.close(handle)
    _locks.clear()


os.register_at_fork(after_in_child=_close_inherited)


def _sync(path: Path) -> None:
    """Flush a file or directory to disk, so that a rename that follows cannot overtake its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _make_folder(path: Path) -> None:
    """Create a folder and its parents, each on disk before anything is put into it."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")


def _locked(path: Path, make: Callable[[Path], None]) -> tuple[Path, int]:
    """A temporary neighbour of `path`, made by `make`, and the handle that holds its lock."""
    while True:
        temporary = _temporary_name(path)
        make(temporary)
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(temporary, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks: nobody takes it for abandoned
                fcntl.flock(handle, fcntl.LOCK_EX)
            if temporary.exists():
                _locks.add(handle)
                return temporary, handle
            os.close(handle)
        # it was taken for abandoned before it was locked


def _unlock(handle: int) -> None:
    if handle in _locks:
        _locks.remove(handle)
        os.close(handle)


@contextlib.contextmanager
def sole_owner(folder: str | Path) -> Iterator[bool]:
    """Whether no other process has this folder for itself; where none does, this one has it during the block."""
    handle = os.open(folder, os.O_RDONLY)
    _locks.add(handle)
    try:
        yield _lock_at_once(handle)
    finally:
        _unlock(handle)


def _lock_at_once(handle: int) -> bool:
    """Lock, False where somebody else has the lock; a file system without locks gives it to all."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


class StagedFile:
    """A file that is complete and synced under a temporary name; `publish` gives it its own.

    Raises OSError, with `path` as its filename, where it cannot be written; nothing is left then.
    """

    def __init__(self, path: str | Path, data: bytes | memoryview | str) -> None:
        self.path = Path(path)
        with _naming(self.path):
            _make_folder(self.path.parent)
            self._temporary, self._handle = _locked(self.path, Path.touch)
            try:
                self._temporary.write_bytes(data.encode() if isinstance(data, str) else data)
                _sync(self._temporary)
            except BaseException:
                self.discard()
                raise

    def publish(self) -> None:
        """Let it appear in place of what is there."""
        try:
            with _naming(self.path):
                os.replace(self._temporary, self.path)
                _sync(self.path.parent)
        finally:
            self.discard()

    def discard(self) -> None:
        """Forget what has not been published."""
        try:
            self._temporary.unlink(missing_ok=True)
        finally:
            _unlock(self._handle)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors in here are about `path`; those of writing name no file by themselves."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write `data` to `path` through a temporary neighbour and a rename."""
    StagedFile(path, data).publish()


def read_json(path: str | Path) -> Any:
    """The plain value in a JSON file.

    Raises OSError where it cannot be read, ValueError where it is no JSON or nested beyond what can be followed.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON with `atomic_write`."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False) + "\n")


@contextlib.contextmanager
def atomic_dir(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that becomes `path` when the block ends without an exception.

    If there is one already, by another process that has finished meanwhile, that stays and ours is dropped: both
    were made from the same inputs. replace: ours takes its place instead.
    """
    path = Path(path)
    _make_folder(path.parent)
    temporary, handle = _locked(path, Path.mkdir)
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            _sync(file)
        _sync(temporary)
        if replace:
            _put_in_place(temporary, path)
        else:
            try:
                os.rename(temporary, path)
            except OSError:
                if not path.is_dir():
                    raise
        _sync(path.parent)
    finally:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
        finally:
            _unlock(handle)


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename a folder to `path`; what is there is moved aside whole before it is deleted."""
    for attempts_left in reversed(range(_ATTEMPTS)):
        aside = _moved_aside(path)
        try:
            os.rename(temporary, path)
            return
        except OSError:  # another process that does the same has put its own there in between
            with contextlib.suppress(OSError):
                os.rename(aside, path)
            if not attempts_left:
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _moved_aside(path: Path) -> Path:
    aside = _temporary_name(path)
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
    return aside


def remove_dir(path: str | Path) -> None:
    """Delete a folder, if it is there, so that nobody ever sees half of it."""
    shutil.rmtree(_moved_aside(Path(path)), ignore_errors=True)


def remove_abandoned(root: str | Path) -> int:
    """Delete what killed processes left half-written anywhere below `root`, and nothing else; returns how much."""
    removed = 0
    for folder, folders, names in os.walk(root):
        for name in filter(_TEMPORARY.fullmatch, [*folders, *names]):
            removed += _remove_if_abandoned(Path(folder, name))
        folders[:] = [name for name in folders if not _TEMPORARY.fullmatch(name)]
    return removed


def _remove_if_abandoned(path: Path) -> bool:
    """Delete a temporary file or folder unless the process that writes it lives."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


@contextlib.contextmanager
def locked(path: str | Path, waiting: Callable[[], object] | None = None) -> Iterator[None]:
    """Hold the lock `path`, which one process has at a time; the system releases it however the process ends.

    waiting: called once where another process holds it; what it raises ends the wait. The file is gone afterwards.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _locked_handle(path, waiting)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        fcntl.flock(handle, fcntl.LOCK_UN)  # closing would leave it to children that were forked meanwhile
        os.close(handle)


def _locked_handle(path: Path, waiting: Callable[[], object] | None) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _flock(handle, waiting)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # whoever held it has removed the file: the lock of that name is another one now
        waiting = None


def _flock(handle: int, waiting: Callable[[], object] | None) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if waiting is not None:
            waiting()
        fcntl.flock(handle, fcntl.LOCK_EX)


def hash_bytes(*parts: bytes) -> str:
    """Hex digest (32 characters) of the parts, each length-prefixed so that borders matter."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """Hex digest of a plain value; key order does not matter."""
    return hash_bytes(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())


def hash_file(path: str | Path) -> str:
    """Hex digest of a file's content, read in blocks."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
