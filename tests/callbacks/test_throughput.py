from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nano_think.callbacks import throughput
from nano_think.callbacks.throughput import Throughput


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now.seconds)
    return now


def _step(callback, clock, trainer, logged, seconds, tokens=10):
    """One batch with `tokens` real tokens beside pads, that takes `seconds`."""
    batch = {"segments": torch.tensor([0] * tokens + [-1] * 5)}
    module = SimpleNamespace(log=lambda name, value, **_: logged.append((name, value)))
    callback.on_train_batch_start(trainer, module, batch, 0)
    clock.seconds += seconds
    trainer.fit_loop.total_batch_idx += 1
    callback.on_train_batch_end(trainer, module, None, batch, 0)


def _trainer():
    return SimpleNamespace(log_every_n_steps=2, fit_loop=SimpleNamespace(total_batch_idx=-1))


def test_the_rate_counts_real_tokens_over_the_steps_since_the_last_log(clock):
    callback, trainer, logged = Throughput(), _trainer(), []
    for seconds in (1.0, 4.0, 1.0, 1.0):
        _step(callback, clock, trainer, logged, seconds)
    assert logged == [
        ("train/tokens_per_second", 20 / 5.0),
        ("train/tokens", 20.0),
        ("train/tokens_per_second", 20 / 2.0),
        ("train/tokens", 40.0),
    ]


def test_validation_takes_no_part(clock):
    callback, trainer, logged = Throughput(), _trainer(), []
    _step(callback, clock, trainer, logged, 1.0)
    callback.on_validation_start(trainer, None)
    clock.seconds += 1000.0
    _step(callback, clock, trainer, logged, 2.0)
    assert logged[0] == ("train/tokens_per_second", pytest.approx(10 / 2.0))


def test_the_total_survives_a_resumption(clock):
    first, second, logged = Throughput(), Throughput(), []
    trainer = _trainer()
    _step(first, clock, trainer, logged, 1.0)
    second.load_state_dict(first.state_dict())
    _step(second, clock, trainer, logged, 1.0)
    assert ("train/tokens", 20.0) in logged


def test_flops_and_their_share_of_the_peak(clock):
    callback, trainer, logged = Throughput(flops_per_token=3.0, peak_flops=120.0), _trainer(), []
    for seconds in (0.5, 0.5):
        _step(callback, clock, trainer, logged, seconds)
    assert ("train/flops_per_second", 60.0) in logged
    assert ("train/mfu", 0.5) in logged
    logged.clear()
    callback.peak_flops = None
    for seconds in (0.5, 0.5):
        _step(callback, clock, trainer, logged, seconds)
    assert ("train/flops_per_second", 60.0) in logged
    assert "train/mfu" not in dict(logged)


def test_more_than_the_peak_is_an_error_that_names_the_formula(clock, caplog):
    callback, trainer, logged = Throughput(flops_per_token=3.0, peak_flops=12.0), _trainer(), []
    for _ in range(4):
        _step(callback, clock, trainer, logged, 0.5)
    assert dict(logged)["train/mfu"] == 5.0
    [record] = caplog.records
    assert record.levelname == "ERROR"
    assert "MFU = flops_per_token x tokens/s / peak = 3 x 20 / 12 = 5 is above 1" in record.getMessage()


def test_no_step_between_two_logs_waits_for_its_count(clock):
    """A tensor without values stands for one whose values are still being computed."""
    callback, trainer = Throughput(), _trainer()
    trainer.fit_loop.total_batch_idx = 0
    batch = {"segments": torch.zeros(2, 8, device="meta")}
    callback.on_train_batch_end(trainer, None, None, batch, 0)
    assert callback.tokens == 0
