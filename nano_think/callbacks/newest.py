"""The state that an interrupted fit goes on from, written only where training can be taken up exactly."""

from __future__ import annotations

import io
import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from nano_think.files import StagedFile
from nano_think.ops.processes import summed


class StagedCheckpointIO(TorchCheckpointIO):
    """Leaves a saved state complete and synced in `staged`, for its owner to publish.

    Lightning's own writes to the system's folder for temporary files and moves from there: between file systems
    that is a copy, of which a kill leaves half, and what it leaves there nobody removes.
    """

    def __init__(self) -> None:
        self.staged: StagedFile | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the state beside `path`."""
        content = io.BytesIO()  # torch turns the error of a full disk into one of its own
        torch.save(checkpoint, content)
        self.staged = StagedFile(path, content.getbuffer())


class NewestState(Checkpoint):
    """Saves <dirpath>/newest.ckpt every N optimizer steps, after each validation, and on Ctrl+C.

    Only after a whole optimizer step whose validation, if one was due, is over: a state from the midst of a
    step would lose accumulated gradients, and one from before a due validation would never make up for it.
    So Ctrl+C lets the step in progress end, saves, and then raises KeyboardInterrupt; a second one does so
    at once and leaves the last state saved. Several processes save together, whichever of them was asked.

    Lightning logs a step after its last hook. The state becomes the newest only then: a fit that resumes finds
    what was logged up to there, and nothing is missing in its curves.
    """

    def __init__(self, dirpath: str | Path, every_n_train_steps: int = 200) -> None:
        super().__init__()
        self.path, self.every_n_train_steps = Path(dirpath) / "newest.ckpt", every_n_train_steps
        self._io = StagedCheckpointIO()
        self._saved_step = self._logged_before = 0
        self._saved = self._asked_to_stop = self._stopping = False
        self._handler: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take over how states are written, unless the strategy has a way of its own."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = self._io

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen for Ctrl+C, which only the main thread can."""
        self._saved_step, self._asked_to_stop = trainer.global_step, False
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._on_interrupt)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Publish the state of the step before, and stop there when asked to."""
        self._publish(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at the interval or when asked to stop, unless a validation comes first."""
        next_batch = trainer.fit_loop.total_batch_idx + 1
        validates = trainer.should_stop or next_batch % trainer.val_check_batch == 0
        if trainer.world_size > 1 and _step_is_whole(trainer):
            asked = torch.tensor(float(self._asked_to_stop), device=pl_module.device)
            self._asked_to_stop = bool(summed(asked) > 0)
        if not validates and _step_is_whole(trainer):
            due = trainer.global_step - self._saved_step >= self.every_n_train_steps
            if due or self._asked_to_stop or trainer.received_sigterm:
                self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after a validation of the fit."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and _step_is_whole(trainer):
            self._save(trainer)
            self._publish(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Publish a state that no batch came after."""
        self._publish(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hear Ctrl+C no longer."""
        self._release()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Hear Ctrl+C no longer; publish a state whose step has been logged meanwhile, forget it otherwise."""
        self._release()
        self._stopping = False
        if _steps_logged(trainer) > self._logged_before:
            self._publish(trainer)
        elif self._io.staged is not None:
            self._io.staged.discard()
            self._io.staged = None

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved_step, self._logged_before, self._saved = trainer.global_step, _steps_logged(trainer), True
        self._stopping = self._asked_to_stop

    def _publish(self, trainer: L.Trainer) -> None:
        """Make what was saved last the newest state; KeyboardInterrupt where it was saved for that."""
        if not self._saved:
            return
        self._saved = False
        if self._io.staged is not None:
            for logger in trainer.loggers:
                logger.save()
            self._io.staged.publish()
            self._io.staged = None
        if self._stopping:
            raise KeyboardInterrupt

    def _on_interrupt(self, signum: int, frame: Any) -> None:
        if self._asked_to_stop:
            raise KeyboardInterrupt
        self._asked_to_stop = True
        print("\nending this step, then saving; Ctrl+C again stops at once", flush=True)

    def _release(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None


def _steps_logged(trainer: L.Trainer) -> int:
    """Optimizer steps that are over, their logging included."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _step_is_whole(trainer: L.Trainer) -> bool:
    """Whether no gradient waits for the other micro-batches of its optimizer step."""
    return not trainer.fit_loop._should_accumulate()
