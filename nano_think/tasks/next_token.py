"""Next-token prediction: the objective of the Transformer and the state-space expert (phases 6a, 6c)."""

from __future__ import annotations

from torch import Tensor

from nano_think.tasks.base import Batch, FitTask


class NextTokenTask(FitTask):
    """Cross-entropy of an `ExpertLM` through the tied head."""

    def batch_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Summed cross-entropy in nats."""
        return {"loss": self._nll(batch).sum()}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect per-domain losses."""
        self.validate_tokens(self._nll(batch), batch)

    def _nll(self, batch: Batch) -> Tensor:
        return self.network.token_nll(batch["tokens"], batch["labels"], self.layout(batch))
