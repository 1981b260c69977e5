"""A network from a spec and weights that may be anybody's, in no more memory than the weights themselves justify.

The spec is first built without numbers, on torch's meta device, while everything that it asks for is counted. Only
if names, shapes and types of what came of it are those of the weights is it built again, with numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_args, get_type_hints

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

from nano_think.artifacts.build import MARKS, build, locate
from nano_think.artifacts.outline import outlined
from nano_think.errors import brief
from nano_think.signatures import fits

# What a network may ask for besides its weights (tables of noise and angles, drafts of initial values): numbers,
# and operations and parts for each of its tensors. Ours take less than 4 M numbers, 20 operations and 6 parts.
SPARE_NUMBERS, NUMBERS_EACH = 1 << 26, 16
SPARE_OPERATIONS, OPERATIONS_EACH = 3_000, 100
SPARE_PARTS, PARTS_EACH = 256, 32


class _Counted(TorchFunctionMode):
    """Raises ValueError once the operations in its block have made too many numbers, or are too many.

    What changes a tensor in place, or only looks at it, makes none.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.numbers = SPARE_NUMBERS + NUMBERS_EACH * sum(tensor.numel() for tensor in weights.values())
        self.operations = SPARE_OPERATIONS + OPERATIONS_EACH * len(weights)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made, given = func(*args, **kwargs), {id(part) for part in (*args, *kwargs.values())}
        self.operations -= 1
        parts = made if isinstance(made, tuple | list) else [made]
        self.numbers -= sum(p.numel() for p in parts if isinstance(p, Tensor) and id(p) not in given)
        if self.operations < 0 or self.numbers < 0:
            raise ValueError("the spec asks for far more than its weights hold")
        return made


@contextmanager
def _few_parts(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Raise ValueError in the block once it makes more modules and parameters than the weights are for."""
    left = SPARE_PARTS + PARTS_EACH * len(weights)

    def count(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("the spec asks for far more parts than its weights have")

    handles = [
        torch_module.register_module_parameter_registration_hook(count),
        torch_module.register_module_module_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def restore(spec: Any, weights: Mapping[str, Tensor], usable: Callable[[Any], bool]) -> nn.Module:
    """The network of `spec` with `weights`, strictly.

    usable: whether what was built is of the kind that is wanted.
    Raises ValueError where the spec cannot be built, describes something else, or does not fit the weights.
    """
    with _few_parts(weights):
        try:
            _check_types(spec)
            with outlined(), _Counted(weights):
                described = build(spec)
        except Exception as error:  # a constructor that is given anything raises anything
            raise ValueError(f"{type(error).__name__}: {brief(error)}") from error
        if not isinstance(described, nn.Module) or not usable(described):
            raise ValueError(f"the spec describes a {type(described).__name__}, which is no such model")
        _same_tensors(described.state_dict(), weights)
        network = build(spec)
    network.load_state_dict(weights)
    return network


def _check_types(spec: Any) -> None:
    """Raise ValueError for an argument of another plain type than its class states.

    Not every constructor would notice: a text for a number of steps fails when the steps are taken.
    """
    for part in spec.values() if isinstance(spec, dict) else spec if isinstance(spec, list) else ():
        _check_types(part)
    if isinstance(spec, dict) and "_target_" in spec:
        target = locate(spec["_target_"])
        hints = get_type_hints(target.__init__)
        for name, value in spec.items():
            hint = hints.get(name, Any)
            if name not in MARKS and not (fits(value, hint) and _counts(value, hint)):
                raise ValueError(
                    f"{brief(name, 40)}={brief(value, 40)} is nothing that {target.__name__} takes"
                )


def _counts(value: Any, hint: Any) -> bool:
    """Whether a whole number can be a size, a count or a seed: none is negative or beyond what is counted to."""
    if type(value) is not int:
        return True
    return 0 <= value < 1 << 63 or (float in (hint, *get_args(hint)) and abs(value) < 1 << 53)


def _same_tensors(described: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError naming the first tensor in which the two differ."""
    if missing := sorted(set(described) - set(weights)):
        raise ValueError(f"{len(missing)} tensors are missing, {missing[0]!a} first")
    if unknown := sorted(set(weights) - set(described)):
        raise ValueError(f"{len(unknown)} tensors are not the model's, {unknown[0]!a} first")
    for name, tensor in described.items():
        said, found = ((tuple(t.shape), t.dtype) for t in (tensor, weights[name]))
        if said != found:
            raise ValueError(f"{name!a} is {found[1]} {found[0]}, the spec says {said[1]} {said[0]}")
