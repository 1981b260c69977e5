"""`resume=auto` for run folders: a command that did not end goes on in the folder that it began."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from nano_think.config import override_name
from nano_think.files import read_json, sole_owner
from nano_think.phases.disk import check_writable

MANIFEST = "manifest.json"
# Flags of Hydra.
NOTHING_RUNS = {"-c", "--cfg", "-i", "--info", "-h", "--help", "--hydra-help", "--version", "-sc"}
NOTHING_RUNS.add("--shell-completion")
MULTIRUN = {"-m", "--multirun"}
_DECIDING = ("run.root", "run.dir", "hydra.run.dir", "resume")


def continued(arguments: list[str]) -> list[str]:
    """Checked arguments, with run.dir= where the same ones began a run that did not end and nobody works on.

    Raises UserError where nothing can be written, for a command that runs anything.
    """
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    given = {key: _value(override) for override in overrides if (key := override_name(override)) in _DECIDING}
    root = Path(str(given.get("run.root", "outputs")))
    if not NOTHING_RUNS.intersection(arguments):
        check_writable(root)
    if (NOTHING_RUNS | MULTIRUN).intersection(arguments):
        return arguments
    if {"run.dir", "hydra.run.dir"} & set(given) or given.get("resume") == "never":
        return arguments
    folder = unfinished(root, overrides)
    if folder is None:
        return arguments
    quoted = str(folder).replace("'", r"\'")
    return [*arguments, f"run.dir='{quoted}'"]


def unfinished(root: Path, overrides: list[str]) -> Path | None:
    """The folder of the newest run of `overrides` below `root`, None if it ended or is at work."""
    newest: tuple[float, Path, str] | None = None
    for path in root.glob(f"runs/*/*/{MANIFEST}"):
        manifest = read_manifest(path)
        typed = [o for o in manifest.get("command", [])[1:] if override_name(o) != "run.dir"]
        if manifest and typed == overrides:
            changed = path.stat().st_mtime
            newest = max(newest or (0.0, path.parent, ""), (changed, path.parent, manifest.get("status", "")))
    if newest is None or newest[2] == "done":
        return None
    with sole_owner(newest[1]) as free:
        return newest[1] if free else None


def what_stays(folder: Path) -> dict[str, Any]:
    """What the manifest of a run keeps when it goes on: what its fits took, and how often it was started."""
    before = read_manifest(folder / MANIFEST)
    return {"starts": before.get("starts", 0) + 1, **({"fits": before["fits"]} if "fits" in before else {})}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a run, empty where there is none or it is damaged: such a run is nobody's to go on with."""
    with contextlib.suppress(OSError, ValueError):
        manifest = read_json(path)
        if isinstance(manifest, dict) and _is_sound(manifest):
            # half a surrogate pair could not be written again
            json.dumps(manifest, ensure_ascii=False).encode()
            return manifest
    return {}


def _is_sound(manifest: dict[str, Any]) -> bool:
    command, fits = manifest.get("command", []), manifest.get("fits", {})
    if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
        return False
    if not isinstance(fits, dict) or not all(isinstance(known, dict) for known in fits.values()):
        return False
    return isinstance(manifest.get("status", ""), str) and type(manifest.get("starts", 0)) is int


def _value(override: str) -> Any:
    return OverridesParser.create().parse_override(override).value()
