"""Reader of a prepared corpus directory (written by `nano_think.data.prepare`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nano_think.data.split import SPLITS

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
        """Stream the records."""
        with open(self.path, "rb") as file:
            place = file.seek(self.start)
            for line in file:
                yield Record(**json.loads(line))
                place += len(line)
                if place == self.stop:
                    return


class Corpus:
    """A prepared corpus: `dir/manifest.json`, `dir/leakage.json` and `dir/<split>/<domain>.jsonl`.

    Raises:
        FileNotFoundError: if `path` holds no manifest.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "manifest.json").is_file():
            raise FileNotFoundError(
                f"{self.path} is not a prepared corpus: run `python train.py phase=data` first."
            )

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Counts and text bytes per split and domain, synthetic flags, source description, content hash."""
        return json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))

    @cached_property
    def leakage(self) -> dict[str, Any]:
        """The leakage report; see `nano_think.data.leakage`."""
        return json.loads((self.path / "leakage.json").read_text(encoding="utf-8"))

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
        return self.path / split / f"{domain}.jsonl"
