"""What the diffuser restores: nearest tokens of its output at several noise levels (phase 6b)."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from nano_think.callbacks.text import log_text
from nano_think.tokenizer import Tokenizer

SHARES_OF_T = (0.25, 0.5, 0.75, 1.0)
NUM_TOKENS = 32


class Reconstructions(L.Callback):
    """Logs the tokens that read-outs of clean, noised and restored targets point at, side by side.

    Not of a network that is divided among processes: its whole twin need not lie where the batch does.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int = 0) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self.batch: dict[str, torch.Tensor] | None = None

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first row of the first batch."""
        if self.batch is None:
            self.batch = {name: value[:1] for name, value in batch.items()}

    @torch.no_grad()
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the kept row from each noise level and log the nearest tokens."""
        if trainer.sanity_checking or self.batch is None or not trainer.is_global_zero or pl_module.built:
            return
        network, expert = pl_module.network, pl_module.network.expert
        target, _ = pl_module.targets(self.batch)
        x0 = expert.standardise(target)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(self.seed)).to(x0.device)
        context, layout = network.embedding(self.batch["tokens"]), pl_module.layout(self.batch)
        lines = [f"{'text':>12}: {self.tokenizer.decode(self.batch['tokens'][0, :NUM_TOKENS].tolist())!r}"]
        lines.append(f"{'target':>12}: {self._nearest(network, expert.readout(x0))}")
        for share in SHARES_OF_T:
            tau = round(share * expert.schedule.train_T)
            x_tau = expert.schedule.add_noise(x0, noise, tau)
            restored = expert.denoise(x_tau, tau, context, layout)
            lines.append(f"{f'noised {tau}':>12}: {self._nearest(network, expert.readout(x_tau))}")
            lines.append(f"{f'restored {tau}':>12}: {self._nearest(network, expert.readout(restored))}")
        log_text(trainer, "reconstructions", "\n".join(lines))

    def _nearest(self, network: torch.nn.Module, vectors: torch.Tensor) -> str:
        ids = (vectors[0, :NUM_TOKENS] @ network.embedding.weight.T).argmax(-1)
        return repr(self.tokenizer.decode(ids.tolist()))
