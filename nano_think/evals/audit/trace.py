"""Which component is to blame: what goes into and comes out of every module, and where two runs first part.

A module is innermost to blame where its inputs agree and its output does not. Where the first disagreement is
the input of a module, the value was made between modules, in the code of the one that holds it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

# module path, "input" or "output", how many such events came before, how many tensors of the event came before
Key = tuple[str, str, int, int]
Differs = Callable[[Tensor, Tensor], bool]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Trace:
    """What passed through the modules of a model, in the order of computation.

    tensors: as (B, L, F). axes: the axis that held the positions before. holders: for the path of every module
    that of the one whose code calls it.
    """

    tensors: dict[Key, Tensor] = field(default_factory=dict)
    axes: dict[Key, int] = field(default_factory=dict)
    holders: dict[str, str] = field(default_factory=dict)

    def part(self, rows: slice, positions: slice) -> Trace:
        """Some rows and positions of everything."""
        return dataclasses.replace(self, tensors={k: v[rows, positions] for k, v in self.tensors.items()})

    def calls(self) -> Counter[tuple[str, str]]:
        """How often each module was called, as far as its inputs or outputs were recorded."""
        return Counter((path, kind) for path, kind, _ in {key[:3] for key in self.tensors})


@contextmanager
def recording(module: nn.Module, shape: Sequence[int], like: Trace | None = None) -> Iterator[Trace]:
    """Trace a module while it works on shape = (B, L).

    Tensors without an axis of B rows in front and one of L positions leave no event, nor do calls of methods
    other than `forward`; modules inside those methods do. Integers and truth values are left out as well: they
    number documents and slots, which may be done in more than one way.
    like: an earlier trace, where the same events have the same axes. It tells the positions from other axes
    when L is so small that it is no distinction.
    """
    trace = Trace(holders=_holders(module))
    counts: Counter[tuple[str, str]] = Counter()

    def note(path: str, kind: str, values: Any) -> None:
        number = counts[path, kind]
        counts[path, kind] += 1
        for i, tensor in enumerate(_numbers(values)):
            key = (path, kind, number, i)
            axis = position_axis(tensor, shape) if like is None else like.axes.get(key)
            if axis is not None and _fits(tensor, shape, axis):
                trace.axes[key] = axis
                # a copy, because the module may go on to change the tensor in place
                moved = tensor.detach().movedim(axis, 1).reshape(*shape, -1)
                trace.tensors[key] = moved.to("cpu", copy=True)

    handles = []
    for path, part in module.named_modules():

        def before(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            note(path, "input", (args, kwargs))

        def after(_: nn.Module, args: Any, output: Any, path: str = path) -> None:
            note(path, "output", output)

        handles.append(part.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(part.register_forward_hook(after))
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def position_axis(tensor: Tensor, shape: Sequence[int]) -> int | None:
    """The first axis of L behind that of the rows, None where there is none."""
    axes = [axis for axis in range(1, tensor.ndim) if tensor.shape[axis] == shape[1]]
    return axes[0] if axes else None


def first_difference(one: Trace, other: Trace, differs: Differs) -> str | None:
    """Path of the module where two traces part, "" being the whole model; None where they never do.

    Modules that were not called equally often are passed over: which calls belong together is not known.
    """
    calls, twin_calls = one.calls(), other.calls()
    for key, tensor in one.tensors.items():
        path, kind = key[:2]
        twin = other.tensors.get(key)
        if twin is None or twin.shape != tensor.shape or calls[path, kind] != twin_calls[path, kind]:
            continue
        if differs(tensor, twin):
            return path if kind == "output" else one.holders[path]
    return None


def join(pieces: Sequence[Mapping[Name, Tensor]]) -> dict[Name, Tensor]:
    """One after the other along the positions, what all pieces have in the same rows and width."""
    joined = {}
    for name in pieces[0] if pieces else ():
        parts = [piece[name] for piece in pieces if name in piece]
        if len(parts) == len(pieces) and len({(len(part), part.shape[2:]) for part in parts}) == 1:
            joined[name] = torch.cat(parts, dim=1)
    return joined


def unequal(one: Tensor, other: Tensor) -> Tensor:
    """(B, L) bool: any difference at all, NaN being equal to itself."""
    return (~_same(one, other)).any(dim=-1)


def distance(one: Tensor, other: Tensor) -> Tensor:
    """(B, L): largest difference of each position, relative to the root mean square of `one`.

    Noise in place of trained weights gives vectors of any size; rounding grows with them, faults with them too.
    Integers are names: they are the same or infinitely far apart.
    """
    same = _same(one, other)
    if not one.is_floating_point():
        return torch.where(same, 0.0, torch.inf).double().amax(dim=-1)
    one, other = one.double(), other.double()
    finite = one[one.isfinite()]
    scale = finite.square().mean().sqrt() if len(finite) else one.new_ones(())
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    return ((one - other).abs() / scale).masked_fill(same, 0.0).amax(dim=-1)


def _same(one: Tensor, other: Tensor) -> Tensor:
    return (one == other) | ((one != one) & (other != other))


def _fits(tensor: Tensor, shape: Sequence[int], axis: int) -> bool:
    return tensor.ndim > axis and tensor.shape[0] == shape[0] and tensor.shape[axis] == shape[1]


def _holders(module: nn.Module) -> dict[str, str]:
    """For every module the nearest one above it that computes; lists of modules compute nothing."""
    parts = dict(module.named_modules())
    lists = {path for path, part in parts.items() if isinstance(part, nn.ModuleList | nn.ModuleDict)}
    holders = {}
    for path in parts:
        above = path.rpartition(".")[0]
        while above in lists and above:
            above = above.rpartition(".")[0]
        holders[path] = above
    return holders


def _numbers(values: Any) -> Iterator[Tensor]:
    """Floating tensors inside mappings, sequences and dataclasses, in their order."""
    if isinstance(values, Tensor):
        if values.is_floating_point() and values.numel():
            yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _numbers(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _numbers(value)
    elif dataclasses.is_dataclass(values) and not isinstance(values, type):
        for entry in dataclasses.fields(values):
            yield from _numbers(getattr(values, entry.name))
