"""What an artefact was made from, and whether it and that are still what they were: `provenance.json`.

    kind, hash, spec, needs   the lineage: the recipe, and the lineages of all that it was made from
    files                     the hash of every file in the folder
    content                   one hash of those; in `needs`, what the thing was when it was used
    made_by, seconds, result  code, libraries and machine, how long it took, what came of it

A folder whose files are not those that are listed is damaged or was exchanged. So is what it was made from where
its content is no longer the one used: a mixture would then be compared with experts that are not in it. Folders
made before hashes were kept, and models that somebody saved by hand, claim nothing that could be checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nano_think.errors import UserError, brief
from nano_think.files import hash_file, hash_json, read_json

FILE = "provenance.json"
# What a kind or a hash, each the name of a folder, looks like.
PLAIN = re.compile(r"\w[\w.-]{0,99}")
# What is read below a folder although its spec does not name it: it must have come with the rest.
READ_IF_THERE = "memory"


def fingerprints(folder: Path) -> dict[str, str]:
    """The hash of every file below `folder` but the provenance itself, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): hash_file(path) for path in files if path.name != FILE}
    return hashes


def content_of(folder: Path) -> str:
    """The content hash of an artefact: the one it was given when it was made, else that of its files now."""
    return read(folder).get("content") or hash_json(fingerprints(folder))


def read(folder: Path) -> dict[str, Any]:
    """The provenance in a folder; empty for a model that somebody saved by hand.

    Raises UserError where it is there and no such thing.
    """
    if not (folder / FILE).exists():
        return {}
    try:
        provenance = read_json(folder / FILE)
        _check(provenance)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{folder / FILE} is damaged ({brief(error)}): delete its folder and make it again"
        ) from error
    return provenance


def verify(folder: Path, provenance: dict[str, Any], largest: float = float("inf")) -> None:
    """Raise UserError where a file below `folder` is not the one that the provenance lists.

    largest: bytes of the files that are compared; whoever reads the larger ones compares them then.
    """
    listed = provenance.get("files")
    if listed is None:
        return
    for name, digest in listed.items():
        path, shown = folder / name, f"{folder}/{brief(name)}"
        try:
            same = path.stat().st_size > largest or hash_file(path) == digest
        except (OSError, ValueError) as error:
            raise UserError(
                f"{shown} is missing or cannot be read: delete its folder and make it again"
            ) from error
        if not same:
            raise UserError(
                f"{shown} is not the file that {folder} was made with (damaged or exchanged): "
                "delete the folder and make it again"
            )
    for path in (folder / READ_IF_THERE).rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in listed:
            raise UserError(
                f"{path} does not belong to {folder}: remove it, or delete the folder and make it again"
            )


def verify_needs(root: Path, provenance: dict[str, Any]) -> None:
    """Raise UserError where something this was made from lies below `root` with another content than it had.

    What is no longer there cannot be misused and is not missed.
    """
    for need in _lineage(provenance):
        folder = root / need["kind"] / need["hash"]
        if (folder / FILE).is_file() and content_of(folder) != need["content"]:
            kind, digest = provenance["kind"], provenance["hash"]
            raise UserError(
                f"{need['kind']} {need['hash']} is no longer what {kind} {digest} was made from: delete "
                f"{root / kind / digest}, and the same command makes it anew"
            )


def root_of(folder: Path, provenance: dict[str, Any]) -> Path | None:
    """The folder of all artefacts if `folder` is one that lies in its place, else None."""
    place = (folder.parent.name, folder.name)
    return folder.parent.parent if place == (provenance.get("kind"), provenance.get("hash")) else None


def _lineage(provenance: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All needs with a content, and their needs."""
    for need in provenance.get("needs", {}).values():
        if "content" in need:
            yield need
        yield from _lineage(need)


def _check(provenance: Any) -> None:
    """Raise ValueError, TypeError or LookupError for what is no provenance."""
    if not isinstance(provenance, dict):
        raise ValueError("no mapping")
    if {"kind", "hash", "needs"} & set(provenance):
        _check_lineage(provenance)
    files = provenance.get("files", {})
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        raise ValueError("files are no hashes by name")
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name!a} lies outside the folder")


def _check_lineage(node: Any) -> None:
    for key in ("kind", "hash", *(["content"] if "content" in node else [])):
        if not isinstance(node[key], str) or not PLAIN.fullmatch(node[key]):
            raise ValueError(f"{key} is {node[key]!a:.60}")
    for need in node["needs"].values():
        _check_lineage(need)
