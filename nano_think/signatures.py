"""What a class that a setting names takes: its keywords, and of which type each of them is."""

from __future__ import annotations

import importlib
import inspect
import math
import types
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from nano_think.errors import UserError

# Plain types as the message calls them. A whole number is a number, a truth value is neither.
PLAIN = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}
# Nodes of which null means "not said" whatever the keyword.
NULL_IS_UNSET = ("trainer", "optimizer")
UNSET = "???"


def located(target: str) -> Any:
    """The class or function at a dotted path; raises UserError where there is none."""
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(
            f"there is no {short(target)}: name a class or function by its dotted path"
        ) from error
    if not callable(found):
        raise UserError(f"{short(target)} is no class or function: name one by its dotted path")
    return found


@lru_cache
def parameters(target: Any) -> list[inspect.Parameter]:
    """The parameters of a class or function."""
    return list(inspect.signature(target).parameters.values())


def nodes(values: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping below plain values that names a class, with its dotted path."""
    if isinstance(values, Mapping):
        if "_target_" in values:
            yield path, dict(values)
        for key, child in values.items():
            yield from nodes(child, f"{path}.{key}".lstrip("."))


def check_keywords(values: Mapping[str, Any], groups: Iterable[str]) -> None:
    """Raise UserError for a keyword below `groups` that its class does not know, or a value of another type."""
    for path, node in nodes({group: values.get(group) for group in groups}):
        if not isinstance(node["_target_"], str):
            raise UserError(f"{path}._target_={short(node['_target_'])} must be a text, the path of a class")
        try:
            target = located(node["_target_"])
        except UserError as error:
            raise UserError(f"{path}._target_: {error}") from error
        hints, known = _hints(target), parameters(target)
        names = [p.name for p in known if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
        more = any(p.kind is p.VAR_KEYWORD for p in known)
        for key, value in node.items():
            if str(key).startswith("_") or value == UNSET:
                continue
            if key not in names and not more:
                raise UserError(
                    f"{path}.{key} is no setting of {node['_target_']}: it has {', '.join(names)}"
                )
            if value is None and path.split(".")[0] in NULL_IS_UNSET:
                continue
            if not fits(value, hints.get(key, Any)):
                raise UserError(f"{path}.{key}={short(value)} must be {named(hints[key])}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value can be meant by an annotation; what is no plain type takes anything."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(value == argument and type(value) is type(argument) for argument in arguments)
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if hint in PLAIN:
        return type(value) is hint
    if (origin is tuple and len(arguments) == 2 and arguments[1] is not Ellipsis) or (
        origin is tuple and not arguments
    ):
        pairs = (
            zip(value, arguments, strict=True)
            if isinstance(value, list) and len(value) == len(arguments)
            else ()
        )
        return isinstance(value, list) and len(value) == len(arguments) and all(fits(v, a) for v, a in pairs)
    return True


def named(hint: Any) -> str:
    """An annotation in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(named(argument) for argument in arguments))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        return f"a list of {len(arguments)} of {named(arguments[0])}" if arguments else "a list"
    if hint is type(None):
        return "null"
    return PLAIN.get(hint, getattr(hint, "__name__", str(hint)))


def short(value: Any, length: int = 60) -> str:
    """A value as it is shown in a message: on one line, cut where it is long."""
    text = str(value)
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: length + 1])
    return text if len(text) <= length else text[:length] + "..."


@lru_cache
def _hints(target: Any) -> dict[str, Any]:
    """Annotations of a callable, none where they name what is there for type checkers only."""
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError, AttributeError):
        return {}
