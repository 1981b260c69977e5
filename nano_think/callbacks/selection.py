"""Keep the weights of the best validation, and stop when validation no longer improves."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from nano_think.ops.processes import load_whole, whole_state


class ValidationSelection(L.Callback):
    """Watches `val/loss`; the best weights, those of step 0 included, are put back at the end of the fit.

    patience: validations without an improvement of at least min_delta until the fit stops. They count from the
    end of the warm-up, because a loss that rises while the learning rate does says nothing.
    warmup_steps: optimizer steps of the warm-up.
    """

    def __init__(self, patience: int, warmup_steps: int = 0, min_delta: float = 1e-4) -> None:
        self.patience, self.warmup_steps, self.min_delta = patience, warmup_steps, min_delta
        self.best, self.best_step = float("inf"), -1
        self.waited = 0
        self.weights: dict[str, torch.Tensor] = {}
        self.history: list[tuple[int, float]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask for a validation of the last weights: a fit that was told to stop validates before it does."""
        if trainer.global_step >= trainer.max_steps > 0:
            trainer.should_stop = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare the newest validation with the best."""
        if trainer.sanity_checking:
            return
        value, step = float(trainer.callback_metrics["val/loss"]), trainer.global_step
        if self.history and self.history[-1][0] == step:
            return
        self.history.append((step, value))
        if value < self.best - self.min_delta:
            self.waited = 0
        elif step > self.warmup_steps:
            self.waited += 1
        if value < self.best:
            self.best, self.best_step = value, step
            self.weights = whole_state(pl_module.network)
        if self.waited >= self.patience:
            trainer.should_stop = True

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the network with the selected weights."""
        if self.weights:
            load_whole(pl_module.network, self.weights)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed fit needs to select as if it had never stopped."""
        keys = ("best", "best_step", "waited", "weights", "history")
        return {key: getattr(self, key) for key in keys}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        for key, value in state_dict.items():
            setattr(self, key, value)
