"""What every text source gives: a stream of documents and a description of where they come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Document:
    """One text as a source found it, before normalisation.

    Attributes:
        text: the content.
        domain: the domain it belongs to, e.g. "code".
        source: the collection inside the source; it starts with "synthetic:" when no person wrote the text.
        id: its name inside that collection.
    """

    text: str
    domain: str
    source: str
    id: str


class Source(Protocol):
    """A collection of documents that can be read from the start any number of times."""

    def __iter__(self) -> Iterator[Document]:
        """Yield every document; a second call starts again and yields the same ones in the same order."""
        ...

    def fingerprint(self) -> str:
        """Hex key that changes whenever the documents would; much cheaper than reading them all."""
        ...

    def describe(self) -> dict[str, Any]:
        """Plain facts for the manifest: "name", "domains", "licences", "synthetic" ({domain: bool}), ..."""
        ...

    def skipped(self) -> dict[str, Any]:
        """What the latest iteration left out and why, as plain counts; empty when it left out nothing."""
        ...
