"""FSDP2 for a fit: what `fully_shard` has to know of a task, and states that any number of processes reads."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

from nano_think.experts.denoiser_block import ModulatedBlock
from nano_think.nn.block import Block
from nano_think.ops.processes import divided_like, load_whole, whole, whole_state
from nano_think.tasks.base import FitTask

# The calls of a task in which all that lies outside of blocks is whole: the tied table, norms, router.
STEPS = ("training_step", "validation_step")


class FullyShard(ModelParallelStrategy):
    """Divides a copy of the task's network: whoever built the network gets it back whole, with the final weights.

    Blocks are put together one by one, the rest once a step. What lies on disk is what one process writes, so that
    a fit goes on in any number of processes.

    world: number of processes. param_dtype, reduce_dtype: names of torch's types in which parameters are put
    together and gradients added up; None: as they are.
    """

    def __init__(
        self, world: int, param_dtype: str | None = None, reduce_dtype: str | None = None, **arguments: Any
    ) -> None:
        super().__init__(
            data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=False, **arguments
        )
        param, reduce = (name and getattr(torch, name) for name in (param_dtype, reduce_dtype))
        self.policy = MixedPrecisionPolicy(param_dtype=param, reduce_dtype=reduce)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """States of optimizers are restored by the method below and not with the network."""
        return True

    def setup(self, trainer: Any) -> None:
        """Divide the network, once for all that one Trainer does with it."""
        task: Any = self.lightning_module
        if not isinstance(task, FSDPModule):
            divide(task, self.device_mesh["data_parallel"], self.policy)
        for module in task.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        super().setup(trainer)

    def setup_optimizers(self, trainer: Any) -> None:
        """Groups of parameters are made of marks on them, which neither a copy nor a move to a device keeps."""
        task: Any = self.lightning_module
        copy_marks(task.built[0], task.network)
        super().setup_optimizers(trainer)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors."""
        assert self.lightning_module is not None
        return whole_state(self.lightning_module)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take over whole tensors."""
        assert self.lightning_module is not None
        load_whole(self.lightning_module, checkpoint["state_dict"])

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's own state dict of whole tensors: parameters are numbered as in its groups."""
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        entries = {
            number: {name: _whole_on_cpu(value) for name, value in entry.items()}
            for number, entry in state["state"].items()
        }
        return {**state, "state": entries}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Inverse of `optimizer_state`."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            entries = {
                number: {
                    name: divided_like(value, parameters[number])
                    if isinstance(value, torch.Tensor) and value.shape == parameters[number].shape
                    else value
                    for name, value in entry.items()
                }
                for number, entry in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": entries})

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file of a whole state, in every process."""
        return Strategy.load_checkpoint(self, Path(checkpoint_path), weights_only)


def divide(task: FitTask, mesh: Any, policy: MixedPrecisionPolicy) -> None:
    """Put a divided copy of the task's network in its place and keep the network itself as `task.built`."""
    built = task.network
    task.network = copy.deepcopy(built)
    task.built = (built,)
    # a backward pass puts together again what it needs, also the outermost part: validation leaves nothing whole
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": True}
    for module in task.network.modules():
        if isinstance(module, Block | ModulatedBlock):
            fully_shard(module, **options)
            if isinstance(module, ModulatedBlock):
                register_fsdp_forward_method(module, "keys_values")
    fully_shard(task, **options)
    for step in STEPS:
        register_fsdp_forward_method(task, step)


def copy_marks(built: nn.Module, divided: nn.Module) -> None:
    """Give the divided parameters what somebody wrote on the whole ones, such as that they do not decay."""
    parameters = dict(divided.named_parameters())
    for name, parameter in built.named_parameters():
        parameters[name].__dict__.update(parameter.__dict__)


def _whole_on_cpu(value: Any) -> Any:
    return whole(value.detach()).cpu() if isinstance(value, torch.Tensor) else value
