"""Networks from plain values: the `_target_` / `_partial_` notation of the configs, without Hydra.

A saved model carries its spec in this notation. Only network classes of `nano_think` and `torch.nn` can be named,
so that loading somebody's checkpoint cannot run somebody's code: a function of our own that writes files would
be enough for that.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from nano_think.errors import UserError

ALLOWED_PREFIXES = ("nano_think.", "torch.nn.")


def locate(path: str) -> Any:
    """The subclass of nn.Module at a dotted path, refused outside `ALLOWED_PREFIXES`.

    Raises ValueError for a foreign or unknown path. Private names, functions, other classes and re-exports of
    other packages are foreign.
    """
    if not path.startswith(ALLOWED_PREFIXES) or any(part.startswith("_") for part in path.split(".")):
        raise ValueError(f"'{path}' is outside {' and '.join(ALLOWED_PREFIXES)}: such a spec is not built")
    module_path, _, name = path.rpartition(".")
    try:
        target = getattr(importlib.import_module(module_path), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"there is no '{path}' in this version of the code") from error
    network = inspect.isclass(target) and issubclass(target, nn.Module)
    if not network or not target.__module__.startswith(ALLOWED_PREFIXES):
        raise ValueError(f"'{path}' is not a network class of {' or '.join(ALLOWED_PREFIXES)}")
    return target


def build(spec: Any, **kwargs: Any) -> Any:
    """Build what a spec describes: mappings with `_target_` become objects, all else is taken as it stands.

    kwargs: added to the outermost call, the way a parent hands `d_model` to its parts.
    """
    if isinstance(spec, Mapping):
        values = {key: build(value) for key, value in spec.items() if key not in ("_target_", "_partial_")}
        if "_target_" not in spec:
            return {**values, **kwargs}
        target = locate(spec["_target_"])
        return partial(target, **values, **kwargs) if spec.get("_partial_") else target(**values, **kwargs)
    if isinstance(spec, list | tuple):
        return [build(value) for value in spec]
    return spec


def check(spec: Any, where: str) -> None:
    """Build `spec` without allocating numbers; raises UserError naming `where` for values that cannot be built.

    A mistake then shows before anything is trained, not when its part is reached.
    """
    try:
        with torch.device("meta"):
            build(spec)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}") from error


def complete(spec: Any) -> Any:
    """The spec with every signature default written out, so that a later change of a default changes nothing."""
    if isinstance(spec, Mapping):
        values = {key: complete(value) for key, value in spec.items()}
        if "_target_" in spec and not spec.get("_partial_"):
            values = {**signature_defaults(locate(spec["_target_"])), **values}
        return values
    if isinstance(spec, list | tuple):
        return [complete(value) for value in spec]
    return spec


def signature_defaults(target: Any) -> dict[str, Any]:
    """Keyword defaults of a callable that are plain values (numbers, strings, booleans, None, lists of these)."""
    defaults: dict[str, Any] = {}
    for name, parameter in inspect.signature(target).parameters.items():
        default = parameter.default
        if default is None or isinstance(default, bool | int | float | str):
            defaults[name] = default
        elif isinstance(default, list | tuple) and parameter.default is not inspect.Parameter.empty:
            defaults[name] = list(default)
    return defaults
