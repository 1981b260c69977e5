"""Squared error of a denoiser by noise level, beside the error of knowing only the mean.

Letters: B rows, L positions, d features, K buckets of the noise level tau in 1..train_T.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torchmetrics import Metric


class DenoisingError(Metric):
    """Mean squared error per feature, overall and per noise bucket, from float64 sums.

    `relative` divides by the error that the constant prediction "mean of all targets seen" makes on the
    same tokens: 1 is no better than the mean, 0 is perfect. Buckets split 1..train_T evenly.

    Args:
        num_buckets: number of noise buckets.
        train_T: number of noise levels of the schedule.
        d_model: features of prediction and target.
    """

    full_state_update = False
    error: Tensor
    tokens: Tensor
    target: Tensor
    target_square: Tensor

    def __init__(self, num_buckets: int, train_T: int, d_model: int) -> None:
        super().__init__()
        if not 1 <= num_buckets <= train_T:
            raise ValueError(f"num_buckets={num_buckets} must lie between 1 and train_T={train_T}.")
        self.num_buckets, self.train_T, self.d_model = num_buckets, train_T, d_model
        for name in ("error", "tokens", "target_square"):
            self.add_state(name, torch.zeros(num_buckets, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("target", torch.zeros(num_buckets, d_model, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor, tau: Tensor, valid: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            prediction: (B, L, d).
            target: (B, L, d), in the same parametrisation.
            tau: noise level in 1..train_T, (B,) for a whole row or (B, L); 0 counts as 1.
            valid: (B, L) bool, the tokens to count; None for all.
        """
        if prediction.shape != target.shape or target.shape[-1] != self.d_model:
            raise ValueError(
                f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} must both have "
                f"shape (B, L, {self.d_model})."
            )
        shape = target.shape[:2]
        levels = (tau if tau.ndim == 2 else tau.unsqueeze(-1)).expand(shape)
        keep = torch.ones(shape, dtype=torch.bool, device=target.device) if valid is None else valid.bool()
        # where, not a product: padding may hold NaN, and 0 * NaN is NaN.
        x = torch.where(keep.unsqueeze(-1), target.detach().double(), 0.0)
        error = torch.where(keep.unsqueeze(-1), prediction.detach().double() - x, 0.0)
        bucket = (levels.clamp(min=1).long() - 1) * self.num_buckets // self.train_T
        member = one_hot(bucket, self.num_buckets).double().flatten(0, 1).T
        self.error += member @ error.square().sum(-1).flatten()
        self.tokens += member @ keep.double().flatten()
        self.target += member @ x.flatten(0, 1)
        self.target_square += member @ x.square().sum(-1).flatten()

    def compute(self) -> dict[str, Tensor]:
        """`mse`, `mse_relative`, and `mse_bucket/<k>`, `mse_relative_bucket/<k>` for buckets with tokens.

        Bucket 0 has the least noise. Empty when no token was counted.
        """
        total = self.tokens.sum()
        if total == 0:
            return {}
        mean = self.target.sum(0) / total
        # sum |x - mean|^2 over the tokens of a bucket, expanded so that only sums are needed
        baseline = self.target_square - 2 * self.target @ mean + self.tokens * mean.square().sum()
        values = {
            "mse": self.error.sum() / (total * self.d_model),
            "mse_relative": self.error.sum() / baseline.sum(),
        }
        for k in range(self.num_buckets):
            if self.tokens[k] > 0:
                values[f"mse_bucket/{k}"] = self.error[k] / (self.tokens[k] * self.d_model)
                values[f"mse_relative_bucket/{k}"] = self.error[k] / baseline[k]
        return values

    def bucket_levels(self) -> list[tuple[int, int]]:
        """First and last noise level of each bucket."""
        starts = [-(-k * self.train_T // self.num_buckets) + 1 for k in range(self.num_buckets)]
        return list(zip(starts, [start - 1 for start in starts[1:]] + [self.train_T], strict=True))
