"""Schema 1 states itself and leaves out private arguments, such as the `_weight` of torch's tables."""

from __future__ import annotations

from typing import Any

MARKS = ("_target_", "_partial_")


def spec(description: dict[str, Any]) -> dict[str, Any]:
    """`description` with its schema and without private arguments that are not set."""
    return {"schema": 1, **_public(description)}


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k in MARKS or not (k.startswith("_") and not v)}
        return {key: _public(part) for key, part in kept.items()}
    if isinstance(value, list):
        return [_public(part) for part in value]
    return value
