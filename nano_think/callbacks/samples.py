"""Sample texts at every validation: the quickest way to see whether a model learns."""

from __future__ import annotations

import lightning as L
import torch

from nano_think.callbacks.text import log_text
from nano_think.engine.generate import generate
from nano_think.engine.sampling import SamplingConfig
from nano_think.tokenizer import Tokenizer

PROMPT_TOKENS = 16


class SampleTexts(L.Callback):
    """Logs one continuation a domain, each from the first tokens of a validation document.

    tokenizer: of the data. max_new_tokens: length of a continuation. seed: of the sampling, the same at every
    validation, so that consecutive panels differ by the model alone.
    """

    def __init__(
        self, tokenizer: Tokenizer, max_new_tokens: int = 40, temperature: float = 0.8, seed: int = 0
    ) -> None:
        self.tokenizer, self.max_new_tokens = tokenizer, max_new_tokens
        self.config = SamplingConfig(temperature=temperature, top_k=50, seed=seed)
        self.prompts: dict[str, list[int]] = {}

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs,
        batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first prompt of each domain."""
        for row, domain in enumerate(batch["domain"].tolist()):
            name = pl_module.domains[domain]
            if name not in self.prompts:
                first = batch["segments"][row] == 0
                self.prompts[name] = batch["tokens"][row][first][:PROMPT_TOKENS].tolist()

    @torch.no_grad()
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Continue each prompt and log it as text."""
        if trainer.sanity_checking:
            return
        network = pl_module.whole_network()
        if not trainer.is_global_zero:
            return
        was_training = network.training
        network.eval()
        for name, prompt in self.prompts.items():
            made = generate(
                network,
                [prompt],
                self.max_new_tokens,
                self.config,
                eos_id=self.tokenizer.eos_id,
                banned_ids=(self.tokenizer.bos_id, self.tokenizer.pad_id),
                logprobs=False,
            )
            text = f"{self.tokenizer.decode(prompt)} ⟶ {self.tokenizer.decode(made.tokens[0])}"
            log_text(trainer, f"samples/{name}", text)
        network.train(was_training)
