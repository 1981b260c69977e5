"""The baselines of an evaluation read what the experts read, whatever seed the evaluation has."""

from __future__ import annotations

import numpy as np
import pytest

from nano_think.data.module import TokenDataModule
from nano_think.phases.evaluate import as_trained
from nano_think.phases.sections import fall_per_epoch

TEXTS = {"expert_train": {"a": [f"text {i} of some length" for i in range(30)], "b": ["short texts"] * 20}}
TEXTS |= {split: {"a": ["x y z"], "b": ["u v w"]} for split in ("fusion_train", "validation", "test")}


@pytest.fixture
def make(make_shards):
    directory = make_shards(TEXTS).directory
    return lambda **settings: TokenDataModule(directory, seq_len=16, batch_size=4, **settings)


def test_rows_follow_the_settings_of_the_training(make):
    trained, evaluated = make(seed=7, mixing="proportional"), make(seed=1)
    loader = {"mixing": "proportional", "temperature": 1.0, "mode": "packed", "val_rows": None}
    data = as_trained(evaluated, {"spec": {"fit": {"seed": 7, "loader": loader}}})
    pairs = zip(data.seen(12), trained.seen(12), strict=True)
    assert all(np.array_equal(a, b) for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True))
    assert not np.array_equal(evaluated.seen(12)[0][0], trained.seen(12)[0][0])
    assert (evaluated.seed, evaluated.mixing) == (1, "equal")


def test_a_model_that_somebody_saved_by_hand_says_nothing(make):
    data = make(seed=1)
    assert as_trained(data, {}) is data


def test_the_fall_of_a_curve_is_measured_over_a_quarter_of_the_run():
    """Not between the last two validations: those may lie five steps apart."""
    history = [(0, 8.0), (500, 5.0), (1000, 4.5), (1500, 4.0), (1995, 3.801), (2000, 3.8)]
    assert fall_per_epoch(history, steps_per_epoch=1000) == pytest.approx((4.0 - 3.8) / 4.0 * 2)
    assert fall_per_epoch(history, steps_per_epoch=100) == pytest.approx((4.0 - 3.8) / 4.0 / 5)
    assert fall_per_epoch([(0, 8.0)], 100) == 0.0
    assert fall_per_epoch([(0, 2.0), (10, 2.2)], 100) < 0
