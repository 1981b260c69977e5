"""One TensorBoard layout, so that the custom-scalars page is readable at once."""

from __future__ import annotations

import re
from collections.abc import Sequence

import lightning as L


class Dashboard(L.Callback):
    """Writes the custom-scalar layout: losses, domains, routing, denoising, throughput on a page each."""

    def __init__(self, experts: Sequence[str] = ()) -> None:
        self.experts = list(experts)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the layout to each TensorBoard logger."""
        layout = layout_for(pl_module.domains, self.experts, denoising=hasattr(pl_module, "val_error"))
        for logger in trainer.loggers:
            add = getattr(logger.experiment, "add_custom_scalars", None)
            if add is not None:
                add(layout)


def layout_for(
    domains: Sequence[str], experts: Sequence[str] = (), denoising: bool = False
) -> dict[str, dict[str, list]]:
    """Category -> chart -> ["Multiline", patterns], the form of `SummaryWriter.add_custom_scalars`.

    The page draws every tag that starts with a match of a pattern, hence the exact ends.
    """

    def chart(*tags: str) -> list:
        return ["Multiline", [f"{re.escape(tag)}$" for tag in tags]]

    def family(prefix: str, suffix: str = "") -> list:
        return ["Multiline", [f"{re.escape(prefix)}.*{re.escape(suffix)}$"]]

    layout = {
        "loss": {
            "train and validation": chart("train/loss", "val/loss"),
            "perplexity": chart("val/perplexity"),
            "learning rate": family("lr"),
        },
        "domains": {
            "loss": chart(*(f"val/loss/{name}" for name in domains)),
            "perplexity": chart(*(f"val/perplexity/{name}" for name in domains)),
            "bits per byte": chart(*(f"val/bpb/{name}" for name in domains)),
            "share of training rows": chart(*(f"data/share/{name}" for name in domains)),
        },
        "throughput": {"tokens per second": chart("train/tokens_per_second")},
    }
    if denoising:
        layout["denoising"] = {
            "mean squared error": chart("train/mse", "val/mse"),
            "relative to predicting the mean": chart("val/mse_relative", "val/mse_relative_pure_noise"),
            "by noise bucket": family("val/mse_relative_bucket/"),
        }
    if experts:
        layout["routing"] = {
            "mean weight": chart(*(f"routing/{name}/mean" for name in experts)),
            "deviation of the weight": chart(*(f"routing/{name}/std" for name in experts)),
            "entropy": chart("routing/entropy_token", "routing/entropy_mean"),
            "effective experts": chart("routing/effective_experts_token", "routing/effective_experts_mean"),
            "mutual information": chart("routing/mi_token", "routing/mi_domain"),
            **{
                f"by domain: {expert}": chart(*(f"routing/domain/{name}/{expert}" for name in domains))
                for expert in experts
            },
            **{f"by position: {expert}": family("routing/position/", f"/{expert}") for expert in experts},
        }
    return layout
