"""How many parameters each part has, beside what the plan estimated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from nano_think.evals.report import Table

# Estimates of the plan at d_model = 384; it gives none for the router. They count what it describes, which
# is less than the layers it names add up to (docs/coverage.md), so they stand beside the counts, untested.
PLAN_ESTIMATES: dict[str, str] = {
    "embedding": "V x d (12.3M at 32k)",
    "mla": "~0.9M",
    "router": "none",
    "transformer": "~7M",
    "diffuser": "~5M",
    "state_space": "~5M",
    "total": "~30M",
}


@dataclass(frozen=True)
class Component:
    """Parameters of one part; each tensor counts for the first part that holds it."""

    name: str
    total: int
    trainable: int


@dataclass(frozen=True)
class ParameterReport:
    """Unique parameters of a module by component."""

    components: list[Component]

    @property
    def total(self) -> int:
        return sum(component.total for component in self.components)

    @property
    def trainable(self) -> int:
        return sum(component.trainable for component in self.components)

    def table(self, estimates: Mapping[str, str] = PLAN_ESTIMATES) -> Table:
        """Component, parameters, trainable, estimate; an estimate goes with the last part of a name."""
        rows: list[list[object]] = [
            [c.name, c.total, c.trainable, estimates.get(c.name.rsplit(".", 1)[-1], "")]
            for c in self.components
        ]
        rows.append(["total", self.total, self.trainable, estimates.get("total", "")])
        return Table(["component", "parameters", "trainable", "plan"], rows, formats=["", ",", ",", ""])


def count_parameters(module: nn.Module) -> ParameterReport:
    """Count unique parameters per child of `module`, in order of definition.

    Children that are containers (ModuleDict, ModuleList) are listed by their members, parameters that the
    module holds itself as "(own)". A tensor that several parts share counts once, for the first.
    Works on the meta device too.
    """
    seen: set[tuple[int, int, int]] = set()
    parts: dict[str, list[nn.Parameter]] = {"(own)": list(module.parameters(recurse=False))}
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleDict | nn.ModuleList):
            parts |= {f"{name}.{key}": list(part.parameters()) for key, part in child.named_children()}
        else:
            parts[name] = list(child.parameters())
    components = []
    for name, parameters in parts.items():
        total = trainable = 0
        for parameter in parameters:
            key = _identity(parameter)
            if key not in seen:
                seen.add(key)
                total += parameter.numel()
                trainable += parameter.numel() * parameter.requires_grad
        if total or name != "(own)":
            components.append(Component(name, total, trainable))
    return ParameterReport(components)


def _identity(parameter: nn.Parameter) -> tuple[int, int, int]:
    """Equal for two views of the same numbers; the storage object tells, as meta tensors have no address."""
    return (parameter.untyped_storage()._cdata, int(parameter.storage_offset()), parameter.numel())
