"""Where a forward and backward pass first stops being finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def first_nonfinite(network: nn.Module, loss: Callable[[], Tensor]) -> str | None:
    """What of `network` is the first to be NaN or infinite when `loss()` and its gradient are computed.

    Looked at in this order: parameters, outputs of modules as they are made (a part before the whole that it
    belongs to), buffers where only the loss shows them, the loss, and gradients as they flow back. Returns it in
    words with the module's dotted name; None where all is finite. No gradient is left behind.
    """
    if bad := _not_finite(network.named_parameters()):
        return f"the parameter {bad[0]}"
    with _watched(network) as seen, torch.enable_grad():
        value = loss()
        if seen.output is not None:
            return f"the output of {seen.output}"
        if not _finite(value):
            bad = _not_finite(network.named_buffers())
            return f"the buffer {bad[0]}" if bad else "the loss, made of finite outputs"
        parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return seen.first_gradient(
        _not_finite((n, g) for n, g in zip(parameters, gradients, strict=True) if g is not None)
    )


def _not_finite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    return [name for name, tensor in named if not _finite(tensor)]


@dataclass(frozen=True)
class _Flow:
    """A gradient that has reached the input or the output of a module."""

    kind: str
    module: str
    tensor: int
    finite: bool


class _Seen:
    """Outputs that were not finite, and gradients in the order in which they came."""

    def __init__(self) -> None:
        self.output: str | None = None
        self.flows: list[_Flow] = []
        self.kept: list[Tensor] = []  # alive, so that no two share an id

    def first_gradient(self, bad_parameters: list[str]) -> str | None:
        """The module whose backward pass made what is not finite out of finite gradients, in words."""
        for place, flow in enumerate(self.flows):
            if flow.finite:
                continue
            before = {f.module for f in self.flows[:place] if f.kind == "output"}
            # of the modules that read this tensor, those whose own output had a finite gradient
            readers = {f.module for f in self.flows if f.kind == "input" and f.tensor == flow.tensor} & before
            inner = sorted(r for r in readers if not any(other.startswith(f"{r}.") for other in readers))
            if inner:
                return f"the gradient that {' or '.join(inner)} hands back"
            return f"the gradient at the {flow.kind} of {flow.module}"
        return f"the gradient of {bad_parameters[0]}" if bad_parameters else None


@contextmanager
def _watched(network: nn.Module) -> Iterator[_Seen]:
    """Watch every module of `network`, compiled ones without what was compiled."""
    seen, handles = _Seen(), []

    def flow(kind: str, name: str, tensor: Tensor) -> Callable[[Tensor], None]:
        seen.kept.append(tensor)
        return lambda gradient: seen.flows.append(_Flow(kind, name, id(tensor), _finite(gradient)))

    def watch(name: str, module: nn.Module) -> None:
        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            for tensor in _differentiable((args, kwargs)):
                handles.append(tensor.register_hook(flow("input", name, tensor)))

        def after(_: nn.Module, __: Any, output: Any) -> None:
            if seen.output is None and not all(
                _finite(t) for t in tree_leaves(output) if isinstance(t, Tensor)
            ):
                seen.output = name
            for tensor in _differentiable(output):
                handles.append(tensor.register_hook(flow("output", name, tensor)))

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))

    for name, module in network.named_modules():
        watch(name or type(network).__name__, module)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def _differentiable(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.requires_grad]


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach()).all())
