"""A full disk or a folder that may not be written to: one sentence, nothing half-written, and on it goes."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from nano_think import files
from nano_think.errors import UserError
from nano_think.phases.disk import check_writable, disk_trouble

DATA = ("phase=data",)
FIT = (
    "phase=expert",
    "expert=transformer",
    "trainer.max_steps=4",
    "callbacks.checkpoint.every_n_train_steps=1",
)


class Filling:
    """os.fsync and os.replace of a disk that takes so many more calls, then none."""

    def __init__(self, monkeypatch, left):
        self.left, self.calls = left, 0
        for name in ("fsync", "replace", "rename"):
            monkeypatch.setattr(os, name, self._limited(getattr(os, name)))

    def _limited(self, function):
        def call(*arguments):
            self.calls += 1
            if self.calls > self.left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*arguments)

        return call


def contents(root: Path) -> dict[str, bytes]:
    """Every file of the artefacts but their provenance, which knows the time."""
    found = (path for path in (root / "artifacts").rglob("*") if path.is_file())
    return {str(p.relative_to(root)): p.read_bytes() for p in found if p.name != "provenance.json"}


def assert_nothing_half_made(root: Path) -> None:
    assert not list(root.rglob("*.tmp"))
    for artefact in root.glob("artifacts/[!.]*/*"):
        assert (artefact / "provenance.json").is_file(), artefact
    for manifest in root.rglob("manifest.json"):
        json.loads(manifest.read_text())


@pytest.fixture(scope="module")
def known():
    """By command: how often a run syncs or renames, and what it leaves."""
    return {}


def whole(project, command, known, monkeypatch):
    """Count, and keep, what a run does that has space enough."""
    if command not in known:
        with monkeypatch.context() as patch:
            disk = Filling(patch, 10**9)
            project.phase(*command)
            known[command] = disk.calls, contents(project.root)
    return known[command]


# The last writes of a fit's first run are of what it measured of the machine, which later ones find.
MEASURED = 12


@pytest.mark.parametrize(
    ("command", "first", "step"),
    [
        (DATA, 0.5, 0.45),
        (FIT, 0.8, 1.0),
        pytest.param(DATA, 0.0, 0.0, marks=pytest.mark.slow),
        pytest.param(FIT, 0.0, 0.03, marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_is_full_at_any_write(command, first, step, project, known, monkeypatch):
    """Full from the k-th write on: one sentence, nothing half-made; with space again the same result.

    k: from the share `first` of all writes on in steps of the share `step`, 0 = every one.
    """
    total, expected = whole(project, command, known, monkeypatch)
    for left in range(int(first * total), total - MEASURED, max(1, int(step * total))):
        shutil.rmtree(project.root, ignore_errors=True)
        with monkeypatch.context() as patch:
            Filling(patch, left)
            project.runs = 0
            with pytest.raises(
                UserError, match="the disk is full: free some space and give the same command"
            ):
                project.phase(*command)
        assert_nothing_half_made(project.root)
        project.runs = 0
        project.phase(*command)
        assert contents(project.root) == expected


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tmp_path, monkeypatch):
    def refuse(*_, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path / "outputs"))

    with monkeypatch.context() as patch:
        patch.setattr(files.Path, "mkdir", refuse)
        with pytest.raises(
            UserError, match=r"outputs.* cannot be written, the file system is read-only: .*run\.root="
        ):
            check_writable(tmp_path / "outputs")
    check_writable(tmp_path / "outputs")
    assert list((tmp_path / "outputs").iterdir()) == []


def test_only_what_a_disk_says_is_taken_for_its_trouble(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x"))
    wrapped = RuntimeError("writer failed")
    wrapped.__cause__ = full
    assert str(tmp_path / "x") in str(disk_trouble(wrapped, tmp_path))
    # a corpus of somebody else is no matter of where to write
    closed = PermissionError(errno.EACCES, "Permission denied", "/elsewhere/text.jsonl")
    assert disk_trouble(closed, tmp_path) is None
    closed.filename = str(tmp_path / "runs" / "x")
    assert "run.root=" in str(disk_trouble(closed, tmp_path))
    assert disk_trouble(FileNotFoundError(errno.ENOENT, "No such file", "x"), tmp_path) is None
    assert disk_trouble(ValueError("x"), tmp_path) is None


def test_numpy_says_it_without_a_number(tmp_path):
    """`ndarray.tofile`, which np.save uses, reports how much it has written and no errno."""
    with open("/dev/full", "wb") as full, pytest.raises(OSError) as caught:
        np.zeros(1 << 16).tofile(full)
    assert caught.value.errno is None
    assert "the disk is full" in str(disk_trouble(caught.value, tmp_path))
