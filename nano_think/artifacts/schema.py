"""The description of a model on disk, `spec.json`: its schema, and how an older one becomes the present one.

Schema N + 1 comes into being with a file `migrations/from_N.py`, which may hold

    def spec(description): ...     the description of schema N as one of schema N + 1
    def weights(tensors): ...      likewise the tensors by name, where parameters were renamed or reshaped

Both may raise ValueError, saying why, where a model of schema N cannot be converted. Nothing else is edited: the
present schema is one above the highest N. Schema 0 is that of models that state none.
"""

from __future__ import annotations

import math
import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from nano_think.artifacts import migrations
from nano_think.errors import UserError, brief
from nano_think.files import read_json

KINDS = {"expert": "expert", "nano_think": "model"}
LONGEST_CONTEXT = 1 << 24
NAME = re.compile(r"\w[\w .-]{0,99}")


def current() -> int:
    """The schema that this version of the code writes."""
    names = (module.name for module in pkgutil.iter_modules(migrations.__path__))
    return 1 + max(int(name.removeprefix("from_")) for name in names)


def read_spec(path: Path, how_to_make: str) -> tuple[dict[str, Any], int]:
    """The description of the checkpoint in a folder in the present schema, and the schema it was written in.

    Raises UserError naming `how_to_make` where there is none that this version can read.
    """
    if not path.exists():
        raise UserError(f"there is no checkpoint at {path}: make it with `{how_to_make}`")
    try:
        spec = read_json(path / "spec.json")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a nano_think checkpoint (no readable spec.json): make one with `{how_to_make}`"
        ) from error
    written, present = _schema_of(spec), current()
    if written is None:
        raise UserError(f"{path} is not a nano_think checkpoint: make one with `{how_to_make}`")
    if written > present:
        raise UserError(
            f"{path} was written by a newer nano_think (schema {written}, this version reads up to {present}):"
            f" update nano_think, or make it again with `{how_to_make}`"
        )
    try:
        for step in _steps(written):
            spec = getattr(step, "spec", dict)(spec)
        _check(spec)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        why = f"{type(error).__name__}: {brief(error)}"
        raise UserError(
            f"{path} has a spec.json of schema {written} that cannot be read ({why}): "
            f"make it again with `{how_to_make}`"
        ) from error
    return spec, written


def migrated(tensors: dict[str, Tensor], written: int) -> dict[str, Tensor]:
    """Tensors of a model of schema `written` as they are called and shaped now; ValueError where that fails."""
    for step in _steps(written):
        tensors = getattr(step, "weights", dict)(tensors)
    return tensors


def _steps(written: int) -> Iterator[ModuleType]:
    """The migrations that lead from a schema to the present one."""
    for version in range(written, current()):
        yield import_module(f"{migrations.__name__}.from_{version}")


def _schema_of(spec: Any) -> int | None:
    """The schema of a description, None where it is none."""
    if not isinstance(spec, dict) or "kind" not in spec:
        return None
    schema = spec.get("schema", 0)
    return schema if type(schema) is int and schema >= 0 else None


def _check(spec: dict[str, Any]) -> None:
    """Raise ValueError for a description that could not be one of ours, whatever its networks are."""
    kind, seq_len = spec["kind"], spec["seq_len"]
    if kind not in KINDS:
        raise ValueError(f"the kind is {kind!a}, not {' or '.join(KINDS)}")
    if type(seq_len) is not int or not 1 <= seq_len <= LONGEST_CONTEXT:
        raise ValueError(f"seq_len is {seq_len!a:.40}")
    if kind == "expert" and not (isinstance(spec["name"], str) and NAME.fullmatch(spec["name"])):
        raise ValueError(f"the name is {spec['name']!a:.40}")
    if not isinstance(spec[KINDS[kind]], dict):
        raise ValueError(f"{KINDS[kind]} is no description of a network")
    if not all(math.isfinite(number) for number in _floats(spec)):
        raise ValueError("it holds a number that is not finite")


def _floats(value: Any) -> Iterator[float]:
    """All of them in a plain value."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _floats(part)
