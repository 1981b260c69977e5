"""Reader of a prepared corpus directory (written by `nano_think.data.prepare`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nano_think.data.split import SPLITS


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
        if split not in SPLITS or domain not in self.domains:
            raise ValueError(
                f"The corpus has no {split!r} / {domain!r}: splits are {', '.join(SPLITS)}, "
                f"domains are {', '.join(self.domains)}."
            )
        return self._read(self.path / split / f"{domain}.jsonl")

    @staticmethod
    def _read(path: Path) -> Iterator[Record]:
        with open(path, "rb") as file:
            for line in file:
                yield Record(**json.loads(line))
