"""A progress bar of optimizer steps with loss, rate and time left, and one lasting line a validation."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Seconds from one reading of the figures to the next.
BETWEEN_FIGURES = 0.5


class StepProgress(L.Callback):
    """Draws on `console`; label: what is being trained."""

    def __init__(self, console: Console, label: str) -> None:
        self.console, self.label = console, label
        self.progress: Progress | None = None
        self._next_figures = 0.0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar at the step a resumed fit goes on from."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(
            *columns, console=self.console, transient=True, disable=not self.console.is_terminal
        )
        self.progress.start()
        self.task = self.progress.add_task(self.label, total=trainer.max_steps, figures="")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar, and now and then its figures: reading them waits for the step of a GPU."""
        if self.progress is None or self.progress.disable:
            return
        self.progress.update(self.task, completed=trainer.global_step)
        if time.monotonic() >= self._next_figures:
            self.progress.update(self.task, figures=self._figures(trainer))
            self._next_figures = time.monotonic() + BETWEEN_FIGURES

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """One lasting line a validation."""
        if not trainer.sanity_checking:
            self.console.print(
                f"  {self.label} step {trainer.global_step}: {self._figures(trainer)}", highlight=False
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Close the bar, so that the message that follows is not drawn over."""
        self._close()

    def _close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    @staticmethod
    def _figures(trainer: L.Trainer) -> str:
        names = {
            "train/loss": "train",
            "val/loss": "val",
            "val/perplexity": "ppl",
            "train/tokens_per_second": "tok/s",
        }
        values = trainer.callback_metrics
        return "  ".join(
            f"{short} {float(values[name]):,.{0 if short == 'tok/s' else 3}f}"
            for name, short in names.items()
            if name in values
        )
