"""How long it took from the command line to the first optimizer step."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L


class FirstStep(L.Callback):
    """Calls report(first_step={cpu_s, wall_s}) once, after the first optimizer step of a process.

    cpu_s: CPU seconds of the process so far. wall_s: since it was started; None where the system does not tell.
    """

    def __init__(self, report: Callable[..., object]) -> None:
        self.report: Callable[..., object] | None = report

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report where the first step is over."""
        if self.report is not None and trainer.global_step > 0:
            age = process_age()
            wall = None if age is None else round(age, 2)
            self.report(first_step={"cpu_s": round(time.process_time(), 2), "wall_s": wall})
            self.report = None


def process_age() -> float | None:
    """Seconds since this process was started."""
    with contextlib.suppress(OSError, ValueError):
        # the name of the program, in brackets, may hold spaces: the fields after it do not
        started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return uptime - int(started) / os.sysconf("SC_CLK_TCK")
    return None
