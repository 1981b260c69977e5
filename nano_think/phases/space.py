"""Disk space of a run: what it will write at most at a time, looked at before it begins."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nano_think.phases.fit import Fit
    from nano_think.phases.run import Run
    from nano_think.tasks.base import FitTask

GB = 1e9
# Of every trained parameter AdamW keeps two moments; Muon keeps one.
MOMENTS = 2
# A newest state takes the place of the one before when it is complete, so there are two for a moment.
STATES = 2
# A finished model lies in its artefact and under its published name, whose copy is made beside the one before.
MODELS = 3
# Bytes on disk for each byte of text: documents sorted by cluster, records by split, and two bytes a token; there
# are at most as many tokens as bytes.
PER_TEXT_BYTE = 4.0


def fit_bytes(task: FitTask) -> int:
    """What a fit writes at most: newest states (network, best weights, moments), the model, and kept outputs."""
    network = sum(t.numel() * t.element_size() for t in task.network.state_dict().values())
    trained = sum(p.numel() * p.element_size() for p in task.network.parameters() if p.requires_grad)
    state = 2 * network + MOMENTS * trained
    cache = getattr(task, "cache", None)
    kept = cache.bytes if cache is not None and cache.folder is not None else 0
    return STATES * state + MODELS * network + kept


def check_fit(fit: Fit, task: FitTask, work: Path) -> None:
    """Answer with `guards.disk` where a fit does not fit onto the disk of `work`."""
    _check(fit.run, fit_bytes(task), f"{fit.label} writes checkpoints of", work)


def check_text(run: Run, source: Any, path: Path) -> None:
    """The same for a corpus and its tokens, where the source knows how much text it has."""
    text = getattr(source, "text_bytes", None)
    if text is not None:
        _check(run, int(PER_TEXT_BYTE * text), f"{text / GB:.3g} GB of text become", path)


def free_bytes(path: Path) -> int:
    """Free bytes of the disk that `path` lies on or will lie on."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def _check(run: Run, need: int, what: str, path: Path) -> None:
    free = free_bytes(path)
    if need > free:
        found = f"{what} up to {need / GB:.3g} GB, the disk of {path.parent} has {free / GB:.3g} GB free"
        run.guard("disk", f"{found}: free some space, or choose a folder on another disk with run.root=...")
