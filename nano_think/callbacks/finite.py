"""A fit ends at the first loss or gradient that is not finite, before it reaches the weights, and says where."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from nano_think.artifacts.checkpoint import load_tensors, save_tensors
from nano_think.errors import UserError
from nano_think.files import atomic_dir, write_json
from nano_think.nn.finite import first_nonfinite
from nano_think.ops.processes import apart, summed

ADVICE = "a lower learning rate, precision=32-true or a longer warm-up often help"


@dataclass(frozen=True)
class Place:
    """Where a batch stood: what its random numbers follow from, and the step it belonged to."""

    step: int
    epoch: int
    batch: int
    batch_idx: int
    seed: int


class FiniteGuard(L.Callback):
    """Looks at loss and gradient norm before each optimizer step; where one is NaN or infinite, the fit ends.

    The step is not taken. The micro-batches of the step are computed again, watched module by module; the first
    that is not finite is saved with the weights, and a UserError names the module, the step and the batch. While
    all is well this costs reading one number a step.

    folder: where `nonfinite_step_<n>` is written. label: of the fit. command: the command line of the fit.
    replay: such a folder; a fit of its label then computes that batch with those weights, says what it finds in a
    UserError and trains nothing.
    """

    def __init__(self, folder: str | Path, label: str, command: str, replay: str | None = None) -> None:
        self.folder, self.label, self.command, self.replay = Path(folder), label, command, replay
        self._batches: list[tuple[Any, Place]] = []
        self._loss: Tensor | float = 0.0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replay instead of training, where that is asked for."""
        if self.replay is None:
            return
        note = read_note(Path(self.replay))
        if note["label"] != self.label:
            return
        tensors = load_tensors(Path(self.replay) / "weights.safetensors")
        pl_module.network.load_state_dict(tensors, strict=False)
        batch = load_tensors(Path(self.replay) / "batch.safetensors")
        place = Place(**note["place"])
        batch = {name: tensor.to(pl_module.device) for name, tensor in batch.items()}
        found = (
            _first(trainer, pl_module, batch, place) or "nothing: loss and gradient of the batch are finite"
        )
        raise UserError(
            f"{self.label} replayed at step {place.step}, batch {place.batch}: not finite is {found}"
        )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch until its step is taken."""
        epoch, number = pl_module.place
        self._batches.append(
            (batch, Place(trainer.global_step + 1, epoch, number, batch_idx, torch.initial_seed()))
        )

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Add the loss of a micro-batch."""
        self._loss = self._loss + loss.detach()

    def on_clipped_gradients(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        optimizer: torch.optim.Optimizer,
        norm: Callable[[], Tensor],
    ) -> None:
        """Let the step be taken, or end the fit."""
        # a loss scale of fp16 finds its own way past infinite gradients
        total = torch.as_tensor(self._loss) + (0.0 if trainer.precision == "16-mixed" else norm())
        total = summed(total)  # all processes end together, or none
        batches, self._batches, self._loss = self._batches, [], 0.0
        if not torch.isfinite(total):
            raise UserError(self._explained(trainer, pl_module, batches))

    def _explained(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batches: list[tuple[Any, Place]]
    ) -> str:
        step = batches[-1][1].step
        if pl_module.built:
            return (
                f"{self.label} is not finite at step {step}; of a network divided among processes no module is "
                f"named, strategy=ddp would; {ADVICE}"
            )
        for batch, place in batches:
            found = _first(trainer, pl_module, batch, place)
            if found is not None:
                folder = self._saved(pl_module, batch, place, found)
                again = f"{self.command} callbacks.finite.replay={folder}"
                return (
                    f"{self.label} is not finite at step {step}, batch {place.batch}: first {found}; the step was "
                    f"not taken, batch and weights are in {folder}, and `{again}` computes them again; {ADVICE}"
                )
        return (
            f"{self.label} is not finite at step {step}, but computed again every batch of the step is: the sum "
            f"over them overflows, or another process is the cause; {ADVICE}"
        )

    def _saved(self, pl_module: L.LightningModule, batch: Any, place: Place, found: str) -> Path:
        folder = self.folder / f"nonfinite_step_{place.step}"
        network = pl_module.network
        # each tensor once, also where a table is tied
        weights = dict(network.named_parameters()) | dict(network.named_buffers())
        with atomic_dir(folder) as temporary:
            save_tensors(temporary / "batch.safetensors", dict(batch))
            save_tensors(
                temporary / "weights.safetensors", {n: t.detach().clone() for n, t in weights.items()}
            )
            note = {"label": self.label, "found": found, "place": asdict(place), "command": self.command}
            write_json(temporary / "note.json", note)
        return folder


def read_note(folder: Path) -> dict[str, Any]:
    """What a guard wrote of the batch it saved; UserError for a folder that is none of its own."""
    try:
        return json.loads((folder / "note.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} holds no batch that a guard has saved: name a nonfinite_step_... folder"
        ) from error


def _first(trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, place: Place) -> str | None:
    """What is not finite when a batch is computed as it was, with the same random numbers and precision."""

    def loss() -> Tensor:
        torch.manual_seed(place.seed)
        with trainer.precision_plugin.forward_context():
            return pl_module.batch_loss(batch)["loss"] / batch["labels"].numel()

    with (
        torch.random.fork_rng(),
        pl_module.aside(),
        apart(),
        pl_module.at((place.epoch, place.batch), place.batch_idx),
    ):
        return first_nonfinite(pl_module.network, loss)
