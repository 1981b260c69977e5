"""Whether what a run left that was killed again and again is what an undisturbed one left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

# What two runs of the same command differ in: time, memory, versions of the moment, and the folder.
VOLATILE = {"seconds", "made_by", "peak_memory_gb", "choices", "created", "cost_seconds", "tokens_per_second"}
TIMED = ("train/tokens_per_second", "train/flops_per_second", "train/mfu")


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two run roots: artefacts and published models byte by byte, curves, texts, losses.

    Also what must not be there: temporary names, unfinished work, more than one run folder.
    """
    found = [f"left behind: {path}" for path in other.rglob("*.tmp")]
    found += [f"left behind: {path}" for path in other.glob("artifacts/.work/*")]
    for part in ("artifacts", "checkpoints"):
        found += _trees(one / part, other / part)
    [mine], runs = one.glob("runs/*/*"), list(other.glob("runs/*/*"))
    if len(runs) != 1:
        return [*found, f"{len(runs)} run folders"]
    found += _trees(mine / "losses", runs[0] / "losses")
    for folder in sorted(mine.glob("tensorboard/*")):
        found += _curves(folder, runs[0] / "tensorboard" / folder.name)
    return found


def _trees(one: Path, other: Path) -> list[str]:
    """Files that only one folder has, or whose content differs."""
    names = {str(p.relative_to(root)) for root in (one, other) for p in root.rglob("*") if p.is_file()}
    return [name for name in sorted(names) if _content(one / name) != _content(other / name)]


def _content(path: Path) -> Any:
    if not path.is_file():
        return None
    if path.name == "provenance.json":
        return _steady(json.loads(path.read_text()))
    return path.read_bytes()


def _steady(value: Any) -> Any:
    """A plain value without what changes from run to run."""
    if isinstance(value, dict):
        return {key: _steady(item) for key, item in value.items() if key not in VOLATILE}
    return [_steady(item) for item in value] if isinstance(value, list) else value


def _curves(one: Path, other: Path) -> list[str]:
    """Tags whose merged events differ, in their steps or in a single bit of a value; and the texts."""
    mine, theirs = merged(one), merged(other)
    found = [f"{one.name}: {tag}" for tag in mine.keys() | theirs.keys() if mine.get(tag) != theirs.get(tag)]
    same_texts = (one / "texts.md").read_bytes() == (other / "texts.md").read_bytes()
    return sorted(found) + ([] if same_texts else [f"{one.name}: texts.md"])


def merged(folder: Path) -> dict[str, list[tuple[int, object]]]:
    """(step, value) by tag of all event files of a fit, as TensorBoard's server reads them; of what is timed only
    the steps. The layout of the dashboard, which each start writes again, is left out."""
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    return {
        tag: [
            (event.step, None if tag in TIMED else make_ndarray(event.tensor_proto).tolist())
            for event in events.Tensors(tag)
        ]
        for tag in events.Tags()["tensors"]
        if not tag.startswith("custom_scalars")
    }
