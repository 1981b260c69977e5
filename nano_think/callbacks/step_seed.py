"""Random numbers of training as a function of the seed and the number of the batch."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from nano_think.ops.seeding import mixed_seed


class StepSeed(L.Callback):
    """Seeds torch's global generator before every training batch, so that a resumed fit draws what it would have.

    A checkpoint does not hold the generator's state; without this, dropout after a resumption would differ.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed by (seed, batches done so far, rank)."""
        done = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        torch.manual_seed(mixed_seed(self.seed, done, trainer.global_rank))
