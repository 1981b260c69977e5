from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nano_think.callbacks.selection import ValidationSelection


def _trainer(**state):
    return SimpleNamespace(**{
        "callback_metrics": {}, "global_step": 0, "max_steps": 10_000, "should_stop": False,
        "sanity_checking": False,
    } | state)  # fmt: skip


def _module():
    """A network whose one weight tells when it was copied."""
    network = nn.Linear(1, 1, bias=False)
    return SimpleNamespace(network=network)


def _play(selection, curve, every=10):
    """Validate at steps 0, every, ... with the losses of `curve`; the step at which the fit was stopped."""
    trainer, module = _trainer(), _module()
    for number, loss in enumerate(curve):
        trainer.global_step = number * every
        trainer.callback_metrics["val/loss"] = torch.tensor(loss)
        nn.init.constant_(module.network.weight, float(number))
        selection.on_validation_end(trainer, module)
        if trainer.should_stop:
            break
    selection.on_fit_end(trainer, module)
    return trainer, module


def test_a_plateau_stops_after_patience_validations_without_improvement():
    selection = ValidationSelection(patience=3)
    trainer, module = _play(selection, [5.0, 4.0, 3.0, 3.1, 3.2, 3.3, 3.4, 2.0])
    assert trainer.global_step == 50
    assert (selection.best, selection.best_step) == (3.0, 20)
    assert float(module.network.weight) == 2.0


def test_an_improvement_restarts_the_count():
    trainer, _ = _play(ValidationSelection(patience=2), [5.0, 5.1, 4.0, 4.1, 3.0, 3.1, 3.2, 1.0])
    assert trainer.global_step == 60


def test_improvements_below_min_delta_are_kept_but_do_not_restart_the_count():
    selection = ValidationSelection(patience=2, min_delta=0.1)
    trainer, module = _play(selection, [5.0, 4.95, 4.93, 4.0])
    assert trainer.global_step == 20
    assert selection.best == pytest.approx(4.93)
    assert float(module.network.weight) == 2.0


def test_validations_of_the_warm_up_do_not_count():
    curve = [5.0, 6.0, 6.0, 6.0, 6.0, 6.0, 6.0]
    assert _play(ValidationSelection(patience=2, warmup_steps=30), curve)[0].global_step == 50
    assert _play(ValidationSelection(patience=2), curve)[0].global_step == 20


def test_step_0_can_be_selected():
    selection = ValidationSelection(patience=9)
    _, module = _play(selection, [1.0, 2.0, 3.0])
    assert selection.best_step == 0
    assert float(module.network.weight) == 0.0


def test_a_loss_that_is_no_number_is_never_selected():
    selection = ValidationSelection(patience=9)
    _, module = _play(selection, [3.0, float("nan"), 2.0, float("nan")])
    assert (selection.best_step, float(module.network.weight)) == (20, 2.0)


def test_state_round_trip_goes_on_counting():
    curve = [5.0, 4.0, 4.5, 4.5, 4.5]
    whole, first = ValidationSelection(patience=3), ValidationSelection(patience=3)
    _play(whole, curve)
    trainer, module = _trainer(), _module()
    second = ValidationSelection(patience=3)
    for number, loss in enumerate(curve):
        if number == 3:
            second.load_state_dict(first.state_dict())
        trainer.global_step = 10 * number
        trainer.callback_metrics["val/loss"] = torch.tensor(loss)
        nn.init.constant_(module.network.weight, float(number))
        (second if number >= 3 else first).on_validation_end(trainer, module)
    assert trainer.should_stop
    assert second.history == whole.history
    assert (second.best, second.best_step, second.waited) == (whole.best, whole.best_step, whole.waited)
    second.on_fit_end(trainer, module)
    assert float(module.network.weight) == 1.0


def test_the_last_step_is_validated_whatever_the_interval(objective, data, trainer):
    selection = ValidationSelection(patience=9)
    runner = trainer(max_steps=6, val_check_interval=4, check_val_every_n_epoch=None, callbacks=[selection])
    task, module = objective("transformer"), data(val_rows=2)
    runner.validate(task, datamodule=module, verbose=False)
    runner.fit(task, datamodule=module)
    assert [step for step, _ in selection.history] == [0, 4, 6]


def test_the_fit_ends_with_the_best_weights(objective, data, trainer):
    """Gradient ascent makes every step worse, so that the untrained network is the best one."""
    task, module = objective("transformer"), data(val_rows=2)
    before = {name: tensor.clone() for name, tensor in task.network.state_dict().items()}
    task.make_optimizer = lambda network: torch.optim.SGD(network.parameters(), lr=0.05, maximize=True)
    selection = ValidationSelection(patience=9)
    runner = trainer(max_steps=4, val_check_interval=2, check_val_every_n_epoch=None, callbacks=[selection])
    runner.validate(task, datamodule=module, verbose=False)
    runner.fit(task, datamodule=module)
    losses = [loss for _, loss in selection.history]
    assert losses == sorted(losses)
    assert losses[-1] > losses[0]
    for name, tensor in task.network.state_dict().items():
        assert torch.equal(tensor, before[name])
