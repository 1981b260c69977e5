"""Updates that are far outside what the last ones were like can be left out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from nano_think.errors import UserError

# Of a normal distribution, the standard deviation in median absolute deviations.
TO_SIGMA = 1.4826
# A deviation counts as at least this share of the median: a loss that hardly varies has no spikes.
LEAST_SHARE = 0.01


class SpikeSkip(L.Callback):
    """Skips an update whose loss or gradient norm is more than `deviations` robust deviations above its window.

    deviations: in units of 1.4826 x median absolute deviation, from the median; None: nothing is skipped.
    window: steps that are looked back on. at_least: steps before anything is skipped.

    A skipped step counts as a step of the schedule, changes neither weights nor moments, and is part of the window
    as any other: where the loss has risen for good, it is the window that gives in, after half of its length. Logs
    `train/skipped_updates`, the number so far. Window and number are part of the state of a fit that resumes.
    """

    def __init__(self, deviations: float | None = None, window: int = 200, at_least: int = 50) -> None:
        if deviations is not None and deviations <= 0:
            raise ValueError(f"deviations must be above 0, it is {deviations}")
        if not 2 <= at_least <= window:
            raise ValueError(f"at_least must lie between 2 and window={window}, it is {at_least}")
        self.deviations, self.at_least = deviations, at_least
        self.losses: deque[float] = deque(maxlen=window)
        self.norms: deque[float] = deque(maxlen=window)
        self.skipped = 0
        self._loss: Tensor | float = 0.0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a precision that skips steps by itself."""
        if self.deviations is not None and trainer.precision == "16-mixed":
            raise UserError(
                "the loss scale of precision=16-mixed skips steps by itself: use bf16-mixed to skip spikes"
            )

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Add the loss of a micro-batch."""
        if self.deviations is not None:
            self._loss = self._loss + loss.detach()

    def on_clipped_gradients(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        optimizer: torch.optim.Optimizer,
        norm: Callable[[], Tensor],
    ) -> None:
        """Compare the step with the window, take its gradients away where it is a spike, enter it."""
        if self.deviations is None:
            return
        # every process decides alike: the norm is that of all of them already
        loss = float(trainer.strategy.reduce(torch.as_tensor(self._loss), reduce_op="mean"))
        size, self._loss = float(norm()), 0.0
        if self._is_spike(self.losses, loss) or self._is_spike(self.norms, size):
            self.skipped += 1
            optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss)
        self.norms.append(size)
        pl_module.log("train/skipped_updates", float(self.skipped))

    def _is_spike(self, values: Sequence[float], value: float) -> bool:
        if len(values) < self.at_least or self.deviations is None:
            return False
        known = torch.tensor(list(values), dtype=torch.float64)
        middle = known.quantile(0.5)
        deviation = torch.maximum(TO_SIGMA * (known - middle).abs().quantile(0.5), LEAST_SHARE * middle.abs())
        return not value <= float(middle + self.deviations * deviation)

    def state_dict(self) -> dict[str, Any]:
        """The window and the number of skipped updates."""
        return {"losses": list(self.losses), "norms": list(self.norms), "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.losses.clear()
        self.losses.extend(state_dict["losses"])
        self.norms.clear()
        self.norms.extend(state_dict["norms"])
        self.skipped = state_dict["skipped"]
