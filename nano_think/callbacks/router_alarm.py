"""A router that has settled on one expert, and experts it no longer uses, are said while there is time."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from nano_think.metrics.information import entropy

SPREAD = "training.mla.entropy_mean=0.01 spreads the weight"


class RouterAlarm(L.Callback):
    """Watches the mean weight of each expert over the last `window` training batches.

    say: takes a warning, once for a collapse and once for each dead expert. window: batches. min_entropy: share of
    ln(experts) below which the entropy of the mean weights is a collapse. min_share: mean weight below which an
    expert is dead.

    At the trainer's interval it logs `routing/train/<expert>`, `routing/train/entropy_mean`, and once the window
    is full `routing/alarm/collapse` (0 or 1) and `routing/alarm/dead` (number of experts). Silent for a task
    without a router, and with a single expert.
    """

    def __init__(
        self,
        say: Callable[[str], object],
        window: int = 200,
        min_entropy: float = 0.1,
        min_share: float = 0.005,
    ) -> None:
        self.say, self.min_entropy, self.min_share = say, min_entropy, min_share
        self.weights: deque[list[float]] = deque(maxlen=window)
        self.said: list[str] = []
        self._new: list[Tensor] = []  # on their device: reading each would wait for its step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch's mean weights; look at them at the trainer's interval."""
        weights = getattr(pl_module, "mean_weights", None)
        if weights is None or len(weights) < 2:
            return
        self._new.append(weights)
        if (trainer.fit_loop.total_batch_idx + 1) % trainer.log_every_n_steps == 0:
            self._take()
            pl_module.log_dict(self._looked_at(list(pl_module.network.experts)))

    def _take(self) -> None:
        if self._new:
            self.weights.extend(torch.stack(self._new).double().cpu().tolist())
            self._new = []

    def _looked_at(self, experts: Sequence[str]) -> dict[str, float]:
        mean = torch.tensor(list(self.weights), dtype=torch.float64).mean(0)
        spread = float(entropy(mean))
        values = {f"routing/train/{name}": float(share) for name, share in zip(experts, mean, strict=True)}
        values["routing/train/entropy_mean"] = spread
        if len(self.weights) < (self.weights.maxlen or 0):
            return values
        collapsed = spread < self.min_entropy * math.log(len(experts))
        dead = [name for name, share in zip(experts, mean, strict=True) if share < self.min_share]
        if collapsed:
            best = experts[int(mean.argmax())]
            self._warn(
                "collapse",
                f"the router has collapsed: {best} has {float(mean.max()):.1%} of the weight",
                SPREAD,
            )
        for name in dead:
            share = values[f"routing/train/{name}"]
            without = "a mixture without it (expert.names) costs less"
            self._warn(name, f"expert {name} is dead: {share:.2%} of the weight", f"{SPREAD}, {without}")
        return values | {"routing/alarm/collapse": float(collapsed), "routing/alarm/dead": float(len(dead))}

    def _warn(self, what: str, found: str, change: str) -> None:
        if what not in self.said:
            self.said.append(what)
            self.say(
                f"[yellow]warning: {found} over the last {self.weights.maxlen} batches: {change}[/yellow]"
            )

    def state_dict(self) -> dict[str, Any]:
        """The window, and what has been said."""
        self._take()
        return {"weights": list(self.weights), "said": list(self.said)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.weights.clear()
        self.weights.extend(state_dict["weights"])
        self.said = list(state_dict["said"])
