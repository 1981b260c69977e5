"""Tokens per second of training, without the time that validation takes."""

from __future__ import annotations

import time
from typing import Any

import lightning as L


class Throughput(L.Callback):
    """Logs `train/tokens_per_second` over the steps since the last log, and `train/tokens` in all."""

    def __init__(self) -> None:
        self.tokens = 0
        self._since: float | None = None
        self._new = 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock, again after a validation."""
        if self._since is None:
            self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count tokens and log at the trainer's interval."""
        count = int((batch["segments"] >= 0).sum())
        self.tokens += count
        self._new += count
        if (
            self._since is not None
            and (trainer.fit_loop.total_batch_idx + 1) % trainer.log_every_n_steps == 0
        ):
            rate = self._new / max(time.perf_counter() - self._since, 1e-9)
            pl_module.log("train/tokens_per_second", rate, prog_bar=True)
            pl_module.log("train/tokens", float(self.tokens))
            self._since, self._new = None, 0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validation is no training time."""
        self._since, self._new = None, 0

    def state_dict(self) -> dict[str, Any]:
        """Tokens seen so far."""
        return {"tokens": self.tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.tokens = state_dict["tokens"]
