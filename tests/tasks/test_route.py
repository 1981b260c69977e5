from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import lightning as L
import pytest
import torch

from nano_think.artifacts.memory import build_memory
from nano_think.metrics.information import entropy
from nano_think.mla import ExpertRouter
from nano_think.nn.block import ExpertInput
from nano_think.ops.layout import Layout
from nano_think.retrieval import Retriever
from nano_think.tasks.route import RouteTask, set_trainable

GAIN_AND_ROUTER = {"expert_gain", "router.weight", "router.bias"}


class Watch(L.Callback):
    """Which trained tensors ever had a non-zero gradient, and in which mode the experts were trained."""

    def __init__(self):
        self.moved, self.expert_modes = set(), []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.expert_modes.append(any(m.training for m in pl_module.network.experts.modules()))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for name, parameter in pl_module.network.named_parameters():
            if parameter.grad is not None and bool(parameter.grad.any()):
                self.moved.add(name)


def _copy(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _run(task, module, trainer, steps=5):
    """Five steps with a validation in their midst; tensors before, and what was watched."""
    before, watch = _copy(task.network), Watch()
    runner = trainer(
        max_steps=steps, val_check_interval=2, check_val_every_n_epoch=None, callbacks=[watch], max_epochs=-1
    )
    runner.fit(task, datamodule=module)
    return before, watch


def _memory(model, data):
    batches = data(batch_size=4).dataloader("expert_train", rows=20)
    return build_memory(model, batches, {"k": 2, "chunk": 8}, {"backend": "torch", "capacity": 10_000})


@pytest.mark.parametrize("stage", ["7b", "7c", "7d"])
def test_five_steps_move_every_trained_tensor_and_no_other_bit(stage, fused, common, data, trainer):
    network = fused()
    slots = _memory(network, data).slots if stage == "7d" else None
    task = RouteTask(network, stage=stage, slots=slots, memory_dropout=0.25, **common(1e-2))
    declared = {name for name, p in network.named_parameters() if p.requires_grad}
    before, watch = _run(task, data(train_split="fusion_train"), trainer)
    after = network.state_dict()
    assert watch.moved == declared
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (name not in declared), name
    assert not any(name.startswith("experts.") for name in declared)
    assert len(watch.expert_modes) == 5
    assert not any(watch.expert_modes)


def test_the_declared_sets_name_by_name(fused):
    network = fused()
    everything = {name for name, _ in network.named_parameters()}
    mla = {name for name in everything if name.startswith("mla.")}
    slots = {name for name in mla if ".slots." in name}
    assert set(set_trainable(network, "7b")) == GAIN_AND_ROUTER
    assert set(set_trainable(network, "7c")) == GAIN_AND_ROUTER | {"embedding.weight"} | (mla - slots)
    assert set(set_trainable(network, "7d")) == GAIN_AND_ROUTER | {"embedding.weight"} | mla
    assert slots == {f"mla.attention.slots.{name}" for name in ("norm.weight", "null", "bias")}
    assert everything == {n for n in everything if n.startswith("experts.")} | GAIN_AND_ROUTER | mla | {
        "embedding.weight"
    }
    with pytest.raises(ValueError, match="7a trains nothing"):
        set_trainable(network, "7a")


def test_what_7c_may_unfreeze(fused):
    network = fused()
    frozen = set(set_trainable(network, "7c"))
    experts = {name for name, _ in network.named_parameters() if name.startswith("experts.")}
    adapters = {f"experts.{name}.entry.adaptor.weight" for name in network.experts}
    assert set(set_trainable(network, "7c", "adapters")) == frozen | adapters
    assert set(set_trainable(network, "7c", "all")) == frozen | experts
    assert not set(set_trainable(network, "7b", "all")) & experts
    with pytest.raises(ValueError, match="choose from none, adapters, all"):
        set_trainable(network, "7c", "some")
    for expert in network.experts.values():
        expert.entry = ExpertInput(expert.d_model, adaptor=False)
    with pytest.raises(ValueError, match="no expert has an entry adaptor"):
        set_trainable(network, "7c", "adapters")
    assert set(set_trainable(network, "7c", "all")) == frozen | experts - adapters


def test_the_router_learns_which_expert_knows_the_batch(fused, objective, common, data, losses):
    batch = next(iter(data().dataloader("fusion_train")))
    taught = objective("transformer")
    losses(taught, batch, 80)
    network = fused()
    network.experts["transformer"].load_state_dict(taught.network.expert.state_dict())
    network.embedding.load_state_dict(taught.network.embedding.state_dict())
    task = RouteTask(network, stage="7b", **common())
    layout, tokens = task.layout(batch), int((batch["labels"] != -100).sum())
    with torch.no_grad():
        knowing = torch.tensor((1.0, 0.0))
        best = network.token_nll(batch["tokens"], batch["labels"], layout, weights=knowing).sum() / tokens
    seen = losses(task, batch, 100, lr=3e-2)
    assert seen[0] > best + 0.3
    assert seen[-1] < best + 0.05
    assert all(later < earlier for earlier, later in zip(seen[::20], seen[20::20], strict=False))


def _mean_entropies(network, batch):
    with torch.no_grad():
        output = network(batch["tokens"], Layout(batch["positions"], batch["segments"]), with_logits=False)
    chosen = output.weights[batch["labels"] != -100]
    return {"entropy_token": float(entropy(chosen).mean()), "entropy_mean": float(entropy(chosen.mean(0)))}


@pytest.mark.parametrize(
    ("name", "weight", "direction"),
    [
        ("entropy_token", 50.0, -1),
        ("entropy_token", -50.0, 1),
        ("entropy_mean", 50.0, 1),
        ("entropy_mean", -50.0, -1),
    ],
)
def test_one_step_moves_the_named_entropy_in_the_named_direction(
    name, weight, direction, fused, common, data, losses
):
    network = fused()
    with torch.no_grad():
        network.router.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
        network.router.bias.copy_(torch.tensor([0.5, -0.5]))
    batch = next(iter(data().dataloader("fusion_train")))
    sgd = common(optimizer=lambda module: torch.optim.SGD(module.router.parameters(), lr=1.0))
    task = RouteTask(network, stage="7b", **{name: weight}, **sgd)
    before = _mean_entropies(network, batch)[name]
    losses(task, batch, 1, lr=1e-3)
    assert (_mean_entropies(network, batch)[name] - before) * direction > 1e-5


def test_the_loss_is_the_sum_of_its_terms(fused, common, data):
    network = fused()
    with torch.no_grad():
        network.router.bias.copy_(torch.tensor([1.0, -1.0]))
    batch = next(iter(data().dataloader("fusion_train")))
    tokens = int((batch["labels"] != -100).sum())
    task = RouteTask(network, stage="7b", entropy_token=2.0, entropy_mean=3.0, **common())
    sums = task.batch_loss(batch)
    weight = 1 / (1 + math.exp(-2.0))
    one = -(weight * math.log(weight) + (1 - weight) * math.log(1 - weight))
    assert float(sums["entropy_token"]) / tokens == pytest.approx(one, rel=1e-4)
    assert float(sums["entropy_mean"]) / tokens == pytest.approx(one, rel=1e-4)
    expected = float(sums["cross_entropy"]) + (2.0 - 3.0) * one * tokens
    assert float(sums["loss"]) == pytest.approx(expected, rel=1e-5)


def test_the_anchor_pulls_the_table_back_to_where_it_started(fused, common, data, trainer):
    ends = {}
    for anchor in (0.0, 20.0):
        network = fused()
        start = network.embedding.weight.detach().clone()
        task = RouteTask(network, stage="7c", anchor=anchor, **common(1e-2))
        _run(task, data(train_split="fusion_train"), trainer, steps=8)
        ends[anchor] = float((network.embedding.weight - start).norm())
    assert 0 < ends[20.0] < 0.7 * ends[0.0]


def test_the_anchor_of_one_step_by_hand(fused, common, data, trainer):
    """Gradient descent moves by -lr g; the anchor then takes lr x coefficient of that back."""
    changes = {}
    for anchor in (0.0, 0.25):
        network = fused()
        start = network.embedding.weight.detach().clone()
        sgd = common(
            optimizer=lambda m: torch.optim.SGD((p for p in m.parameters() if p.requires_grad), lr=0.5)
        )
        task = RouteTask(network, stage="7c", anchor=anchor, **sgd)
        _run(task, data(train_split="fusion_train"), trainer, steps=1)
        changes[anchor] = (network.embedding.weight - start).detach()
    torch.testing.assert_close(changes[0.25], changes[0.0] * (1 - 0.5 * 0.25), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    "leaky", [{"granularity": "sequence"}, {"write_on_read": True}], ids=["sequence", "write_on_read"]
)
def test_memory_that_leaks_is_refused(leaky, fused, common, data):
    network = fused()
    memory = _memory(network, data)
    RouteTask(network, stage="7d", slots=memory.slots, **common())
    leaking = replace(memory, retriever=Retriever(memory.store, memory.encoder, k=2, chunk=8, **leaky))
    with pytest.raises(ValueError, match=f"{next(iter(leaky))}=.*train without"):
        RouteTask(network, stage="7d", slots=leaking.slots, **common())


def test_a_fused_network_around_a_bidirectional_denoiser_is_refused(fused, expert_lm, common):
    for leaky in (False, True):
        network = fused()
        network.experts["diffuser"] = expert_lm("diffuser", bidirectional=leaky).expert
        if not leaky:
            RouteTask(network, stage="7b", **common())
            continue
        with pytest.raises(ValueError, match="bidirectional=true reads later tokens"):
            RouteTask(network, stage="7b", **common())


def test_the_pool_over_the_whole_sequence_is_refused(fused, common):
    network = fused(router=partial(ExpertRouter, pool="sequence"))
    with pytest.raises(ValueError, match="sequence"):
        RouteTask(network, **common())


def test_dropped_memory_rows_depend_on_seed_and_batch_alone(fused, common, data, trainer):
    network = fused()
    memory = _memory(network, data)
    batch = next(iter(data().dataloader("fusion_train")))
    kept = {}
    for seed, number in ((0, 3), (0, 3), (0, 4), (1, 3)):
        task = RouteTask(network, stage="7d", slots=memory.slots, seed=seed, **common())
        task.trainer = trainer()
        task.trainer.fit_loop.epoch_loop.batch_progress.total.ready = number
        mask = task._slots(batch, 0.5).index.amax(1) >= 0
        everything = task._slots(batch, 0.0).index.amax(1) >= 0
        assert bool((mask <= everything).all())
        if (seed, number) in kept:
            assert torch.equal(kept[seed, number], mask)
        kept[seed, number] = mask
    assert not torch.equal(kept[0, 3], kept[0, 4])
    assert not torch.equal(kept[0, 3], kept[1, 3])


def test_a_batch_without_memory_gives_its_reader_gradients_too(fused, common, data, trainer):
    """All of zero: processes that divide gradients wait for those of every parameter."""
    network = fused()
    task = RouteTask(network, stage="7d", slots=_memory(network, data).slots, memory_dropout=1.0, **common())
    task.trainer = trainer()
    task.batch_loss(next(iter(data().dataloader("fusion_train"))))["loss"].backward()
    reader = dict(network.mla.attention.slots.named_parameters())
    assert reader
    for name, parameter in reader.items():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_validation_logs_weight_against_position(fused, common, data, trainer):
    network = fused()
    with torch.no_grad():
        network.router.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    task, module = RouteTask(network, **common()), data()
    metrics = trainer().validate(task, datamodule=module, verbose=False)[0]
    sums, counts = torch.zeros(2), 0
    for batch in module.dataloader("validation"):
        weights = network(batch["tokens"], task.layout(batch), with_logits=False).weights
        second = (batch["positions"] == 1) & (batch["labels"] != -100)
        sums, counts = sums + weights[second].sum(0).detach(), counts + int(second.sum())
    for index, name in enumerate(network.experts):
        assert metrics[f"routing/position/1/{name}"] == pytest.approx(float(sums[index]) / counts, rel=1e-5)
