from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nano_think.ops.layout import Layout
from nano_think.tasks.denoise import DenoiseTask, denoising_targets, fit_target_statistics


@pytest.fixture
def batch(data):
    return next(iter(data().dataloader("expert_train")))


def _prepared(task, trainer, epoch=0, batch_idx=0):
    """A task that thinks it stands at one batch of one epoch."""
    task.trainer = trainer()
    task.trainer.fit_loop.epoch_progress.current.completed = epoch
    task._batch_idx = batch_idx
    return task


def test_the_teacher_never_changes_and_is_not_saved(objective, expert_lm, data, trainer):
    teacher = expert_lm("transformer", seed=1)
    before = copy.deepcopy(teacher.state_dict())
    task = objective("diffuser", teacher=teacher, lr=1e-2)
    assert not any("teacher" in name or "_frozen" in name for name in task.state_dict())
    names = {name for name, _ in task.named_parameters()}
    assert names == {f"network.{name}" for name, _ in task.network.named_parameters()}
    start = copy.deepcopy(task.network.expert.state_dict())
    trainer(max_steps=4).fit(task, datamodule=data())
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    after = task.network.expert.state_dict()
    assert any(not torch.equal(tensor, after[name]) for name, tensor in start.items())
    for name in ("target_mean", "target_std"):
        assert torch.equal(start[name], after[name])


def test_noise_depends_on_seed_epoch_and_batch_alone(objective, batch, trainer, randomise):
    def loss(seed, epoch, batch_idx, disturb=0):
        task = _prepared(objective("diffuser", seed=seed), trainer, epoch, batch_idx)
        randomise(task.network.expert)
        torch.manual_seed(disturb)
        with torch.no_grad():
            return float(task.batch_loss(batch)["loss"])

    assert loss(0, 0, 0) == loss(0, 0, 0, disturb=9)
    values = [loss(*where) for where in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**32 - 1, 3, 2**20))]
    assert len(set(values)) == len(values)


def test_the_squared_error_by_hand_on_fixed_noise(objective, batch, trainer, randomise):
    """x0, x_tau and the mean over features and labelled tokens, from the equations of the schedule."""
    task = _prepared(objective("diffuser", seed=4, ce_weight=0.0), trainer, 2, 7)
    expert, teacher = task.network.expert, task._frozen[0]
    layout = Layout(batch["positions"], batch["segments"])
    randomise(expert)
    with torch.no_grad():
        variance = expert.variance.clone()
        sums = task.batch_loss(batch)
        # the step itself has moved the variance that the latents are weighed with
        assert not torch.equal(expert.variance, variance)
        expert.variance.copy_(variance)
        hidden = teacher(batch["tokens"], layout).hidden
        x0 = (hidden - expert.target_mean) / expert.target_std
        generator = task._generator(2, 7)
        shape = batch["labels"].shape
        inner = torch.randint(1, 20, shape, generator=generator)
        tau = torch.where(torch.rand(shape, generator=generator) < 0.3, 20, inner)
        eps = torch.randn(x0.shape, generator=generator)
        abar = expert.schedule.abar[tau].float().unsqueeze(-1)
        x_tau = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
        restored = expert.denoise(x_tau, tau, task.network.embedding(batch["tokens"]), layout)
    valid = batch["labels"] != -100
    by_hand = sum(float((restored - x0)[b, t].square().mean()) for b, t in valid.nonzero().tolist())
    assert float(sums["mse"]) == pytest.approx(by_hand, rel=1e-5)
    assert float(sums["loss"]) == float(sums["mse"])
    assert "cross_entropy" not in sums


def test_the_literal_error_is_that_of_the_noise_itself(objective, batch, trainer, randomise):
    """mse_of=prediction with param=eps: mean (eps - eps_hat)^2, the plan's loss, from the network's raw output."""
    task = _prepared(objective("diffuser", seed=4, ce_weight=0.0, mse_of="prediction"), trainer, 2, 7)
    expert = task.network.expert
    expert.param = "eps"
    randomise(expert)
    with torch.no_grad():
        sums = task.batch_loss(batch)
        x0 = expert.standardise(task.targets(batch)[0])
        generator = task._generator(2, 7)
        inner = torch.randint(1, 20, batch["labels"].shape, generator=generator)
        tau = torch.where(torch.rand(inner.shape, generator=generator) < 0.3, 20, inner)
        eps = torch.randn(x0.shape, generator=generator)
        x_tau = expert.schedule.add_noise(x0, eps, tau)
        layout = Layout(batch["positions"], batch["segments"])
        predicted = expert.predict(x_tau, tau, task.network.embedding(batch["tokens"]), layout)
    valid = batch["labels"] != -100
    by_hand = float((predicted - eps).square().mean(-1)[valid].sum())
    assert float(sums["loss"]) == float(sums["mse_prediction"]) == pytest.approx(by_hand, rel=1e-3)
    with pytest.raises(ValueError, match="mse_of"):
        objective("diffuser", mse_of="noise")


def test_the_loss_weighs_its_terms(objective, batch, trainer):
    with torch.no_grad():
        one = _prepared(objective("diffuser"), trainer).batch_loss(batch)
    assert float(one["loss"]) == pytest.approx(float(one["mse"] + one["cross_entropy"]), rel=1e-6)
    with torch.no_grad():
        two = _prepared(objective("diffuser", mse_weight=0.5, ce_weight=3.0), trainer).batch_loss(batch)
    assert float(two["loss"]) == pytest.approx(float(0.5 * one["mse"] + 3 * one["cross_entropy"]), rel=1e-5)


def test_the_cross_entropy_is_of_the_read_out_on_the_next_token(objective, batch, trainer, randomise):
    task = _prepared(objective("diffuser", seed=2), trainer)
    randomise(task.network.expert)
    with torch.no_grad():
        total = float(task.batch_loss(batch)["cross_entropy"])
        x0 = task.network.expert.standardise(task.targets(batch)[0])
        generator = task._generator(0, 0)
        inner = torch.randint(1, 20, batch["labels"].shape, generator=generator)
        tau = torch.where(torch.rand(inner.shape, generator=generator) < 0.3, 20, inner)
        _, said, _ = task._denoise(batch, x0, tau, generator)
        hidden = said * task.network.expert.target_std + task.network.expert.target_mean
        logits = hidden @ task.network.embedding.weight.T
        nll = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    assert total == pytest.approx(float(nll), rel=1e-5)


def test_literal_recipe_without_cross_entropy_trains(objective, data, trainer):
    task = objective("diffuser", ce_weight=0.0)
    runner = trainer(max_steps=2)
    runner.fit(task, datamodule=data())
    assert "train/cross_entropy" not in runner.callback_metrics
    assert float(runner.callback_metrics["train/mse"]) > 0


def test_targets(expert_lm, batch):
    teacher = expert_lm("transformer", seed=1).eval()
    own = nn.Embedding(259, 32)
    layout = Layout(batch["positions"], batch["segments"])
    with torch.no_grad():
        hidden = teacher(batch["tokens"], layout).hidden
    labelled = batch["labels"] != -100

    same, valid = denoising_targets(expert_lm("diffuser", table=own), teacher, batch)
    assert torch.equal(same, hidden)
    assert torch.equal(valid, labelled)

    # the frozen table of the teacher, also for a network that trains a table of its own
    embedded, valid = denoising_targets(expert_lm("diffuser", table=own, target="next_embed"), teacher, batch)
    assert torch.equal(valid, labelled)
    for b, t in labelled.nonzero().tolist():
        assert torch.equal(embedded[b, t], teacher.embedding.weight[batch["labels"][b, t]])

    following, valid = denoising_targets(
        expert_lm("diffuser", table=own, target="hidden_next"), teacher, batch
    )
    expected = [
        (b, t)
        for b, t in labelled.nonzero().tolist()
        if t + 1 < labelled.shape[1] and batch["segments"][b, t] == batch["segments"][b, t + 1]
    ]
    assert valid.nonzero().tolist() == [list(where) for where in expected]
    assert 0 < len(expected) < int(labelled.sum())
    for b, t in expected:
        assert torch.equal(following[b, t], hidden[b, t + 1])


def test_statistics_are_those_of_the_labelled_targets(expert_lm, data):
    teacher = expert_lm("transformer", seed=1).eval()
    network = expert_lm("diffuser", table=teacher.embedding)
    batches = list(data().dataloader("expert_train", rows=8))
    fit_target_statistics(network, teacher, batches)
    with torch.no_grad():
        targets = torch.cat([
            teacher(b["tokens"], Layout(b["positions"], b["segments"])).hidden[b["labels"] != -100]
            for b in batches
        ])  # fmt: skip
    torch.testing.assert_close(network.expert.target_mean, targets.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network.expert.target_std, targets.std(0, correction=0), rtol=1e-4, atol=1e-5)


def test_a_denoiser_that_reads_later_tokens_is_refused(objective):
    with pytest.raises(ValueError, match="bidirectional=true reads later tokens: train without"):
        objective("diffuser", network={"bidirectional": True})


def test_without_statistics_nothing_runs(expert_lm, common, batch, trainer):
    teacher = expert_lm("transformer", seed=1)
    task = DenoiseTask(expert_lm("diffuser", table=teacher.embedding), teacher=teacher, **common())
    with pytest.raises(ValueError, match="no target statistics"):
        _prepared(task, trainer).batch_loss(batch)


def test_denoiser_overfits_one_batch(objective, data, trainer, losses):
    """Other noise at every step, so the x0 of the batch is learned and not a table of noises."""
    small = next(iter(data(batch_size=2).dataloader("expert_train")))
    task = _prepared(objective("diffuser", ce_weight=0.0), trainer)
    for step in range(8):
        task._batch_idx = step
        losses(task, small, 40, lr=5e-3)
    errors = []
    for step in range(100, 110):
        task._batch_idx = step
        with torch.no_grad():
            errors.append(float(task.batch_loss(small)["mse"]) / int((small["labels"] != -100).sum()))
    assert sum(errors) / len(errors) < 0.05


@pytest.mark.parametrize("target", ["hidden_same", "next_embed"])
def test_x0_error_falls_with_the_noise(target, objective, expert_lm, randomise, data, trainer):
    """A short training: 30% under the mean at pure noise, falling with the noise, under half of it at little.

    Where the context alone tells x0 the error is the same at every level. So the hidden states are those of
    random weights, too hard for 200 steps, and a next token is never certain.
    """
    module, teacher = data(batch_size=16), randomise(expert_lm("transformer", seed=1), scale=1.5)
    if target == "next_embed":
        lm = objective("transformer", lr=1e-2)
        trainer(max_steps=60, limit_val_batches=0).fit(lm, datamodule=module)
        teacher = lm.network
    task = objective("diffuser", teacher=teacher, ce_weight=0.0, lr=5e-3, network={"target": target})
    trainer(max_steps=200, limit_val_batches=0).fit(task, datamodule=module)
    metrics = trainer().validate(task, datamodule=module, verbose=False)[0]
    buckets = [metrics[f"val/mse_relative_bucket/{k}"] for k in range(10)]
    levels = [sum(part) / len(part) for part in (buckets[:2], buckets[2:5], buckets[5:8], buckets[8:])]
    assert metrics["val/mse_relative_pure_noise"] < 0.7
    assert levels == sorted(levels), buckets
    assert levels[0] < 0.5 * metrics["val/mse_relative_pure_noise"]


def test_the_teacher_follows_the_batch_to_another_device(objective, expert_lm, batch):
    """Nothing else moves it: it is no submodule, and Lightning's `setup` comes before the network has moved."""
    task = objective("diffuser", teacher=expert_lm("transformer", seed=1)).to("meta")
    task.network.expert.target = "next_embed"
    target, valid = task.targets({name: value.to("meta") for name, value in batch.items()})
    tensors = (target, valid, *task._frozen[0].parameters(), *task._frozen[0].buffers())
    assert {tensor.device.type for tensor in tensors} == {"meta"}
