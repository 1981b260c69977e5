from __future__ import annotations

from types import SimpleNamespace

import torch

from nano_think.callbacks.step_seed import StepSeed


def _draw(seed, batches_done, rank=0, disturb=0):
    torch.manual_seed(disturb)
    progress = SimpleNamespace(total=SimpleNamespace(processed=batches_done))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    StepSeed(seed).on_train_batch_start(SimpleNamespace(fit_loop=loop, global_rank=rank), None, None, 0)
    return torch.rand(3).tolist()


def test_draws_follow_from_seed_batch_and_rank_alone():
    assert _draw(1, 5) == _draw(1, 5, disturb=7)
    where = [(1, 5), (1, 6), (2, 5), (1, 5, 1), (2**32, 5)]
    assert len({tuple(_draw(*place)) for place in where}) == len(where)
