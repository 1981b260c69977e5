"""The share of each domain among the training rows that were really drawn."""

from __future__ import annotations

from collections import Counter
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from nano_think.ops.processes import summed


class DomainShares(L.Callback):
    """Logs `data/share/<domain>` over all rows since the start of the run."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self._new: list[Tensor] = []  # on their device: reading each would wait for its step
        self._domains: list[str] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count rows and log at the trainer's interval."""
        self._domains = pl_module.domains
        self._new.append(summed(one_hot(batch["domain"], len(self._domains)).sum(0)))
        if (trainer.fit_loop.total_batch_idx + 1) % trainer.log_every_n_steps == 0:
            self._take()
            total = sum(self.rows.values())
            pl_module.log_dict({f"data/share/{name}": self.rows[name] / total for name in pl_module.domains})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the last rows."""
        self._take()

    def _take(self) -> None:
        if self._new:
            counts = torch.stack(self._new).sum(0).tolist()
            self.rows.update(dict(zip(self._domains, counts, strict=True)))
            self._new = []

    def state_dict(self) -> dict[str, Any]:
        """Rows by domain."""
        self._take()
        return {"rows": dict(self.rows)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.rows = Counter(state_dict["rows"])
