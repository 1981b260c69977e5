"""A folder that is rewritten as a whole: numbered generations and a CURRENT file that names the valid one.

Every generation is complete and carries the SHA-256 of its files. One process writes at a time; a kill at any
moment leaves CURRENT at a complete generation, the old or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nano_think.errors import UserError, brief
from nano_think.files import atomic_dir, atomic_write, read_json, remove_abandoned, remove_dir

_KEPT = 2


@contextlib.contextmanager
def new_generation(root: str | Path, manifest: dict[str, Any]) -> Iterator[Path]:
    """Yield a folder to fill; when the block ends it becomes the current generation of `root`.

    manifest.json with `manifest` and the hashes is written here. The last two generations stay, so that a
    reader who has just read CURRENT still finds its files.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    name = _name(max(_numbers(root), default=0) + 1)
    with atomic_dir(root / name) as folder:
        yield folder
        files = {file.name: _sha256(file) for file in sorted(folder.iterdir())}
        (folder / "manifest.json").write_text(json.dumps(manifest | {"files": files}, indent=2) + "\n")
    atomic_write(root / "CURRENT", name + "\n")
    for number in sorted(_numbers(root))[:-_KEPT]:
        remove_dir(root / _name(number))
    remove_abandoned(root)


def current_generation(root: str | Path) -> tuple[Path, dict[str, Any]]:
    """Folder and manifest that CURRENT names, after comparing every file with its hash.

    Raises:
        UserError: there is no generation, or it is damaged.
    """
    root = Path(root)
    try:
        name = (root / "CURRENT").read_bytes().strip()
    except OSError:
        raise UserError(f"nothing has been saved in {root}: build it first, or name another folder") from None
    if not re.fullmatch(rb"generation-[0-9]{6,12}", name):
        raise UserError(f"{root / 'CURRENT'} is damaged and names no generation: build it again")
    folder = root / name.decode()
    try:
        manifest = read_json(folder / "manifest.json")
        listed, there = manifest["files"], {file.name for file in folder.iterdir()}
        # what lies there and is not listed nobody wrote, and it would be read all the same
        damaged = sorted(there - set(listed) - {"manifest.json"})
        damaged += [
            file for file in sorted(listed) if file not in there or _sha256(folder / file) != listed[file]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        damaged = ["manifest.json or a file that it names"]
    if damaged:
        raise UserError(f"{folder} is damaged ({brief(', '.join(damaged))}): build it again")
    return folder, manifest


def _name(number: int) -> str:
    return f"generation-{number:06d}"


def _numbers(root: Path) -> list[int]:
    matches = (re.fullmatch(r"generation-(\d+)", path.name) for path in root.iterdir())
    return [int(match[1]) for match in matches if match]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
