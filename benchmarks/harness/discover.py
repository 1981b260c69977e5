"""Groups are the files of the benchmark folder; a new file is a new group."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from benchmarks.harness.case import Group, Options

FOLDER = Path(__file__).resolve().parents[1]


def group_files(folder: Path = FOLDER) -> dict[str, str]:
    """Name and first docstring line of every group, sorted."""
    files = sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))
    return {path.stem: path.read_text().split('"""', 2)[1].strip().splitlines()[0] for path in files}


def load_group(name: str, options: Options) -> Group:
    """The group of the file with that name."""
    return import_module(f"benchmarks.{name}").group(options)
