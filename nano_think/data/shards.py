"""Token shards: each split and domain of a corpus tokenised once into two memory-mapped files.

`<split>/<domain>.tokens.bin` is the stream of all documents, each as BOS + text + EOS (uint16 where the
vocabulary fits, else uint32). `<split>/<domain>.docs.npy` is int64 of shape (6, documents), a row per field
of `Documents`.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from nano_think.data.corpus import Corpus, Record
from nano_think.data.split import SPLITS
from nano_think.errors import UserError
from nano_think.files import atomic_dir, write_json
from nano_think.tokenizer import Tokenizer

# A batch of documents for the tokenizer ends at whichever comes first, so that memory stays flat.
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class Documents:
    """Table of the documents of one split and domain, one int64 array (documents,) a column.

    Args:
        start: index of the document's BOS in the token stream.
        length: tokens, BOS and EOS included.
        uid: global id of the document.
        cluster: global id of its near-duplicate cluster.
        num_bytes: UTF-8 bytes of the text.
        record_line: line of the corpus file (from 0) that holds the record.
    """

    start: np.ndarray
    length: np.ndarray
    uid: np.ndarray
    cluster: np.ndarray
    num_bytes: np.ndarray
    record_line: np.ndarray

    def __len__(self) -> int:
        return len(self.start)


class Shards:
    """Reader of a directory made by `build_shards`; only the manifest is read until tokens are asked for.

    Raises:
        UserError: the directory holds no shards.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        try:
            self.manifest: dict[str, Any] = json.loads((self.directory / "manifest.json").read_text())
        except FileNotFoundError as error:
            message = f"no token shards in {directory}: make them with `python train.py phase=data`"
            raise UserError(message) from error
        self.domains: list[str] = self.manifest["domains"]
        self.vocab_size: int = self.manifest["vocab_size"]
        self.tokenizer_hash: str = self.manifest["tokenizer_hash"]
        self.pad_id: int = self.manifest["pad_id"]

    def counts(self, split: str, domain: str) -> dict[str, int]:
        """Numbers of `documents`, `tokens` and text `bytes`.

        Raises:
            UserError: unknown split or domain.
        """
        try:
            return self.manifest["splits"][split][domain]
        except KeyError as error:
            known = f"splits {', '.join(self.manifest['splits'])}; domains {', '.join(self.domains)}"
            raise UserError(f"no shard {split}/{domain} in {self.directory}: choose from {known}") from error

    def num_tokens(self, split: str, domain: str | None = None) -> int:
        """Length of one stream, BOS and EOS included; of all streams of the split without `domain`."""
        domains = self.domains if domain is None else [domain]
        return sum(self.counts(split, name)["tokens"] for name in domains)

    def tokens(self, split: str, domain: str) -> np.ndarray:
        """The token stream, a read-only memory map of shape (num_tokens,)."""
        dtype = np.dtype(self.manifest["dtype"])
        if self.num_tokens(split, domain) == 0:
            return np.empty(0, dtype)  # an empty file cannot be mapped
        return np.memmap(self.directory / split / f"{domain}.tokens.bin", dtype=dtype, mode="r")

    def docs(self, split: str, domain: str) -> Documents:
        """The document table, memory-mapped."""
        self.counts(split, domain)
        table = np.load(self.directory / split / f"{domain}.docs.npy", mmap_mode="r")
        return Documents(*np.asarray(table))

    def source_record(self, split: str, domain: str, doc_index: int) -> int:
        """Line (from 0) of the corpus file `<split>/<domain>.jsonl` that holds document `doc_index`."""
        return int(self.docs(split, domain).record_line[doc_index])

    def check_tokenizer(self, tokenizer_hash: str) -> None:
        """Refuse another tokenizer than the one the shards were made with.

        Raises:
            UserError: the hashes differ.
        """
        if tokenizer_hash != self.tokenizer_hash:
            raise UserError(
                f"the tokens in {self.directory} were made by tokenizer {self.tokenizer_hash[:12]}, not "
                f"{tokenizer_hash[:12]}: use the tokenizer they were made with or tokenise the corpus again"
            )


def build_shards(
    corpus: Corpus,
    tokenizer: Tokenizer,
    out_dir: str | Path,
    num_threads: int = 2,
    progress: Callable[[int], None] | None = None,
) -> Shards:
    """Tokenise every split and domain of `corpus` into `out_dir`; what is already there is kept and returned.

    The caller names `out_dir` after the contents of corpus and tokenizer. The directory appears complete or
    not at all, also when two processes build it at once.

    Args:
        progress: called with the number of documents just written, batch after batch.

    Raises:
        UserError: `out_dir` holds shards of another tokenizer.
    """
    out_dir = Path(out_dir)
    if not (out_dir / "manifest.json").is_file():
        dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        manifest: dict[str, Any] = {
            "format": 1,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_hash": tokenizer.hash,
            "pad_id": tokenizer.pad_id,
            "corpus_hash": corpus.manifest["hash"],
            "dtype": dtype.name,
            "domains": list(corpus.domains),
            "splits": {split: {} for split in SPLITS},
        }
        with atomic_dir(out_dir) as temporary:
            for split in SPLITS:
                (temporary / split).mkdir()
                for domain in corpus.domains:
                    stem = temporary / split / domain
                    batches = _batches(corpus.documents(split, domain))
                    counts = _write_stream(stem, batches, tokenizer, dtype, num_threads, progress)
                    manifest["splits"][split][domain] = counts
            write_json(temporary / "manifest.json", manifest)
    shards = Shards(out_dir)
    shards.check_tokenizer(tokenizer.hash)
    return shards


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    characters = 0
    for record in records:
        batch.append(record)
        characters += len(record.text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write_stream(
    stem: Path,
    batches: Iterable[list[Record]],
    tokenizer: Tokenizer,
    dtype: np.dtype,
    num_threads: int,
    progress: Callable[[int], None] | None,
) -> dict[str, int]:
    """Write the two files of one split and domain and return their counts."""
    columns = {field.name: array("q") for field in fields(Documents)}
    num_tokens = num_documents = num_bytes = 0
    with open(stem.with_name(f"{stem.name}.tokens.bin"), "wb") as stream:
        for batch in batches:
            encoded = tokenizer.encode_batch([record.text for record in batch], num_threads)
            for record, ids in zip(batch, encoded, strict=True):
                stream.write(np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype).tobytes())
                text_bytes = int(tokenizer.byte_lengths[ids].sum())
                values = (num_tokens, len(ids) + 2, record.uid, record.cluster, text_bytes, num_documents)
                for column, value in zip(columns.values(), values, strict=True):
                    column.append(value)
                num_tokens += len(ids) + 2
                num_documents += 1
                num_bytes += text_bytes
            if progress is not None:
                progress(len(batch))
    table = np.array([np.frombuffer(column, np.int64) for column in columns.values()])
    np.save(stem.with_name(f"{stem.name}.docs.npy"), table)
    return {"documents": num_documents, "tokens": num_tokens, "bytes": num_bytes}
