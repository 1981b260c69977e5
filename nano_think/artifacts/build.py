"""Networks from plain values: the `_target_` / `_partial_` notation of the configs, without Hydra.

A saved model carries its spec in this notation. Only network classes of our network packages and layers of torch
can be named, so that loading somebody's checkpoint cannot run somebody's code: a function of our own that writes
files would be enough for that.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from nano_think.artifacts.outline import outlined
from nano_think.errors import UserError

ALLOWED = ("nano_think.experts.", "nano_think.nn.", "nano_think.mla.", "nano_think.model.", "torch.nn.")
# torch.nn has more below it than layers: process groups, parametrisations, functions
ALLOWED_OF_TORCH = "torch.nn.modules."
DOTTED = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z][A-Za-z0-9_]*)+")
MARKS = ("_target_", "_partial_")


def locate(path: Any) -> Any:
    """The network class at a dotted path; nothing else is imported to find out.

    Raises ValueError for a foreign or unknown path. Private names, functions, other classes and re-exports of
    other packages are foreign.
    """
    if not isinstance(path, str) or not DOTTED.fullmatch(path) or not path.startswith(ALLOWED):
        raise ValueError(f"{_short(path)} is outside {', '.join(ALLOWED)}: such a spec is not built")
    module_path, _, name = path.rpartition(".")
    if path.startswith("torch.") and module_path != "torch.nn" and not path.startswith(ALLOWED_OF_TORCH):
        raise ValueError(
            f"{_short(path)} is outside torch.nn and {ALLOWED_OF_TORCH}: such a spec is not built"
        )
    try:
        target = getattr(importlib.import_module(module_path), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"there is no {_short(path)} in this version of the code") from error
    home = target.__module__ + "." if inspect.isclass(target) and issubclass(target, nn.Module) else ""
    if not home.startswith((*ALLOWED[:-1], ALLOWED_OF_TORCH)):
        raise ValueError(f"{_short(path)} is not a network class of {', '.join(ALLOWED)}")
    return target


def build(spec: Any, **kwargs: Any) -> Any:
    """Build what a spec describes: mappings with `_target_` become objects, all else is taken as it stands.

    kwargs: added to the outermost call, the way a parent hands `d_model` to its parts.
    Raises ValueError for a target that `locate` refuses and for arguments with private names.
    """
    if isinstance(spec, Mapping):
        target = locate(spec["_target_"]) if "_target_" in spec else None
        partially = spec.get("_partial_", False)
        private = [
            key for key in spec if not isinstance(key, str) or (key.startswith("_") and key not in MARKS)
        ]
        if private or not isinstance(partially, bool) or (target is None and "_partial_" in spec):
            raise ValueError(f"{_short(private or ['_partial_'])} has no meaning in a spec: leave it out")
        values = {key: build(value) for key, value in spec.items() if key not in MARKS}
        if target is None:
            return {**values, **kwargs}
        return partial(target, **values, **kwargs) if partially else target(**values, **kwargs)
    if isinstance(spec, list | tuple):
        return [build(value) for value in spec]
    return spec


def _short(value: Any) -> str:
    """A value of somebody's file in one line that is not too long, with nothing a terminal would obey."""
    text = ascii(value)
    return text if len(text) <= 120 else f"{text[:100]}...{text[-10:]}"


def check(spec: Any, where: str) -> Any:
    """What `spec` describes, without numbers; raises UserError naming `where` for values that cannot be built.

    A mistake then shows before anything is trained, not when its part is reached.
    """
    try:
        with outlined():
            return build(spec)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from error


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
    """Keyword defaults of a callable that are plain values (numbers, strings, booleans, None, lists of these).

    Those of private arguments are its own business.
    """
    defaults: dict[str, Any] = {}
    for name, parameter in inspect.signature(target).parameters.items():
        default = parameter.default
        if name.startswith("_"):
            continue
        if default is None or isinstance(default, bool | int | float | str):
            defaults[name] = default
        elif isinstance(default, list | tuple) and parameter.default is not inspect.Parameter.empty:
            defaults[name] = list(default)
    return defaults
