"""FSDP2 in a group of one process: all of its tensors, hooks and states, without a second one to wait for."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from nano_think.ops.processes import load_whole, whole_state
from nano_think.optim.groups import adamw
from nano_think.optim.muon import muon
from nano_think.phases.fully_shard import FullyShard

KINDS = ("transformer", "state_space", "diffuser", "route")
OPTIMIZERS = {
    name: partial(make, lr=3e-3, weight_decay=0.5) for name, make in (("adamw", adamw), ("muon", muon))
}


@pytest.fixture(autouse=True)
def _group(monkeypatch) -> Iterator[None]:
    for name, value in (
        ("RANK", 0),
        ("LOCAL_RANK", 0),
        ("GROUP_RANK", 0),
        ("WORLD_SIZE", 1),
        ("LOCAL_WORLD_SIZE", 1),
    ):
        monkeypatch.setenv(name, str(value))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(
            other[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_divided_network_trains_as_it_would_whole(kind, optimizer, objective, data, trainer):
    """Weight decay of 0.5 shows a parameter that has lost the mark that spares it."""
    options = {"stage": "7c", "anchor": 0.3} if kind == "route" else {}
    plain, divided = objective(kind, **options), objective(kind, **options)
    for task in (plain, divided):
        task.make_optimizer = OPTIMIZERS[optimizer]
    start, network = whole_state(plain.network), divided.network
    trainer(max_steps=3, gradient_clip_val=0.5, limit_val_batches=0).fit(plain, datamodule=data())
    runner = trainer(max_steps=3, gradient_clip_val=0.5, strategy=FullyShard(1))
    runner.validate(divided, datamodule=data(), verbose=False)
    runner.fit(divided, datamodule=data())
    parameters = dict(divided.network.named_parameters())
    assert all(isinstance(parameter, DTensor) for parameter in parameters.values())
    assert divided.network is not network
    assert divided.whole_network() is network
    assert not any(isinstance(parameter, DTensor) for parameter in network.parameters())
    close(plain.network.state_dict(), network.state_dict())
    trained = [name for name, parameter in plain.network.named_parameters() if parameter.requires_grad]
    assert any(not torch.equal(start[name], network.state_dict()[name]) for name in trained)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("first", ["whole", "divided"])
def test_a_fit_goes_on_whoever_saved_it(first, optimizer, objective, data, trainer, tmp_path):
    def fit(divided: bool, steps: int, ckpt_path=None):
        task = objective("state_space")
        task.make_optimizer = OPTIMIZERS[optimizer]
        runner = trainer(max_steps=steps, limit_val_batches=0, strategy=FullyShard(1) if divided else "auto")
        runner.fit(task, datamodule=data(), ckpt_path=ckpt_path, weights_only=True)
        return task, runner

    _, begun = fit(first == "divided", 2)
    begun.save_checkpoint(tmp_path / "state.ckpt")
    content = torch.load(tmp_path / "state.ckpt", weights_only=True)
    moments = [
        value for entry in content["optimizer_states"][0]["state"].values() for value in entry.values()
    ]
    assert not any(isinstance(value, DTensor) for value in [*moments, *content["state_dict"].values()])
    resumed, _ = fit(first == "whole", 5, tmp_path / "state.ckpt")
    undisturbed, _ = fit(False, 5)
    close(undisturbed.network.state_dict(), resumed.whole_network().state_dict())


def test_types_of_parameters_and_gradients_are_those_asked_for(objective, data, trainer):
    """Parameters stay fp32 between steps; blocks compute with what they are put together in."""
    task, seen = objective("transformer"), set()
    strategy = FullyShard(1, param_dtype="bfloat16", reduce_dtype="float32")
    runner = trainer(max_steps=1, limit_val_batches=0, strategy=strategy)

    def look(module, args):
        seen.update(parameter.dtype for parameter in module.parameters())

    task.network.expert.blocks[0].register_forward_hook(lambda module, args, out: look(module, args))
    runner.fit(task, datamodule=data())
    assert seen == {torch.bfloat16}
    assert {parameter.dtype for parameter in task.network.parameters()} == {torch.float32}
    assert (strategy.policy.param_dtype, strategy.policy.reduce_dtype) == (torch.bfloat16, torch.float32)


def test_a_loss_scaled_before_the_backward_pass_gives_the_same_gradient(objective, data, trainer):
    """For engines that keep gradients to themselves; clipping is theirs too."""
    states = []
    for before in (False, True):
        task = objective("transformer")
        task.scaled_before = before
        # SGD, for Adam forgives a scale
        task.make_optimizer = lambda network: torch.optim.SGD(network.parameters(), lr=0.5)
        trainer(max_steps=3, limit_val_batches=0).fit(task, datamodule=data(mode="padded"))
        states.append(task.network.state_dict())
    close(*states)


def test_a_state_of_other_names_is_refused():
    with pytest.raises(KeyError, match="a state of other names"):
        load_whole(torch.nn.Linear(2, 2), {"weight": torch.zeros(2, 2)})
