"""Denoising: the objective of the diffuser expert (phase 6b), on targets of the frozen Transformer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from nano_think.metrics.denoising import DenoisingError
from nano_think.model import ExpertLM
from nano_think.nn.leaks import leaks, refusal
from nano_think.ops.cross_entropy import linear_cross_entropy
from nano_think.ops.diffusion import TimeSampler, sample_timesteps
from nano_think.ops.seeding import mixed_seed
from nano_think.tasks.base import Batch, FitTask, OptimizerFactory, ScheduleFactory

NUM_BUCKETS = 10


class DenoiseTask(FitTask):
    """Squared error of x0 plus cross-entropy of its read-out, design equation L_D.

    network: `ExpertLM` of the diffuser over the frozen table. teacher: the frozen `ExpertLM` whose hidden
    states are the targets; it is no submodule, so it is neither saved nor trained.
    mse_weight, ce_weight: of the two terms. mse_of: the squared error is taken of x0, or of the network's own
    prediction; with param=eps, ce_weight=0 and time_sampler=seed that is the plan's literal recipe.
    time_sampler: see `sample_timesteps`. seed: of the noise, which depends on (seed, epoch, batch) alone, and on
    the kind of device, where it is drawn: a processor would take longer to draw it than a GPU for the whole step.
    Raises ValueError for a network that reads later tokens.
    """

    def __init__(
        self,
        network: ExpertLM,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory,
        domains: Sequence[str],
        byte_lengths: Tensor,
        teacher: ExpertLM,
        mse_weight: float = 1.0,
        ce_weight: float = 1.0,
        mse_of: Literal["x0", "prediction"] = "x0",
        time_sampler: TimeSampler = "uniform",
        seed: int = 0,
    ) -> None:
        super().__init__(network, optimizer, schedule, domains, byte_lengths)
        if found := leaks(network):
            raise ValueError(refusal(found))
        self._frozen = (teacher.eval().requires_grad_(False),)
        if mse_of not in ("x0", "prediction"):
            raise ValueError(f"mse_of must be x0 or prediction, not {mse_of!r}")
        self.mse_weight, self.ce_weight, self.mse_of = mse_weight, ce_weight, mse_of
        self.time_sampler, self.seed, self._batch_idx = time_sampler, seed, 0
        train_T, d_model = network.expert.schedule.train_T, network.expert.d_model
        self.val_error = DenoisingError(NUM_BUCKETS, train_T, d_model)
        self.val_error_pure_noise = DenoisingError(1, train_T, d_model)

    @property
    def flops_options(self) -> dict[str, Any]:
        """The teacher's targets, and whether tokens are judged."""
        return {"teacher": self._frozen[0], "cross_entropy": bool(self.ce_weight)}

    def targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the diffuser restores, (B, L, d_model), and where it is defined, (B, L) bool."""
        teacher, device = self._frozen[0], batch["tokens"].device
        # nobody moves what is no submodule, and before a fit begins the network itself has not moved yet; a table
        # that both share moves with the network
        if next(teacher.expert.parameters()).device != device:
            teacher.to(device)
        return denoising_targets(self.network, teacher, batch)

    def batch_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Sums over valid labels of the loss and its two parts."""
        expert, generator = self.network.expert, self._generator(self.place[0], self._batch_idx)
        target, valid = self.targets(batch)
        x0 = expert.standardise(target)
        train_T, length = expert.schedule.train_T, valid.shape[1]
        tau = self.drawn(
            lambda rows: sample_timesteps((rows, length), train_T, generator, self.time_sampler), batch
        ).to(x0.device)
        x0_hat, prediction, x_tau = self._denoise(batch, x0, tau, generator)
        expert.track_variance(x0_hat, x0, tau, valid)
        sums = {"mse": ((x0_hat - x0).square().mean(-1) * valid).sum()}
        if self.mse_of == "x0":
            sums["loss"] = self.mse_weight * sums["mse"]
        else:
            aim = expert.from_x0(x0, x_tau, tau)
            sums["mse_prediction"] = ((prediction - aim).square().mean(-1) * valid).sum()
            sums["loss"] = self.mse_weight * sums["mse_prediction"]
        if self.ce_weight:
            # where a latent is weighed in afterwards, the tokens judge what the network said without it
            read = prediction if expert.param == "posterior" else x0_hat
            sums["cross_entropy"] = linear_cross_entropy(
                expert.readout(read), self.network.embedding.weight, batch["labels"]
            ).sum()
            sums["loss"] = sums["loss"] + self.ce_weight * sums["cross_entropy"]
        return sums

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """As in the base class, with the batch number as the seed of the noise."""
        self._batch_idx = batch_idx
        return super().training_step(batch, batch_idx)

    @contextmanager
    def at(self, place: tuple[int, int], batch_idx: int) -> Iterator[None]:
        """As in the base class."""
        kept, self._batch_idx = self._batch_idx, batch_idx
        with super().at(place, batch_idx):
            yield
        self._batch_idx = kept

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Sampled read-out as a language model, and x0 error by noise level with noise fixed per batch."""
        nll = self.network.token_nll(batch["tokens"], batch["labels"], self.layout(batch))
        self.validate_tokens(nll, batch)
        expert, generator = self.network.expert, self._generator(-1, batch_idx)
        target, valid = self.targets(batch)
        x0 = expert.standardise(target)
        train_T, length = expert.schedule.train_T, valid.shape[1]
        tau = self.drawn(
            lambda rows: torch.randint(
                1, train_T + 1, (rows, length), generator=generator, device=generator.device
            ),
            batch,
            False,
        ).to(x0.device)
        self.val_error.update(self._denoise(batch, x0, tau, generator, False)[0], x0, tau, valid)
        pure = torch.full_like(tau, train_T)
        self.val_error_pure_noise.update(self._denoise(batch, x0, pure, generator, False)[0], x0, pure, valid)

    def on_validation_epoch_end(self) -> None:
        """Log the language-model metrics and the errors by noise bucket."""
        super().on_validation_epoch_end()
        values = {f"val/{name}": value for name, value in self.val_error.compute().items()}
        values["val/mse_relative_pure_noise"] = self.val_error_pure_noise.compute()["mse_relative"]
        self.val_error.reset()
        self.val_error_pure_noise.reset()
        self.log_dict({name: value.float() for name, value in values.items()})

    def _denoise(
        self, batch: Batch, x0: Tensor, tau: Tensor, generator: torch.Generator, training: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Restored x0, what the network itself predicts (noise, where param is eps), and its input."""
        noise = self.drawn(
            lambda rows: torch.randn((rows, *x0.shape[1:]), generator=generator, device=generator.device),
            batch,
            training,
        ).to(x0.device)
        expert = self.network.expert
        x_tau = expert.schedule.add_noise(x0, noise, tau)
        tokens, layout = self.network.embedding(batch["tokens"]), self.layout(batch)
        prediction = expert.predict(x_tau, tau, tokens, layout)
        return expert.to_x0(prediction, x_tau, tau), prediction, x_tau

    def _generator(self, epoch: int, batch_idx: int) -> torch.Generator:
        """Noise of one batch: a pure function of seed, epoch (-1 for validation) and batch number.

        In training drawn where it is needed, in validation by the CPU: figures can be compared between devices.
        """
        device = "cpu" if epoch < 0 else self.device
        return torch.Generator(device).manual_seed(mixed_seed(self.seed, epoch, batch_idx))


@torch.no_grad()
def denoising_targets(network: ExpertLM, teacher: ExpertLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Target vectors (B, L, d_model) of `network.expert.target` and the mask (B, L) of positions that have one."""
    labels = batch["labels"]
    valid = labels != -100
    kind = network.expert.target
    if kind == "next_embed":
        # the teacher's table, also where the network trains one of its own: a moving target would collapse
        return teacher.embedding(labels.clamp_min(0)), valid
    hidden = teacher(batch["tokens"], FitTask.layout(batch), with_logits=False).hidden
    if kind == "hidden_next":
        follows = torch.zeros_like(valid)
        follows[:, :-1] = batch["segments"][:, 1:] == batch["segments"][:, :-1]
        return hidden.roll(-1, dims=1), valid & follows
    return hidden, valid


def fit_target_statistics(network: ExpertLM, teacher: ExpertLM, batches: Iterable[Any]) -> None:
    """Freeze mean and deviation of the targets on training batches."""

    def parts() -> Iterator[Tensor]:
        for batch in batches:
            target, valid = denoising_targets(network, teacher, batch)
            yield target[valid]

    network.expert.fit_statistics(parts())
