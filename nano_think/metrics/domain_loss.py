"""Loss, perplexity and bits per byte, over all tokens and per domain.

Letters: B rows, L positions, V vocabulary, D domains. A row holds documents of one domain only, so the
sums need one domain index per row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torchmetrics import Metric


class DomainLoss(Metric):
    """Token-weighted cross-entropy per domain from exact sums.

    A text of n tokens and m bytes with total negative log-likelihood S nats has loss S / n (nats per
    token), perplexity exp(S / n) and bits per byte S / (m ln 2). Bits per byte do not depend on the
    tokenizer. Sums are float64 and reduce by addition, so any split of the batches over processes gives
    the values of one process.

    Args:
        domains: names, in the order of the batches' domain index.
        byte_lengths: (V,) bytes each token decodes to; 0 for special tokens.
    """

    full_state_update = False
    nll: Tensor
    tokens: Tensor
    bytes: Tensor
    byte_lengths: Tensor

    def __init__(self, domains: Sequence[str], byte_lengths: Tensor) -> None:
        super().__init__()
        if not domains:
            raise ValueError("DomainLoss needs at least one domain name.")
        self.domains = list(domains)
        self.register_buffer("byte_lengths", torch.as_tensor(byte_lengths).double(), persistent=False)
        for name in ("nll", "tokens", "bytes"):
            self.add_state(name, torch.zeros(len(self.domains), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, labels: Tensor, domain: Tensor) -> None:
        """Add a batch.

        Args:
            nll: (B, L) nats per token, 0 where the label is masked.
            labels: (B, L) next tokens; negative where masked.
            domain: (B,) domain index of each row.
        """
        if nll.shape != labels.shape or domain.shape != labels.shape[:1]:
            raise ValueError(
                f"nll {tuple(nll.shape)}, labels {tuple(labels.shape)} and domain {tuple(domain.shape)} "
                "must have shapes (B, L), (B, L) and (B,)."
            )
        valid = labels >= 0
        lengths = self.byte_lengths[labels.clamp(min=0)] * valid
        # A product with a one-hot matrix adds in a fixed order; scatter_add does not on a GPU.
        rows = one_hot(domain, len(self.domains)).double().T
        self.nll += rows @ nll.detach().double().sum(1)
        self.tokens += rows @ valid.double().sum(1)
        self.bytes += rows @ lengths.sum(1)

    def compute(self) -> dict[str, Tensor]:
        """All values by name.

        `loss`, `perplexity`, `bpb` weigh every token alike; `*_macro` weigh every domain alike;
        `loss/<domain>`, `perplexity/<domain>`, `bpb/<domain>` stand alone. A domain without tokens has
        no entry and no part in the macro mean; without any token the values are NaN.
        """
        seen = self.tokens > 0
        loss = self.nll / self.tokens
        bpb = _bits(self.nll, self.bytes)
        values = _triple("", self.nll.sum() / self.tokens.sum(), _bits(self.nll.sum(), self.bytes.sum()))
        values |= _triple("_macro", loss[seen].mean(), bpb[seen].mean())
        for index, name in enumerate(self.domains):
            if seen[index]:
                values |= _triple(f"/{name}", loss[index], bpb[index])
        return values


def _bits(nats: Tensor, num_bytes: Tensor) -> Tensor:
    return nats / (num_bytes * math.log(2))


def _triple(suffix: str, loss: Tensor, bpb: Tensor) -> dict[str, Tensor]:
    return {f"loss{suffix}": loss, f"perplexity{suffix}": loss.exp(), f"bpb{suffix}": bpb}
