"""Normalised documents waiting on disk until it is known which of them stay.

In memory are about 45 bytes a document: texts and MinHash signatures lie in temporary files.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from nano_think.data.dedup import SignatureFile, signature
from nano_think.data.documents import Document
from nano_think.data.normalize import fold, normalize
from nano_think.data.split import own_split

_CONTENT_BYTES = 16
# A batch of documents ends at whichever comes first.
_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True)
class Digest:
    """What is kept of one document, a pure function of it.

    Attributes:
        line: text, domain, source and id as one line of JSON.
        domain: its domain.
        num_bytes: UTF-8 bytes of the normalised text.
        content: hash of the folded text, which exact copies share; empty for a document without any text.
        uid: hash of the normalised text.
        own: index of its own split.
        signature: its MinHash signature, empty for a text too short to have one.
    """

    line: bytes
    domain: str
    num_bytes: int
    content: bytes
    uid: int
    own: int
    signature: bytes


def content_uid(text: str) -> int:
    """Return the uid of a normalised text: the first 63 bits of its blake2b hash."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def digest(document: Document, salt: str) -> Digest:
    """Normalise a document and compute all that the corpus needs to know of it."""
    text = normalize(document.text, document.domain)
    num_bytes = len(text.encode())
    folded = fold(text)
    if not folded:
        return Digest(b"", document.domain, num_bytes, b"", 0, 0, b"")
    values = {"text": text, "domain": document.domain, "source": document.source, "id": document.id}
    minhash = signature(folded)
    return Digest(
        line=json.dumps(values, ensure_ascii=False).encode() + b"\n",
        domain=document.domain,
        num_bytes=num_bytes,
        content=hashlib.blake2b(folded.encode(), digest_size=_CONTENT_BYTES).digest(),
        uid=content_uid(text),
        own=own_split(folded, salt),
        signature=b"" if minhash is None else minhash.tobytes(),
    )


def digest_batch(documents: Sequence[Document], salt: str) -> list[Digest]:
    """`digest` of each: the unit of work of a worker process."""
    return [digest(document, salt) for document in documents]


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about a mebibyte."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class Spool:
    """Digests in the order of the source.

    Args:
        lines, signatures: two empty files open for reading and writing; the second unbuffered.

    Attributes:
        offsets, uids, own, domain_numbers, num_bytes: a value for each document that has text.
        signed: the row in `signatures` of each document, -1 without one.
        domains: names that `domain_numbers` index.
        removed: numbers of documents left out, by reason.
        text_bytes: UTF-8 bytes of all normalised texts, left out or not.
    """

    def __init__(self, lines: BinaryIO, signatures: BinaryIO) -> None:
        self._lines, self._end = lines, 0
        self.signatures = SignatureFile(signatures)
        self.offsets, self.uids, self.num_bytes, self.signed = (array("q") for _ in range(4))
        self.own, self.domain_numbers, self._content = array("b"), array("i"), bytearray()
        self.domains: dict[str, int] = {}
        self.removed: Counter[str] = Counter()
        self.text_bytes = 0

    def __len__(self) -> int:
        return len(self.uids)

    def add(self, digest: Digest) -> None:
        """Keep a document, unless it holds no text."""
        self.text_bytes += digest.num_bytes
        if not digest.content:
            self.removed["empty"] += 1
            return
        self.offsets.append(self._end)
        self._end += self._lines.write(digest.line)
        self.uids.append(digest.uid)
        self.own.append(digest.own)
        self.num_bytes.append(digest.num_bytes)
        self.domain_numbers.append(self.domains.setdefault(digest.domain, len(self.domains)))
        self._content += digest.content
        self.signed.append(len(self.signatures) if digest.signature else -1)
        if digest.signature:
            self.signatures.append(digest.signature)

    def line(self, row: int) -> bytes:
        """Text, domain, source and id of a document as a line of JSON."""
        self._lines.seek(self.offsets[row])
        return self._lines.readline()

    def read(self, row: int) -> dict[str, str]:
        """The same as a dictionary."""
        return json.loads(self.line(row))

    def without_copies(self) -> np.ndarray:
        """Rows that are no exact copies, rising; counts the others in `removed`.

        The smallest copy stays, whichever came first, so that the order of files does not matter.
        """
        content = np.frombuffer(self._content, np.uint64).reshape(-1, 2)
        order = np.lexsort((content[:, 1], content[:, 0]))
        ordered = content[order]
        borders = np.flatnonzero((ordered[1:] != ordered[:-1]).any(axis=1)) + 1
        starts, ends = np.append(0, borders), np.append(borders, len(order))
        kept = np.ones(len(self), bool)
        several = ends - starts > 1
        for start, end in zip(starts[several].tolist(), ends[several].tolist(), strict=True):
            self._drop_all_but_one(order[start:end], kept)
        return np.flatnonzero(kept)

    def _drop_all_but_one(self, copies: np.ndarray, kept: np.ndarray) -> None:
        smallest = min(copies.tolist(), key=self._copy_order)
        kept[copies] = False
        kept[smallest] = True
        same = sum(self.domain_numbers[row] == self.domain_numbers[smallest] for row in copies.tolist())
        self.removed["exact_copies"] += same - 1
        self.removed["exact_copies_across_domains"] += len(copies) - same

    def _copy_order(self, row: int) -> tuple[Any, ...]:
        values = self.read(row)
        return self.uids[row], values["domain"], values["source"], values["id"]
