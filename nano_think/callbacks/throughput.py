"""Tokens and FLOPs per second of training, without the time that validation takes."""

from __future__ import annotations

import logging
import time
from typing import Any

import lightning as L
from torch import Tensor

from nano_think.ops.processes import summed

log = logging.getLogger(__name__)


class Throughput(L.Callback):
    """Logs `train/tokens_per_second` over the steps since the last log, and `train/tokens` in all.

    flops_per_token: of a training step without what it computes again. With it comes `train/flops_per_second`.
    peak_flops: FLOP/s of large matrix products on this machine. With both comes `train/mfu`, the share of the peak
        that the model uses; above 1 it cannot be, and an error says so once.
    """

    def __init__(self, flops_per_token: float | None = None, peak_flops: float | None = None) -> None:
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.tokens = 0
        self._unread: Tensor | int = 0  # on its device: reading it each step would wait for the step
        self._since: float | None = None
        self._new = 0
        self._complained = False

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
        self._unread = self._unread + summed((batch["segments"] >= 0).sum())
        if (
            self._since is not None
            and (trainer.fit_loop.total_batch_idx + 1) % trainer.log_every_n_steps == 0
        ):
            self._read()
            rate = self._new / max(time.perf_counter() - self._since, 1e-9)
            pl_module.log("train/tokens_per_second", rate, prog_bar=True)
            pl_module.log("train/tokens", float(self.tokens))
            for name, value in self._of_flops(rate).items():
                pl_module.log(name, value)
            self._since, self._new = None, 0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validation is no training time."""
        self._read()
        self._since, self._new = None, 0

    def state_dict(self) -> dict[str, Any]:
        """Tokens seen so far."""
        self._read()
        return {"tokens": self.tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.tokens = state_dict["tokens"]

    def _read(self) -> None:
        """Take what was counted since; all of it has been computed then, and the clock may be read."""
        count, self._unread = int(self._unread), 0
        self.tokens += count
        self._new += count

    def _of_flops(self, rate: float) -> dict[str, float]:
        """What can be said of FLOPs at so many tokens a second."""
        if self.flops_per_token is None:
            return {}
        achieved = {"train/flops_per_second": rate * self.flops_per_token}
        if self.peak_flops is None:
            return achieved
        mfu = achieved["train/flops_per_second"] / self.peak_flops
        if mfu > 1 and not self._complained:
            self._complained = True
            log.error(
                "MFU = flops_per_token x tokens/s / peak = %.3g x %.3g / %.3g = %.3g is above 1: either a module "
                "states more products than it computes (nano_think.nn.flops), or the peak was measured while the "
                "machine was busy (nano_think.phases.cost.gemm_peak)",
                self.flops_per_token,
                rate,
                self.peak_flops,
                mfu,
            )
        return {**achieved, "train/mfu": mfu}
