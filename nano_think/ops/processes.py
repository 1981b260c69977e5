"""What a tensor function has to know of the other processes of a fit; with one process all of it is the identity.

Row i of rank r is row i * world + r of the global batch, see `data.sampler`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def place() -> tuple[int, int]:
    """Rank of this process and number of processes, (0, 1) outside a fit of several."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


_apart = False


@contextmanager
def apart() -> Iterator[None]:
    """What is computed in here asks no other process; which rows are this one's stays as it is."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def summed(values: Tensor) -> Tensor:
    """The sum of `values` over all processes, without gradient. Every process has to ask, but in `apart`."""
    if _apart or place()[1] == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


def own_rows(draw: Callable[[int], Tensor], own: int, total: int | None = None) -> Tensor:
    """Of random numbers for the rows of the global batch those for the rows of this process.

    draw: numbers for so many rows, from a generator that is the same on all ranks. own: rows of this process.
    total: rows of all of them; None where each has as many. Drawing all and keeping some is the price of a result
    that does not depend on the number of processes.
    """
    rank, world = place()
    if world == 1:
        return draw(own)
    kept = draw(own * world if total is None else total)[rank::world]
    return (
        kept if len(kept) == own else draw(own)
    )  # a row that only keeps the ranks in step, see `data.module`


def local(values: Tensor) -> Tensor:
    """The part of a divided tensor that lies in this process; it shares memory. Other tensors as they are."""
    part: Any = getattr(values, "to_local", None)
    return values if part is None else part()


def whole(values: Tensor) -> Tensor:
    """A divided tensor put together. Every process has to ask. Other tensors as they are."""
    gather: Any = getattr(values, "full_tensor", None)
    return values if gather is None else gather()


def divided_like(values: Tensor, example: Tensor) -> Tensor:
    """Whole `values`, which every process has, divided as `example` is."""
    mesh = getattr(example, "device_mesh", None)
    if mesh is None:
        return values
    from torch.distributed.tensor import distribute_tensor  # slow to import, and needed by divided fits alone

    values = values.detach().to(example.device)
    divided: Any = example
    return distribute_tensor(values, mesh, divided.placements, src_data_rank=None)


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module as copies of whole tensors on the CPU. Every process has to ask."""
    return {name: whole(tensor.detach()).cpu().clone() for name, tensor in module.state_dict().items()}


@torch.no_grad()
def load_whole(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Inverse of `whole_state`; the names have to be those of the module."""
    own = module.state_dict()
    if own.keys() != state.keys():
        raise KeyError(f"a state of other names: {sorted(own.keys() ^ state.keys())[:5]}")
    for name, tensor in own.items():
        tensor.copy_(divided_like(state[name], tensor))
