"""The estimate of a fit's peak against what it takes, and what is said where it does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nano_think.phases import memory
from nano_think.phases.memory import Estimate, available, forget_peak, peak, warning
from nano_think.phases.probe import LiveTensors

ROOT = Path(memory.__file__).resolve().parents[2]
# The estimate is at most so many times the measured peak and at least its inverse.
FACTOR = 1.35


def test_tensors_alive_at_once_are_counted_by_hand():
    with LiveTensors() as live:
        a = torch.ones(1000)  # 4,000 bytes
        b = a * 2
        a.view(10, 100).add_(1)
        del b
        c = torch.cat((a, a))
        del a
    assert live.peak == 12_000
    assert live.now == 8_000
    del c


def test_saved_activations_of_a_graph_are_alive():
    x = torch.ones(1000, requires_grad=True)
    with LiveTensors() as live:
        y = x.exp().exp()
        del y
    assert live.now == 0
    assert live.peak == 8_000


def test_every_fit_states_what_it_needs_and_what_it_took(built):
    """At tiny size, where the process itself is most of it."""
    _check_estimates(built.first)


@pytest.mark.slow
def test_the_estimates_hold_at_small_size(project, texts_folder):
    settings = (
        "size=small",
        "size.vocab_size=400",
        "trainer.max_steps=3",
        "++prereq.expert.trainer.max_steps=3",
    )
    _, run = project.go("phase=mla", "expert=all", *settings)
    _check_estimates(run)


def _check_estimates(run):
    """All three experts and the stages of phase 7 that train."""
    fits = run.manifest["fits"]
    assert set(fits) == {"transformer", "diffuser", "state_space", "mla_7b", "mla_7c", "mla_7d"}
    for name, fit in fits.items():
        ratio = fit["estimated_memory_gb"]["peak"] / fit["peak_memory_gb"]
        assert 1 / FACTOR < ratio < FACTOR, name


@pytest.mark.parametrize(("rows", "room", "said"), [
    (32, 10.0, None),
    (32, 3.0, "training.x.batch_size=16 trainer.accumulate_grad_batches=4 takes the same steps in 3.6 GB"),
    (32, 2.1, "training.x.batch_size=8 trainer.accumulate_grad_batches=8 takes the same steps in 2.8 GB"),
    (30, 2.9, "training.x.batch_size=15 trainer.accumulate_grad_batches=4"),
    (32, 0.1, "not even one row a batch fits, choose a smaller size="),
    (32, None, None),
])  # fmt: skip
def test_the_warning_names_what_would_fit(rows, room, said):
    expected = Estimate(process=1e9, kept=0.5e9, fixed=0.5e9, a_row=0.1e9, rows=rows)
    found = warning(expected, None if room is None else room * 1e9, "training.x.batch_size", accumulate=2)
    assert found is None if said is None else said in found


def test_a_peak_can_be_forgotten():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the system keeps the peak of a process")
    block = torch.ones(2**26)
    high = peak()
    del block
    forget_peak()
    assert peak() < high - 2**27
    assert available() > 0
