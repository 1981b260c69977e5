"""What all training objectives share: optimizer and schedule, exact averaging, per-domain metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nano_think.metrics.domain_loss import DomainLoss
from nano_think.ops.layout import Layout
from nano_think.ops.processes import load_whole, local, own_rows, place, summed, whole, whole_state

Batch = Mapping[str, Tensor]
OptimizerFactory = Callable[[nn.Module], Optimizer]
ScheduleFactory = Callable[..., LRScheduler]


class FitTask(L.LightningModule):
    """Base of the objectives; a subclass says what the loss of a batch is.

    network: the module whose trainable parameters are optimised and saved.
    optimizer, schedule: factories; the schedule receives the optimizer and the planned number of steps.
    domains, byte_lengths (V,): for loss, perplexity and bits per byte of each domain.

    The loss of an optimizer step is the mean over all valid labels of all its micro-batches, not the mean of
    their means: every micro-batch contributes its sum over a constant, and the gradient is rescaled once the
    number of labels is known. Four batches of 16 rows thus give the gradient of one of 64, and so do two
    processes with 32 rows each.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory,
        domains: Sequence[str],
        byte_lengths: Tensor,
    ) -> None:
        super().__init__()
        self.network = network
        self.make_optimizer, self.make_schedule = optimizer, schedule
        self.domains = list(domains)
        self.val_loss = DomainLoss(self.domains, byte_lengths)
        self._pending_labels: Tensor | float = 0.0
        self._place: tuple[int, int] | None = None
        # The network as it was built, where a strategy trains a copy whose tensors are divided among processes.
        # In a tuple, so that it is no part of the module's state.
        self.built: tuple[nn.Module, ...] = ()
        # Whether gradients are out of reach between backward pass and step, as in the engine of DeepSpeed, which
        # also clips them. A step then has one micro-batch.
        self.scaled_before = False

    @property
    def place(self) -> tuple[int, int]:
        """Epoch and number of the training batch in the whole fit, for seeds; (0, 0) where no fit is going on."""
        if self._place is not None:
            return self._place
        if self._trainer is None:
            return 0, 0
        return self.trainer.current_epoch, self.trainer.fit_loop.total_batch_idx

    @contextmanager
    def at(self, place: tuple[int, int], batch_idx: int) -> Iterator[None]:
        """A batch loss in here is that of a batch at another `place`, number `batch_idx` of its epoch."""
        self._place = place
        try:
            yield
        finally:
            self._place = None

    def batch_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Sums over valid labels by name; `loss` is the one that is minimised."""
        raise NotImplementedError

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Scaled sum of the batch, see the class docstring."""
        sums = self.batch_loss(batch)
        # stays on its device: reading it here would wait for the step
        counted = (batch["labels"] != -100).sum()
        totals = summed(torch.stack([*(value.detach().float() for value in sums.values()), counted.float()]))
        labels = totals[-1]
        self._pending_labels = self._pending_labels + labels
        means = {
            f"train/{name}": total / labels.clamp_min(1) for name, total in zip(sums, totals, strict=False)
        }
        self.log("train/loss", means.pop("train/loss"), prog_bar=True)
        if means:
            self.log_dict(means)
        if self.scaled_before:
            return sums["loss"] * (place()[1] / labels.clamp_min(1))
        return sums["loss"] / batch["labels"].numel()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turn the scaled sums of all micro-batches into the mean over their labels, those of all ranks."""
        if self.scaled_before:
            return
        constant = self.rows_times_length * self.trainer.accumulate_grad_batches
        # The labels are those of all ranks, over which the gradient is a mean and not yet the sum.
        labels = torch.as_tensor(self._pending_labels, dtype=torch.float32, device=self.device)
        gradients = [
            local(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        torch._foreach_mul_(gradients, constant * place()[1] / labels.clamp_min(1.0))
        self._pending_labels = 0.0

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm of all gradients together, and log that norm.

        Lightning refuses to clip for fused optimizers under mixed precision, because some of them undo a loss
        scale inside their step. bf16 needs no loss scale, and fp16, which does, is left to Lightning's refusal.
        """
        if self.scaled_before:
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = partial(_norm, parameters)
        if self.trainer.precision == "16-mixed" or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            before = whole(nn.utils.clip_grad_norm_(parameters, gradient_clip_val))
            norm = partial(torch.clone, before)
            self.log("train/grad_norm", before)
        for callback in self.trainer.callbacks:
            ask = getattr(callback, "on_clipped_gradients", None)
            if ask is not None:
                ask(self.trainer, self, optimizer, norm)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Remember the constant that `training_step` divides by."""
        self.rows_times_length = batch["labels"].numel()

    def configure_model(self) -> None:
        """Nothing: how a network is divided among processes is the strategy's business, which asks for this."""

    def whole_network(self) -> nn.Module:
        """The network in whole tensors: itself, or as it was built with the weights of now. All ranks ask."""
        if not self.built:
            return self.network
        load_whole(self.built[0], whole_state(self.network))
        return self.built[0]

    @staticmethod
    def drawn(draw: Callable[[int], Tensor], batch: Batch, training: bool = True) -> Tensor:
        """Random numbers for the rows of a batch, whichever process they are in: see `own_rows`."""
        labels = batch["labels"]
        if training or place()[1] == 1:
            return own_rows(draw, len(labels))
        total = summed((labels != -100).any(1).sum())  # the last batch of a validation is smaller
        return own_rows(draw, len(labels), int(total))

    @property
    def kept_bytes(self) -> int:
        """Memory that the task takes between steps, beside its network and the optimizer."""
        return 0

    @property
    def flops_options(self) -> dict[str, Any]:
        """What a step computes beside or in place of the network's own passes, as `evals.flops` takes it."""
        return {}

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is computed in here, in whatever arithmetic, the task neither keeps nor takes from what it kept."""
        yield

    def validate_tokens(self, nll: Tensor, batch: Batch) -> None:
        """Add per-token losses (B, L) in nats to the validation metrics."""
        self.val_loss.update(nll, batch["labels"], batch["domain"])

    def on_validation_epoch_end(self) -> None:
        """Log loss, perplexity and bits per byte, overall and per domain, as exact sums over the split."""
        values = {f"val/{name}": value for name, value in self.val_loss.compute().items()}
        self.val_loss.reset()
        self.log("val/loss", values.pop("val/loss").float(), prog_bar=True)
        self.log_dict({name: value.float() for name, value in values.items()})

    def configure_optimizers(self) -> Any:
        """The factories' optimizer and schedule; the schedule moves once an optimizer step."""
        optimizer = self.make_optimizer(self.network)
        schedule = self.make_schedule(optimizer, total_steps=max(1, self.trainer.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @staticmethod
    def layout(batch: Batch) -> Layout:
        """Document structure of a batch."""
        return Layout(batch["positions"], batch["segments"])


def _norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """That of all gradients together."""
    return whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
