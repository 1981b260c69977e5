"""The share of each domain among the training rows that were really drawn."""

from __future__ import annotations

from collections import Counter
from typing import Any

import lightning as L
import torch

from nano_think.ops.processes import summed


class DomainShares(L.Callback):
    """Logs `data/share/<domain>` over all rows since the start of the run."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count rows and log at the trainer's interval."""
        counts = summed(torch.bincount(batch["domain"], minlength=len(pl_module.domains)))
        self.rows.update(dict(zip(pl_module.domains, counts.tolist(), strict=True)))
        if (trainer.fit_loop.total_batch_idx + 1) % trainer.log_every_n_steps == 0:
            total = sum(self.rows.values())
            pl_module.log_dict({f"data/share/{name}": self.rows[name] / total for name in pl_module.domains})

    def state_dict(self) -> dict[str, Any]:
        """Rows by domain."""
        return {"rows": dict(self.rows)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.rows = Counter(state_dict["rows"])
