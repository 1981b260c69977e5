"""Spikes among the losses or norms of a fit are left out, and nothing else is; the state of it resumes."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from nano_think.callbacks.newest import NewestState
from nano_think.callbacks.spikes import SpikeSkip
from nano_think.callbacks.step_seed import StepSeed


class Enlarge(L.Callback):
    """Multiplies gradients of the given steps; keeps the weights before and after each step."""

    def __init__(self, steps, factor=1e4):
        self.steps, self.factor, self.changed = steps, factor, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step not in self.changed:
            self.before = [p.detach().clone() for p in pl_module.network.parameters()]

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step in self.steps:
            for parameter in pl_module.network.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.factor)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pairs = zip(self.before, pl_module.network.parameters(), strict=True)
        self.changed[trainer.global_step - 1] = any(not torch.equal(one, other) for one, other in pairs)


@pytest.fixture
def fit(objective, data, trainer, tmp_path):
    """`fit(enlarged, deviations, until)`: an anchored router and table; resumes where a state is."""

    def run(enlarged=(), deviations=50.0, until=16, kind="route"):
        task = objective(kind, lr=1e-3, **({"anchor": 5.0} if kind == "route" else {}))
        spikes, enlarge = SpikeSkip(deviations, window=12, at_least=4), Enlarge(enlarged)
        newest = NewestState(tmp_path, every_n_train_steps=1)
        runner = trainer(
            max_steps=until, limit_val_batches=0, gradient_clip_val=1.0, enable_checkpointing=True,
            callbacks=[StepSeed(3), enlarge, spikes, newest],
        )  # fmt: skip
        state = str(newest.path) if newest.path.exists() else None
        runner.fit(task, datamodule=data(batch_size=4, val_rows=2), ckpt_path=state, weights_only=True)
        return task.network.state_dict(), spikes, enlarge.changed

    return run


def test_a_spike_changes_no_weight_and_is_counted(fit):
    """Not by its update, its decay, its moments or the anchor's pull; the steps around it are taken."""
    _, spikes, changed = fit(enlarged=(7, 10))
    assert spikes.skipped == 2
    assert [step for step, moved in changed.items() if not moved] == [7, 10]


def test_off_and_calm_are_the_same_bits(fit, tmp_path):
    calm, spikes, _ = fit()
    assert spikes.skipped == 0
    (tmp_path / "newest.ckpt").unlink()
    off, spikes, _ = fit(deviations=None)
    assert not spikes.losses
    assert all(torch.equal(tensor, off[name]) for name, tensor in calm.items())


def test_a_resumed_fit_skips_the_same_steps(fit, tmp_path):
    """Stopped after a skipped step, and within the first steps that the window needs."""
    whole, spikes, _ = fit(enlarged=(6, 9))
    assert spikes.skipped == 2
    (tmp_path / "newest.ckpt").unlink()
    for until in (3, 7, 16):
        again, resumed, _ = fit(enlarged=(6, 9), until=until)
    assert resumed.state_dict() == spikes.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_a_level_that_stays_is_accepted_after_half_a_window():
    spikes = SpikeSkip(deviations=5.0, window=10, at_least=4)
    values = [1.0, 1.1, 0.9, 1.0, 1.1, 0.9, 1.0, 1.1, 0.9, 1.0] + [3.0] * 10
    skipped = []
    for value in values:
        skipped.append(spikes._is_spike(spikes.losses, value))
        spikes.losses.append(value)
    assert skipped == [False] * 10 + [True] * 5 + [False] * 5


@pytest.mark.parametrize(
    ("value", "spike"), [(1.05, False), (1.5, True), (-50.0, False), (float("nan"), True)]
)
def test_only_what_is_far_above_the_median_is_a_spike(value, spike):
    spikes = SpikeSkip(deviations=8.0, window=8, at_least=4)
    spikes.losses.extend([1.0, 1.0, 1.0, 1.0, 1.02, 0.98])
    assert spikes._is_spike(spikes.losses, value) is spike
