"""A NaN that is planted in a module at a step is named with both, and its batch can be computed again."""

from __future__ import annotations

import json

import lightning as L
import pytest
import torch

from nano_think.artifacts.checkpoint import load_tensors
from nano_think.callbacks.finite import FiniteGuard
from nano_think.callbacks.step_seed import StepSeed
from nano_think.errors import UserError

ACCUMULATE = 2


class NaNGradient(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


class Plant(L.Callback):
    """A fault that meets micro-batch `batch` (counted over the whole fit) and no other, however often it comes.

    Keeps the weights before it, and the batch.
    """

    def __init__(self, batch, fault):
        self.batch, self.fault, self.kept, self.met = batch, fault, None, False

    def on_fit_start(self, trainer, pl_module):
        pl_module.network.embedding.register_forward_pre_hook(self._look)
        self.fault(self, pl_module.network)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.batch:
            weights = {name: tensor.clone() for name, tensor in pl_module.network.state_dict().items()}
            self.kept = weights, {name: tensor.clone() for name, tensor in batch.items()}

    def _look(self, module, args):
        self.met = self.kept is not None and torch.equal(args[0], self.kept[1]["tokens"])


def nan_output(name):
    def fault(plant, network):
        network.get_submodule(name).register_forward_hook(
            lambda *a: a[2] * float("nan") if plant.met else None
        )

    return fault


def nan_gradient(name):
    def fault(plant, network):
        module = network.get_submodule(name)
        forward = module.forward
        module.forward = lambda x, *rest: forward(NaNGradient.apply(x) if plant.met else x, *rest)

    return fault


class SpoilWeight(L.Callback):
    """Before micro-batch `batch` one weight becomes infinite."""

    def __init__(self, batch, name):
        self.batch, self.name = batch, name

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.batch:
            with torch.no_grad():
                pl_module.network.get_parameter(self.name).view(-1)[0] = float("inf")


@pytest.fixture
def fit(objective, data, trainer, tmp_path):
    """`fit(kind, plant, replay)`: six steps of two micro-batches, dropout on."""

    def run(kind="transformer", plant=None, replay=None):
        task = objective(kind)
        for part in task.network.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.2
        guard = FiniteGuard(tmp_path, kind, "python train.py phase=expert", replay)
        callbacks = [StepSeed(3), *([plant] if plant else []), guard]
        runner = trainer(
            max_steps=6,
            accumulate_grad_batches=ACCUMULATE,
            limit_val_batches=0,
            gradient_clip_val=1.0,
            callbacks=callbacks,
        )
        runner.fit(task, datamodule=data(batch_size=4, val_rows=2))
        return task

    return run


@pytest.mark.parametrize(("kind", "fault", "module", "found"), [
    ("transformer", nan_output, "expert.blocks.1.ffn", "the output of expert.blocks.1.ffn"),
    ("transformer", nan_gradient, "expert.blocks.0.ffn", "the gradient that expert.blocks.0.ffn hands back"),
    ("state_space", nan_output, "expert.blocks.1.mixer", "the output of expert.blocks.1.mixer"),
    ("diffuser", nan_output, "expert.denoiser.blocks.0", "the output of expert.denoiser.blocks.0"),
])  # fmt: skip
def test_the_module_the_step_and_the_batch_are_named(kind, fault, module, found, fit, tmp_path):
    """In the second micro-batch of the third step; the weights are those before it."""
    plant = Plant(batch=5, fault=fault(module))
    with pytest.raises(UserError) as error:
        fit(kind, plant)
    folder = tmp_path / "nonfinite_step_3"
    said = str(error.value)
    assert f"{kind} is not finite at step 3, batch 5: first {found}; the step was not taken" in said
    assert f"`python train.py phase=expert callbacks.finite.replay={folder}`" in said
    weights, batch = plant.kept
    saved = load_tensors(folder / "batch.safetensors")
    assert saved.keys() == batch.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in batch.items())
    kept = load_tensors(folder / "weights.safetensors")
    # a running statistic of the diffuser has seen the batch
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights.items() if "variance" not in name)
    assert json.loads((folder / "note.json").read_text())["found"] == found


def test_the_saved_batch_is_computed_again_and_nothing_is_trained(fit, tmp_path):
    with pytest.raises(UserError, match=r"first the parameter expert\.blocks\.1\.ffn_norm\.weight"):
        fit(plant=SpoilWeight(4, "expert.blocks.1.ffn_norm.weight"))
    folder = tmp_path / "nonfinite_step_3"
    said = r"replayed at step 3, batch 4: not finite is the parameter expert\.blocks\.1\.ffn_norm\.weight"
    with pytest.raises(UserError, match=said):
        fit(replay=str(folder))
    # a fit of another name goes on
    fit("state_space", replay=str(folder))
    with pytest.raises(UserError, match="holds no batch"):
        fit(replay=str(tmp_path))


def test_a_healthy_fit_is_not_changed(fit, objective, data, trainer):
    guarded = fit().network.state_dict()
    task = objective("transformer")
    for part in task.network.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.2
    runner = trainer(
        max_steps=6,
        accumulate_grad_batches=ACCUMULATE,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        callbacks=[StepSeed(3)],
    )
    runner.fit(task, datamodule=data(batch_size=4, val_rows=2))
    assert all(torch.equal(tensor, guarded[name]) for name, tensor in task.network.state_dict().items())
