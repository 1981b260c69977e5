"""The logs of a fit that goes on: one line on one step axis, each step once.

A fit resumes from a state that is older than the last line of its logs. Steps that are computed again are logged
again: TensorBoard is told from which step on earlier events are void (`purge_step`), and texts are cut there.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, instantiate
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from nano_think.callbacks.text import forget_texts
from nano_think.files import atomic_write

# In the work folder of a fit: where it logged last.
PLACE = "logs.txt"


def resumed_step(newest: str | None) -> int:
    """Optimizer steps done in a saved state, a file or of several processes a folder; 0 without one."""
    if newest is None:
        return 0
    path = Path(newest, "meta.pt") if Path(newest).is_dir() else Path(newest)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]


def logger_at(node: Any, folder: Path, step: int) -> Logger:
    """The logger of a config node, which writes into `folder` what a fit does from `step` on."""
    purge = {"purge_step": step} if issubclass(get_class(node["_target_"]), TensorBoardLogger) else {}
    return instantiate(node, save_dir=str(folder), **purge)


def continue_logs(folder: Path, work: Path, step: int) -> None:
    """Leave in `folder` what was logged up to `step`, be it there already or in the folder of another run.

    work: of the fit, which remembers the place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = Path((work / PLACE).read_text()) if (work / PLACE).is_file() else folder
    if step > 0 and before.is_dir() and before != folder.resolve():
        shutil.copytree(before, folder, dirs_exist_ok=True)
    atomic_write(work / PLACE, str(folder.resolve()))
    forget_texts(folder, step if step > 0 else -1)
