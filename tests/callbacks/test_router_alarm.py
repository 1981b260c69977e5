"""A router that collapses or starves an expert is said once, with figures; one that shares is left in peace."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from nano_think.callbacks.router_alarm import RouterAlarm

NAMES = ("transformer", "diffuser", "state_space")


@pytest.fixture
def watch():
    """`watch(alarm, weights)`: one training batch after the other, every second one logged; the last values."""
    logged = {}
    trainer = SimpleNamespace(log_every_n_steps=2, fit_loop=SimpleNamespace(total_batch_idx=-1))

    def run(alarm, weights):
        for row in weights:
            trainer.fit_loop.total_batch_idx += 1
            network = SimpleNamespace(experts=dict.fromkeys(NAMES))
            task = SimpleNamespace(mean_weights=torch.tensor(row), network=network, log_dict=logged.update)
            alarm.on_train_batch_end(trainer, task, None, None, 0)
        return dict(logged)

    return run


def test_a_collapse_is_said_once_with_expert_and_setting(watch):
    said = []
    alarm = RouterAlarm(said.append, window=4)
    logged = watch(alarm, [[0.98, 0.01, 0.01]] * 4)
    assert logged["routing/train/entropy_mean"] == pytest.approx(
        -0.98 * math.log(0.98) - 0.02 * math.log(0.01)
    )
    # ln 3 times 0.1 is 0.1099, and 0.98 leaves 0.1119: not yet
    assert (logged["routing/alarm/collapse"], said) == (0.0, [])
    logged = watch(alarm, [[0.988, 0.006, 0.006]] * 8)
    assert logged["routing/alarm/collapse"] == 1.0
    assert logged["routing/alarm/dead"] == 0.0
    (line,) = said
    assert "the router has collapsed: transformer has 98.4% of the weight over the last 4 batches" in line
    assert "training.mla.entropy_mean=0.01" in line


def test_dead_experts_are_named_each_once_and_only_over_a_full_window(watch):
    said = []
    alarm = RouterAlarm(said.append, window=6)
    logged = watch(alarm, [[0.6, 0.001, 0.399]] * 4)
    assert "routing/alarm/dead" not in logged
    assert logged["routing/train/diffuser"] == pytest.approx(0.001)
    logged = watch(alarm, [[0.6, 0.001, 0.399]] * 10)
    assert (logged["routing/alarm/dead"], logged["routing/alarm/collapse"]) == (1.0, 0.0)
    (line,) = said
    assert "expert diffuser is dead: 0.10% of the weight over the last 6 batches" in line


def test_a_window_and_what_was_said_resume(watch):
    said = []
    alarm = RouterAlarm(said.append, window=4)
    watch(alarm, [[0.6, 0.001, 0.399]] * 5)
    again = RouterAlarm(said.append, window=4)
    again.load_state_dict(alarm.state_dict())
    assert len(again.weights) == 4
    watch(again, [[0.6, 0.001, 0.399]] * 4)
    assert len(said) == 1


def test_a_router_that_shares_and_a_task_without_one_are_left_in_peace(watch, objective, data, trainer):
    said = []
    logged = watch(RouterAlarm(said.append, window=4), [[0.5, 0.2, 0.3]] * 8)
    assert (logged["routing/alarm/collapse"], logged["routing/alarm/dead"], said) == (0.0, 0.0, [])
    alarm = RouterAlarm(said.append, window=2)
    trainer(max_steps=2, limit_val_batches=0, callbacks=[alarm]).fit(
        objective("transformer"), datamodule=data(batch_size=4, val_rows=2)
    )
    assert not alarm.weights


def test_the_weights_of_a_real_fit_are_those_of_its_router(objective, data, trainer):
    """A bias of 9 on one of two experts: exp(-9) = 0.0001 is what the other is left with."""
    task, said = objective("route", lr=0.0), []
    with torch.no_grad():
        bias = next(p for name, p in task.network.router.named_parameters() if "bias" in name)
        bias.copy_(torch.tensor([9.0, 0.0]))
    alarm = RouterAlarm(said.append, window=2)
    runner = trainer(max_steps=2, limit_val_batches=0, log_every_n_steps=1, callbacks=[alarm])
    runner.fit(task, datamodule=data(batch_size=4, val_rows=2))
    assert len(said) == 2
    assert "state_space is dead" in said[1]
    assert float(runner.callback_metrics["routing/alarm/collapse"]) == 1.0
    assert float(runner.callback_metrics["routing/train/transformer"]) > 0.999
