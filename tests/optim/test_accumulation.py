"""Micro-batches: a schedule counts optimizer steps, and four batches of 16 rows are one of 64."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from nano_think.ops.layout import Layout
from nano_think.optim.schedule import cosine
from nano_think.tasks.next_token import NextTokenTask
from nano_think.tasks.route import RouteTask

LENGTH, VOCAB, STEPS = 12, 259, 40
Batch = dict[str, Tensor]


class Rates(L.Callback):
    """The learning rate that each optimizer step is made with."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


def batch(rows: int, seed: int, kept: float = 1.0) -> Batch:
    """Random rows of two documents each; a share of about `kept` of the labels is there."""
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(VOCAB, (2, rows, LENGTH), generator=generator)
    missing = torch.rand(rows, LENGTH, generator=generator) > kept
    segments = (torch.arange(LENGTH) >= 5).long().expand(rows, -1)
    return {
        "tokens": tokens,
        "labels": labels.masked_fill(missing, -100),
        "positions": torch.arange(LENGTH).expand(rows, -1) - 5 * segments,
        "segments": segments,
        "domain": torch.zeros(rows, dtype=torch.int64),
    }


@pytest.mark.parametrize("accumulate", [1, 4])
def test_warm_up_and_decay_count_optimizer_steps(expert_lm, common, trainer, accumulate) -> None:
    """Of 40 steps 2 warm up, 5%, whatever the 500 asked for; Python floats, to a relative 1e-9."""
    settings = common(lr=0.5) | {"schedule": partial(cosine, warmup_steps=500)}
    rates = Rates()
    runner = trainer(
        max_steps=STEPS, accumulate_grad_batches=accumulate, callbacks=[rates], limit_val_batches=0
    )
    batches = DataLoader([batch(1, 0)] * (STEPS * accumulate), batch_size=None)
    runner.fit(NextTokenTask(expert_lm("transformer"), **settings), train_dataloaders=batches)
    decay = [0.1 + 0.9 * (1 + math.cos(math.pi * i / 38)) / 2 for i in range(38)]
    assert rates.seen == pytest.approx([0.5 * factor for factor in [0.5, 1.0, *decay]], rel=1e-9)


@pytest.mark.parametrize("entropy", [0.0, 0.3])
def test_four_times_16_rows_give_the_gradient_of_64_through_the_fused_model(
    fused, randomise, common, trainer, entropy
) -> None:
    """fp32, to 1e-5 of the largest entry; micro-batches hold very different numbers of labels."""
    parts = [batch(16, seed, kept=1 / (seed + 1)) for seed in range(4)]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    counts = [int((part["labels"] != -100).sum()) for part in parts]
    assert max(counts) > 3 * min(counts)
    sgd = common(optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=1.0))

    def step(batches: list[Batch]) -> dict[str, Tensor]:
        """Gradient of one optimizer step, read off a step of plain gradient descent with rate 1."""
        network = randomise(fused(), scale=0.5)
        task = RouteTask(network, anchor=0.0, entropy_token=entropy, **sgd)
        before = {name: p.detach().clone() for name, p in network.named_parameters()}
        runner = trainer(max_steps=1, accumulate_grad_batches=len(batches), limit_val_batches=0)
        runner.fit(task, train_dataloaders=DataLoader(batches, batch_size=None))
        return {name: before[name] - p.detach() for name, p in network.named_parameters()}

    network = randomise(fused(), scale=0.5)
    output = network(whole["tokens"], Layout(whole["positions"], whole["segments"]))
    weights = output.weights[whole["labels"] != -100]
    loss = F.cross_entropy(output.logits.flatten(0, 1), whole["labels"].flatten(), ignore_index=-100)
    (loss - entropy * (weights * weights.log()).sum(-1).mean()).backward()
    trained = {name: p.grad for name, p in network.named_parameters() if "experts." not in name}
    for found in (step(parts), step([whole])):
        for name, gradient in trained.items():
            if gradient is None:  # what reads memory slots, of which there are none here
                assert ".slots." in name
                continue
            largest = float(gradient.abs().max())
            assert largest > 0, name
            torch.testing.assert_close(
                found[name],
                gradient,
                rtol=0,
                atol=max(1e-5 * largest, 2e-7),
                msg=lambda t, n=name: f"{n}: {t}",
            )
