from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from nano_think.optim.schedule import capped_warmup, constant, cosine, wsd


def factors(schedule, steps: int) -> list[float]:
    """The learning rates of a run of this many steps, in units of the base rate."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.25)
    scheduler = schedule(optimizer)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"] / 0.25)
        optimizer.step()
        scheduler.step()
    return seen


def test_warmup_is_at_most_five_percent_of_the_run() -> None:
    assert capped_warmup(1000, 100_000) == 1000
    assert capped_warmup(1000, 400) == 20
    assert capped_warmup(1000, 10) == 0
    assert capped_warmup(0, 400) == 0


@pytest.mark.parametrize("schedule", [constant, cosine, wsd])
def test_warmup_is_linear_and_never_zero(schedule) -> None:
    seen = factors(partial(schedule, total_steps=200, warmup_steps=500), 12)
    assert seen[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert seen[9] == pytest.approx(seen[10]) == pytest.approx(1.0)


def test_cosine_closed_form() -> None:
    seen = factors(partial(cosine, total_steps=100, warmup_steps=4, final=0.2), 121)
    for step in range(4, 101):
        expected = 0.2 + 0.8 * (1 + math.cos(math.pi * (step - 4) / 96)) / 2
        assert seen[step] == pytest.approx(expected, abs=1e-12)
    assert seen[52] == pytest.approx(0.6)
    assert seen[100:] == pytest.approx([0.2] * 21)
    assert all(a > b for a, b in pairwise(seen[4:101]))


def test_constant_stays() -> None:
    assert factors(partial(constant, total_steps=40), 60) == pytest.approx([1.0] * 60)


def test_wsd_has_a_plateau_and_a_cool_down() -> None:
    seen = factors(partial(wsd, total_steps=100, warmup_steps=5, final=0.1, decay_share=0.25), 111)
    assert seen[4:76] == pytest.approx([1.0] * 72)
    for step in range(76, 101):
        assert seen[step] == pytest.approx(0.1 + 0.9 * (1 - math.sqrt((step - 75) / 25)), abs=1e-12)
    assert seen[100:] == pytest.approx([0.1] * 11)


def test_bad_decay_share_is_refused() -> None:
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="decay_share"):
            factors(partial(wsd, total_steps=10, decay_share=share), 1)


@pytest.mark.parametrize("schedule", [constant, cosine, wsd])
def test_state_dict_resumes_in_place_and_groups_keep_their_ratio(schedule) -> None:
    layer = nn.Linear(2, 2)
    groups = [{"params": [layer.weight], "lr": 1.0}, {"params": [layer.bias], "lr": 10.0}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    scheduler = schedule(optimizer, total_steps=50, warmup_steps=2)
    for _ in range(47):
        optimizer.step()
        scheduler.step()
    again = torch.optim.SGD([{"params": g["params"], "lr": g["lr"]} for g in groups], lr=1.0)
    resumed = schedule(again, total_steps=50, warmup_steps=2)
    again.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    for one, two in ((optimizer, scheduler), (again, resumed)):
        one.step()
        two.step()
    assert resumed.get_last_lr() == scheduler.get_last_lr()
    assert resumed.get_last_lr()[1] == pytest.approx(10 * resumed.get_last_lr()[0])


def test_totals_of_one_step_are_finite() -> None:
    for schedule in (constant, cosine, wsd):
        assert all(map(math.isfinite, factors(partial(schedule, total_steps=1, warmup_steps=9), 3)))
