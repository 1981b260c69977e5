"""Which parameters an optimizer treats alike: their weight decay and their learning-rate factor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

# Linear layers that do not map hidden to hidden units: router, step sizes, one output a token.
SMALL_OR_OUTPUT = frozenset({"router", "dt_proj", "head", "lm_head"})


class Role(NamedTuple):
    """How one trainable parameter is to be optimised."""

    name: str
    parameter: nn.Parameter
    decayed: bool
    hidden_matrix: bool


def roles(module: nn.Module) -> Iterator[Role]:
    """The role of every trainable parameter of `module`, each once even where it is tied.

    Decayed: tensors of two and more dimensions that are no embedding table and carry no `_no_weight_decay`
    mark. Hidden matrix: the weight of a Linear that maps hidden units to hidden units.
    """
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    linear = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            marked = getattr(parameter, "_no_weight_decay", False)
            table = id(parameter) in tables
            inner = id(parameter) in linear and SMALL_OR_OUTPUT.isdisjoint(name.split("."))
            yield Role(
                name,
                parameter,
                decayed=parameter.ndim > 1 and not table and not marked,
                hidden_matrix=inner and not table,
            )


def parameter_groups(
    module: nn.Module,
    lr: float,
    weight_decay: float,
    lr_scale: Mapping[str, float] | None = None,
    hidden_matrices: bool | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups {name, params, lr, weight_decay} of the trainable parameters of `module`.

    lr_scale: factor on the learning rate by prefix of the parameter name, at a dot ("router" covers
    router.weight); each prefix has groups of its own and the longest that fits wins.
    hidden_matrices: only the hidden matrices (True), only the rest (False), or all (None).
    Raises ValueError for a prefix that no parameter has.
    """
    lr_scale = dict(lr_scale or {})
    names = [name for name, _ in module.named_parameters()]
    for prefix in lr_scale:
        if not any(_starts_with(name, prefix) for name in names):
            raise ValueError(f"lr_scale names {prefix!r}, but no parameter's name starts with it")
    groups: dict[str, dict[str, Any]] = {}
    for role in roles(module):
        if hidden_matrices not in (None, role.hidden_matrix):
            continue
        prefix = max((p for p in lr_scale if _starts_with(role.name, p)), key=len, default="")
        label = f"{prefix or 'model'}/{'decay' if role.decayed else 'no_decay'}"
        group = groups.setdefault(
            label,
            {
                "name": label,
                "params": [],
                "lr": lr * lr_scale.get(prefix, 1.0),
                "weight_decay": weight_decay if role.decayed else 0.0,
            },
        )
        group["params"].append(role.parameter)
    return list(groups.values())


def adamw(
    module: nn.Module,
    lr: float,
    weight_decay: float,
    lr_scale: Mapping[str, float] | None = None,
    betas: tuple[float, float] = (0.9, 0.95),
    fused: bool = True,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) over the trainable parameters of `module`."""
    groups = parameter_groups(module, lr, weight_decay, lr_scale)
    if not groups:
        raise ValueError("the module has no trainable parameter: unfreeze a part before making an optimizer")
    return torch.optim.AdamW(
        groups, lr=lr, weight_decay=weight_decay, betas=(betas[0], betas[1]), fused=fused
    )


def _starts_with(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")
