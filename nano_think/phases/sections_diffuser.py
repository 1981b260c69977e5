"""The report's section on the diffuser: how well it restores latents, and what its sampling steps are worth."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from nano_think.evals.denoiser import NUM_BUCKETS, denoising_errors
from nano_think.evals.losses import evaluate_models
from nano_think.evals.plots import denoising_steps, error_by_noise
from nano_think.ops.cross_entropy import linear_cross_entropy
from nano_think.ops.layout import Layout
from nano_think.tasks.denoise import denoising_targets

if TYPE_CHECKING:
    from nano_think.phases.evaluate import Evaluation

DDIM_STEPS = (1, 2, 4, 10)
PROBE_ROWS = 8


@torch.no_grad()
def diffuser(evaluation: Evaluation) -> None:
    """Cross-entropy against DDIM steps, and x0 error by noise level, on validation text."""
    checkpoint = evaluation.alone.get("diffuser")
    teacher = evaluation.load("transformer")
    if checkpoint is None or teacher is None:
        return
    network, expert = checkpoint.model, checkpoint.model.expert
    batches = evaluation.batches("validation", rows=PROBE_ROWS)

    def sampled(steps: int) -> Any:
        def nll(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            layout = Layout(batch["positions"], batch["segments"])
            hidden = expert(network.embedding(batch["tokens"]), layout, steps=steps)
            return linear_cross_entropy(hidden, network.embedding.weight, batch["labels"])

        return nll

    losses = evaluate_models(
        {str(k): sampled(k) for k in DDIM_STEPS},
        batches,
        evaluation.tokenizer.byte_lengths,
        len(evaluation.domains),
    )
    curve = {int(k): value.loss() for k, value in losses.items()}
    error, pure = denoising_errors(network, partial(denoising_targets, network, teacher.model), batches)
    values = {name: float(value) for name, value in error.compute().items()}
    buckets = [values.get(f"mse_relative_bucket/{k}", float("nan")) for k in range(NUM_BUCKETS)]
    at_noise = float(pure.compute()["mse_relative"])
    report = evaluation.report.heading("Diffuser")
    report.text(
        f"x0 error relative to predicting the mean: {at_noise:.3f} at pure noise, {buckets[0]:.3f} at the least "
        "noise (validation). Read-out loss by DDIM steps: "
        + ", ".join(f"K={k} {value:.3f}" for k, value in curve.items())
        + "."
    )
    report.json({"diffuser": {"ce_by_steps": curve, "mse_relative_pure_noise": at_noise, "buckets": buckets}})
    figures = evaluation.figures
    report.figure(
        error_by_noise(figures / "noise.png", {"diffuser": buckets}, error.bucket_levels()), "x0 error"
    )
    report.figure(denoising_steps(figures / "steps.png", {"diffuser": curve}), "Loss by DDIM steps")
