"""Rows are counted on the device they are on, and read where they are logged or saved."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from nano_think.callbacks.domain_shares import DomainShares


def _step(callback, domain, index, logged):
    trainer = SimpleNamespace(log_every_n_steps=2, fit_loop=SimpleNamespace(total_batch_idx=index))
    module = SimpleNamespace(domains=["a", "b"], log_dict=logged.update)
    callback.on_train_batch_end(trainer, module, None, {"domain": domain}, index)


def test_all_rows_since_the_start_are_shared_out_at_the_interval():
    callback, logged = DomainShares(), {}
    _step(callback, torch.tensor([0, 0, 1]), 0, logged)
    assert not logged
    _step(callback, torch.tensor([0]), 1, logged)
    assert logged == {"data/share/a": 0.75, "data/share/b": 0.25}
    _step(callback, torch.tensor([1]), 2, logged)
    assert callback.state_dict() == {"rows": {"a": 3, "b": 2}}


def test_no_step_between_two_logs_waits_for_its_count():
    """A tensor without values stands for one whose values are still being computed."""
    callback = DomainShares()
    _step(callback, torch.zeros(4, dtype=torch.int64, device="meta"), 0, {})
    assert not callback.rows
