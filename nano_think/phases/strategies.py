"""How several processes share a fit: what conf/strategy names. Each function makes one of Lightning's strategies.

world: number of processes. Importing this module does not import Lightning.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from nano_think.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy


def single(world: int) -> str:
    """One process; UserError for more."""
    if world > 1:
        raise UserError(f"trainer.devices={world} are several processes: add strategy=ddp or strategy=fsdp2")
    return "auto"


def ddp(world: int, **arguments: Any) -> Strategy:
    """The whole network in every process, gradients averaged (Li et al., arXiv 2006.15704).

    arguments: of Lightning's DDPStrategy.
    """
    from lightning.pytorch.strategies import DDPStrategy

    return DDPStrategy(**arguments)


def fsdp2(world: int, **arguments: Any) -> Strategy:
    """Parameters, gradients and optimizer state divided among the processes, see `phases.fully_shard`."""
    from nano_think.phases.fully_shard import FullyShard

    return FullyShard(world, **arguments)


def deepspeed(world: int, stage: int = 2, **arguments: Any) -> Strategy:
    """ZeRO (Rajbhandari et al., arXiv 1910.02054) by the package deepspeed, on GPUs alone.

    stage: what is divided: 1 optimizer state, 2 gradients too. arguments: of Lightning's DeepSpeedStrategy.
    """
    import torch

    if stage not in (1, 2):
        raise UserError(f"strategy.stage={stage} is not 1 or 2: strategy=fsdp2 divides parameters too")
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("strategy=deepspeed needs a package that is not there: `pip install deepspeed`")
    if not torch.cuda.is_available():
        raise UserError("strategy=deepspeed needs a GPU: strategy=fsdp2 divides the same on a CPU too")
    from lightning.pytorch.strategies import DeepSpeedStrategy

    return DeepSpeedStrategy(stage=stage, **arguments)
