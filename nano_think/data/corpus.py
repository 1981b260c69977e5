"""Reader of a prepared corpus directory (written by `nano_think.data.prepare`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nano_think.data.split import SPLITS
from nano_think.errors import UserError, brief
from nano_think.files import hash_file, read_json

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """One document of a prepared corpus.

    Attributes:
        uid: 63-bit content hash of the normalised text.
        cluster: the smallest uid of its near-duplicate cluster.
        text, domain, source, id: as in `Document`, the text normalised.
    """

    uid: int
    cluster: int
    text: str
    domain: str
    source: str
    id: str


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive records of one split and domain, which any process can read from the file by itself.

    Attributes:
        path: the file. split, domain: what it belongs to.
        start, stop: bytes of the file; None is its end.
    """

    path: Path
    split: str
    domain: str
    start: int
    stop: int | None

    def records(self) -> Iterator[Record]:
        """Stream the records; UserError at one that is damaged."""
        with open(self.path, "rb") as file:
            place = file.seek(self.start)
            for line in file:
                try:
                    record = _record(line)
                except (ValueError, TypeError, RecursionError) as error:
                    raise _damaged(self.path, f"at byte {place}: {brief(error)}") from error
                yield record
                place += len(line)
                if place == self.stop:
                    return


def _record(line: bytes) -> Record:
    """The record in a line; ValueError or TypeError for a line that holds none."""
    record = Record(**json.loads(line))
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in (record.uid, record.cluster)):
        raise ValueError("uid and cluster are no numbers of 63 bits")
    if not all(isinstance(text, str) for text in (record.text, record.domain, record.source, record.id)):
        raise ValueError("text, domain, source or id is no text")
    return record


def plain_name(name: Any) -> bool:
    """Whether a split's or domain's name is that of a file in its folder and of none elsewhere."""
    return isinstance(name, str) and not {"/", "\0"} & set(name) and name not in ("", ".", "..")


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} is damaged ({why}): delete the folder of its corpus and run `python train.py phase=data` again"
    )


class Corpus:
    """A prepared corpus: `dir/manifest.json`, `dir/leakage.json` and `dir/<split>/<domain>.jsonl`.

    A file is compared with its hash in the manifest before its first record is read.

    Raises:
        UserError: `path` holds no manifest; here and later, a file is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "manifest.json").is_file():
            raise UserError(f"{self.path} is not a prepared corpus: run `python train.py phase=data` first")
        self._compared: set[Path] = set()

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Counts and text bytes per split and domain, synthetic flags, source description, content hash."""
        manifest = self._json("manifest.json")
        domains, files = manifest.get("domains"), manifest.get("files", {})
        if not isinstance(domains, list) or not all(plain_name(name) for name in domains):
            raise _damaged(self.path / "manifest.json", "it lists no domains")
        if not isinstance(manifest.get("hash"), str) or not isinstance(files, dict):
            raise _damaged(self.path / "manifest.json", "it holds no hashes")
        return manifest

    def _json(self, name: str) -> dict[str, Any]:
        try:
            content = read_json(self.path / name)
        except (OSError, ValueError) as error:
            raise _damaged(self.path / name, brief(error)) from error
        if not isinstance(content, dict):
            raise _damaged(self.path / name, "no mapping")
        return content

    @cached_property
    def leakage(self) -> dict[str, Any]:
        """The leakage report; see `nano_think.data.leakage`."""
        return self._json("leakage.json")

    @property
    def domains(self) -> list[str]:
        """Domain names in alphabetical order; the index into this list is the domain's number everywhere."""
        return list(self.manifest["domains"])

    @property
    def hash(self) -> str:
        """Hex digest of all records; equal for equal corpora wherever they were built."""
        return self.manifest["hash"]

    def documents(self, split: str, domain: str) -> Iterator[Record]:
        """Stream the records of one split and domain in the order of their uids.

        Raises:
            ValueError: if the split or the domain does not exist.
        """
        return Block(self._file(split, domain), split, domain, 0, None).records()

    def blocks(self, split: str, domain: str) -> Iterator[Block]:
        """The same records in portions of about a mebibyte.

        Raises:
            ValueError: as `documents`.
        """
        path = self._file(split, domain)
        start, size = 0, path.stat().st_size
        with open(path, "rb") as file:
            while start < size:
                file.seek(start + BLOCK_BYTES - 1)
                file.readline()
                stop = min(file.tell(), size)
                yield Block(path, split, domain, start, stop)
                start = stop

    def _file(self, split: str, domain: str) -> Path:
        if split not in SPLITS or domain not in self.domains:
            raise ValueError(
                f"The corpus has no {split!r} / {domain!r}: splits are {', '.join(SPLITS)}, "
                f"domains are {', '.join(self.domains)}."
            )
        path = self.path / split / f"{domain}.jsonl"
        if path not in self._compared:
            digest = self.manifest.get("files", {}).get(f"{split}/{domain}.jsonl")
            try:
                path.stat()
                if digest is not None and hash_file(path) != digest:
                    raise ValueError("not the file that was made")
            except (OSError, ValueError) as error:
                raise _damaged(path, brief(error)) from error
            self._compared.add(path)
        return path
