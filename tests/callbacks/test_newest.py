from __future__ import annotations

import os
import signal

import lightning as L
import pytest
import torch

from nano_think.callbacks.domain_shares import DomainShares
from nano_think.callbacks.newest import NewestState
from nano_think.callbacks.selection import ValidationSelection
from nano_think.callbacks.step_seed import StepSeed

STEPS, ACCUMULATE, INTERVAL = 7, 2, 3


class At(L.Callback):
    """Does something before a micro-batch is trained on (counted over the whole fit), or in a validation."""

    def __init__(self, action, batch=None, validation=None):
        self.action, self.batch, self.validation = action, batch, validation

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.batch:
            self.action()

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if (
            self.validation is not None
            and trainer.global_step == self.validation
            and trainer.training is False
        ):
            self.action()


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def crash():
    raise RuntimeError("out of memory")


@pytest.fixture
def fit(objective, data, trainer, tmp_path):
    """`fit(action=None, every=2)`: train to the end, or until `action`; resumes where a state is."""

    def run(action=None, every=2):
        task, module = objective("transformer", lr=1e-2), data(batch_size=4, val_rows=2)
        for part in task.network.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.2
        selection, shares = ValidationSelection(patience=99), DomainShares()
        newest = NewestState(tmp_path, every_n_train_steps=every)
        callbacks = [selection, shares, StepSeed(3), newest, *([action] if action else [])]
        runner = trainer(
            max_steps=STEPS,
            accumulate_grad_batches=ACCUMULATE,
            val_check_interval=INTERVAL * ACCUMULATE,
            check_val_every_n_epoch=None,
            limit_train_batches=10,
            enable_checkpointing=True,
            callbacks=callbacks,
        )
        state = str(newest.path) if newest.path.exists() else None
        if state is None:
            runner.validate(task, datamodule=module, verbose=False)
        runner.fit(task, datamodule=module, ckpt_path=state, weights_only=True)
        return task.network.state_dict(), selection, shares

    return run


@pytest.fixture
def sigint():
    """Lightning answers Ctrl+C by ignoring the next one; tests after this one want to hear it."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def _same(one, two):
    (weights, selection, shares), (other, other_selection, other_shares) = one, two
    assert all(torch.equal(tensor, other[name]) for name, tensor in weights.items())
    assert selection.history == other_selection.history
    assert selection.best_step == other_selection.best_step
    assert shares.rows == other_shares.rows


def test_dropout_is_live_here(fit, tmp_path):
    """Or the tests below could not see whether the random stream is taken up again."""
    task, _, _ = fit()
    (tmp_path / "newest.ckpt").unlink()
    StepSeed.on_train_batch_start, kept = lambda *_: torch.manual_seed(8), StepSeed.on_train_batch_start
    try:
        other, _, _ = fit()
    finally:
        StepSeed.on_train_batch_start = kept
    assert any(not torch.equal(tensor, other[name]) for name, tensor in task.items())


def _also_slowly(fast, slow):
    return [*fast, *(pytest.param(case, marks=pytest.mark.slow) for case in slow)]


@pytest.mark.parametrize("batch", _also_slowly([1, 5, 12], [0, 6, 9, 11, 13]))
def test_ctrl_c_in_any_batch_then_resume_gives_the_uninterrupted_result(batch, fit, tmp_path, sigint):
    whole = fit()
    (tmp_path / "newest.ckpt").unlink()
    try:
        with pytest.raises(SystemExit):
            fit(At(press_ctrl_c, batch), every=100)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    saved = torch.load(tmp_path / "newest.ckpt", weights_only=True)["global_step"]
    assert saved == batch // ACCUMULATE + 1
    _same(whole, fit())


@pytest.mark.parametrize("batch", _also_slowly([6, 9], [5, 11, 12]))
def test_a_crash_in_any_batch_then_resume_gives_the_uninterrupted_result(batch, fit, tmp_path):
    whole = fit()
    (tmp_path / "newest.ckpt").unlink()
    with pytest.raises(RuntimeError, match="memory"):
        fit(At(crash, batch))
    saved = torch.load(tmp_path / "newest.ckpt", weights_only=True)["global_step"]
    assert batch // ACCUMULATE - 2 < saved <= batch // ACCUMULATE
    _same(whole, fit())


@pytest.mark.parametrize("step", _also_slowly([3], [6, 7]))
@pytest.mark.parametrize("action", [press_ctrl_c, crash])
def test_stopping_in_a_validation_does_not_lose_it(action, step, fit, tmp_path, sigint):
    whole = fit()
    (tmp_path / "newest.ckpt").unlink()
    try:
        with pytest.raises((SystemExit, RuntimeError)):
            fit(At(action, validation=step))
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _same(whole, fit())


def test_a_second_ctrl_c_stops_at_once(fit, tmp_path, sigint):
    def twice():
        press_ctrl_c()
        press_ctrl_c()

    try:
        with pytest.raises(SystemExit):
            fit(At(twice, batch=5), every=100)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert not (tmp_path / "newest.ckpt").exists()


def test_the_handler_of_ctrl_c_is_put_back(fit):
    before = signal.getsignal(signal.SIGINT)
    fit()
    assert signal.getsignal(signal.SIGINT) is before
