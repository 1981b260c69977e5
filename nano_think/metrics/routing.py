"""How the router shares its weight over experts, domains and positions.

Letters: B rows, L positions, N experts, D domains, P position bins. Entropies and mutual information are
in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torchmetrics import Metric

from nano_think.metrics.information import entropy, mutual_information


class RoutingStats(Metric):
    """Statistics of router weights over valid tokens, from float64 sums (minimum and maximum aside).

    Position bins double in width: 0, 1, 2-3, 4-7, ...; the last one also takes every later position.

    Args:
        experts: names, in the order of the weights' last axis.
        domains: names, in the order of the batches' domain index.
        max_positions: longest context; sets the number of position bins.
    """

    full_state_update = False
    weight: Tensor
    square: Tensor
    token_entropy: Tensor
    tokens: Tensor
    chosen: Tensor
    lowest: Tensor
    highest: Tensor
    bin_weight: Tensor
    bin_tokens: Tensor
    bin_starts: Tensor

    def __init__(self, experts: Sequence[str], domains: Sequence[str], max_positions: int = 1024) -> None:
        super().__init__()
        if not experts or not domains or max_positions < 1:
            raise ValueError("RoutingStats needs at least one expert, one domain and max_positions >= 1.")
        self.experts, self.domains, self.max_positions = list(experts), list(domains), max_positions
        starts = [0, *(2**power for power in range(math.ceil(math.log2(max_positions))))]
        self.register_buffer("bin_starts", torch.tensor(starts), persistent=False)
        n, d, p = len(self.experts), len(self.domains), len(starts)
        for name, shape in {
            "weight": (d, n),
            "tokens": (d,),
            "square": (n,),
            "chosen": (n,),
            "token_entropy": (),
            "bin_weight": (p, n),
            "bin_tokens": (p,),
        }.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("lowest", torch.full((n,), math.inf, dtype=torch.float64), dist_reduce_fx="min")
        self.add_state("highest", torch.full((n,), -math.inf, dtype=torch.float64), dist_reduce_fx="max")

    def update(self, weights: Tensor, domain: Tensor, positions: Tensor, valid: Tensor) -> None:
        """Add a batch.

        Args:
            weights: (B, L, N) router weights, summing to 1 over N.
            domain: (B,) domain index of each row.
            positions: (B, L) document-relative positions.
            valid: (B, L) bool, the tokens to count (no padding).
        """
        n = len(self.experts)
        if weights.shape != (*valid.shape, n) or positions.shape != valid.shape:
            raise ValueError(
                f"weights {tuple(weights.shape)}, positions {tuple(positions.shape)} and valid "
                f"{tuple(valid.shape)} must have shapes (B, L, {n}), (B, L) and (B, L)."
            )
        keep = valid.bool().unsqueeze(-1)
        # where, not a product: padding may hold NaN, and 0 * NaN is NaN.
        w = torch.where(keep, weights.detach().double(), 0.0)
        count = keep.squeeze(-1).double()
        rows = one_hot(domain, len(self.domains)).double().T
        self.weight += rows @ w.sum(1)
        self.tokens += rows @ count.sum(1)
        self.square += w.square().sum((0, 1))
        self.token_entropy += entropy(w).sum()
        self.chosen += (one_hot(w.argmax(-1), n) * keep).sum((0, 1))
        self.lowest = torch.minimum(self.lowest, torch.where(keep, w, math.inf).amin((0, 1)))
        self.highest = torch.maximum(self.highest, torch.where(keep, w, -math.inf).amax((0, 1)))
        bins = torch.bucketize(positions.clamp(min=0), self.bin_starts, right=True) - 1
        member = one_hot(bins, len(self.bin_starts)).double().flatten(0, 1).T
        self.bin_weight += member @ w.flatten(0, 1)
        self.bin_tokens += member @ count.flatten()

    def compute(self) -> dict[str, Tensor]:
        """All values by tag, prefix `routing/`; empty when no token was counted.

        Per expert mean, std (population), min, max and argmax_share (ties go to the first expert);
        `entropy_token` = mean H(w), `entropy_mean` = H(mean w), `effective_experts_*` their exponentials,
        `mi_token` = entropy_mean - entropy_token = I(token; expert), `mi_domain` = I(domain; expert), and
        `domain/<domain>/<expert>` the mean weight inside each domain that has tokens.
        """
        total = self.tokens.sum()
        if total == 0:
            return {}
        mean = self.weight.sum(0) / total
        std = (self.square / total - mean.square()).clamp(min=0).sqrt()
        columns = {
            "mean": mean,
            "std": std,
            "min": self.lowest,
            "max": self.highest,
            "argmax_share": self.chosen / total,
        }
        values = {
            f"routing/{expert}/{name}": column[index]
            for index, expert in enumerate(self.experts)
            for name, column in columns.items()
        }
        per_token, of_mean = self.token_entropy / total, entropy(mean)
        values |= {
            "routing/entropy_token": per_token,
            "routing/entropy_mean": of_mean,
            "routing/effective_experts_token": per_token.exp(),
            "routing/effective_experts_mean": of_mean.exp(),
            "routing/mi_token": of_mean - per_token,
            "routing/mi_domain": mutual_information(self.weight, self.tokens),
        }
        table = self._domain_means()
        for row, domain in enumerate(self.domains):
            if self.tokens[row] > 0:
                for column, expert in enumerate(self.experts):
                    values[f"routing/domain/{domain}/{expert}"] = table[row, column]
        return values

    def domain_table(self) -> Tensor:
        """(D, N) mean weight per domain over all processes; NaN rows for domains without tokens."""
        with self.sync_context(should_sync=self._to_sync):
            return self._domain_means()

    def position_curve(self) -> Tensor:
        """(P, N) mean weight per position bin over all processes; NaN rows for empty bins."""
        with self.sync_context(should_sync=self._to_sync):
            return self.bin_weight / self.bin_tokens.unsqueeze(-1)

    def position_bins(self) -> list[tuple[int, int]]:
        """First and last position of each bin of `position_curve` (the last bin is open upwards)."""
        starts = self.bin_starts.tolist()
        return list(zip(starts, [start - 1 for start in starts[1:]] + [self.max_positions - 1], strict=True))

    def _domain_means(self) -> Tensor:
        return self.weight / self.tokens.unsqueeze(-1)
