"""A disk that is full or may not be written to, in one sentence instead of a traceback."""

from __future__ import annotations

import errno
from pathlib import Path

from nano_think.errors import UserError
from nano_think.files import StagedFile

FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
CLOSED = {errno.EROFS: "the file system is read-only"}
CLOSED |= dict.fromkeys((errno.EACCES, errno.EPERM), "writing there is not permitted")
# What Hydra and the first record of a run take.
FIRST_BYTES = 1 << 16


def check_writable(root: Path) -> None:
    """Raise UserError where nothing can be written below `root`, before anything is."""
    try:
        StagedFile(root / "first", bytes(FIRST_BYTES)).discard()
    except OSError as error:
        trouble = disk_trouble(error, root)
        raise error if trouble is None else trouble from error


def disk_trouble(error: BaseException, root: Path) -> UserError | None:
    """What to say where an error, or one that it came from, is that of a disk; None for any other.

    root: of the runs. A file elsewhere that may not be opened is no matter of where to write.
    """
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, OSError) and (said := _said(cause, root)):
            return UserError(said)
        cause = cause.__cause__ or cause.__context__
    return None


def _said(error: OSError, root: Path) -> str | None:
    path = None if error.filename is None else Path(error.filename)
    place = path or root
    full = FULL.get(error.errno or 0)
    if error.errno is None and "requested and" in str(error):
        full = FULL[errno.ENOSPC]  # NumPy's own, which has no number
    if full:
        return (
            f"{place} cannot be written, {full}: free some space and give the same command, "
            "it goes on from the newest saved step"
        )
    closed = CLOSED.get(error.errno or 0)
    if closed and (path is None or path == root or root.resolve() in path.resolve().parents):
        return f"{place} cannot be written, {closed}: change that, or name another folder with run.root="
    return None
