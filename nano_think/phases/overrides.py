"""Overrides as texts: what they speak of, and how values are written as one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from nano_think.config import override_name


def last_of_each(overrides: Iterable[str]) -> list[str]:
    """Of several overrides of one key the last: Hydra takes a group only once."""
    return list({override_name(override): override for override in overrides}.values())


def of_other_expert(override: str, expert: str | None) -> bool:
    """Whether an override speaks of an expert that a command for `expert` does not know.

    Each expert's settings come with the Transformer's, which it may need as teacher or for its table.
    """
    group, _, rest = override_name(override).partition(".")
    if expert in (None, "all") or group not in ("experts", "training", "per_size", "prereq"):
        return False
    phases = ("data", "tokenizer", "expert") if group == "prereq" else ()
    return rest.split(".")[0] not in (expert, "transformer", "mla", *phases)


def literal(value: Any) -> str:
    """A plain value as Hydra's override grammar reads it back."""
    if isinstance(value, str) and re.fullmatch(r"[\w./:+-]+", value):
        return value
    return json.dumps(value, ensure_ascii=False)


def leaves_of(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested mappings as dotted keys."""
    leaves: list[tuple[str, Any]] = []
    for key, value in (node or {}).items():
        path = f"{prefix}{key}"
        leaves += leaves_of(value, f"{path}.") if isinstance(value, dict) else [(path, value)]
    return leaves
