"""Token shards: each split and domain of a corpus tokenised once into two memory-mapped files.

`<split>/<domain>.tokens.bin` is the stream of all documents, each as BOS + text + EOS (uint16 where the
vocabulary fits, else uint32). `<split>/<domain>.docs.npy` is int64 of shape (6, documents), a row per field
of `Documents`.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from nano_think.arrays import read_npy
from nano_think.data.corpus import Block, Corpus, plain_name
from nano_think.data.split import SPLITS
from nano_think.data.workers import Workers
from nano_think.errors import UserError, brief
from nano_think.files import atomic_dir, hash_file, read_json, write_json
from nano_think.tokenizer import Tokenizer


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

    A file is compared with its hash and with what the manifest says of it when it is first opened.

    Raises:
        UserError: the directory holds no shards, or they are damaged, here and in every method that opens a file.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        try:
            self.manifest: dict[str, Any] = read_json(self.directory / "manifest.json")
            _check_manifest(self.manifest)
        except FileNotFoundError as error:
            message = f"no token shards in {directory}: make them with `python train.py phase=data`"
            raise UserError(message) from error
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._damaged("manifest.json", brief(error)) from error
        self._opened: set[str] = set()
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
            counts: dict[str, int] = self.manifest["splits"][split][domain]
            return counts
        except KeyError as error:
            known = f"splits {', '.join(self.manifest['splits'])}; domains {', '.join(self.domains)}"
            raise UserError(f"no shard {split}/{domain} in {self.directory}: choose from {known}") from error

    def num_tokens(self, split: str, domain: str | None = None) -> int:
        """Length of one stream, BOS and EOS included; of all streams of the split without `domain`."""
        domains = self.domains if domain is None else [domain]
        return sum(self.counts(split, name)["tokens"] for name in domains)

    def tokens(self, split: str, domain: str) -> np.ndarray:
        """The token stream, a read-only memory map of shape (num_tokens,)."""
        dtype, count = np.dtype(self.manifest["dtype"]), self.num_tokens(split, domain)
        name = f"{split}/{domain}.tokens.bin"
        if count == 0:
            return np.empty(0, dtype)  # an empty file cannot be mapped
        try:
            if (self.directory / name).stat().st_size != count * dtype.itemsize:
                raise ValueError(f"not {count} tokens long")
            stream = np.memmap(self.directory / name, dtype=dtype, mode="r")
            if name not in self._opened and _largest(stream) >= self.vocab_size:
                raise ValueError(f"holds tokens beyond its vocabulary of {self.vocab_size}")
            self._compare(name)
        except (OSError, ValueError) as error:
            raise self._damaged(name, brief(error)) from error
        return stream

    def docs(self, split: str, domain: str) -> Documents:
        """The document table, memory-mapped."""
        counts, name = self.counts(split, domain), f"{split}/{domain}.docs.npy"
        try:
            kind = ("int64", (len(fields(Documents)), counts["documents"]))
            docs = Documents(*np.asarray(read_npy(self.directory / name, kind, mapped=True)))
            if name not in self._opened:
                _check_documents(docs, counts["tokens"])
            self._compare(name)
        except (OSError, ValueError) as error:
            raise self._damaged(name, brief(error)) from error
        return docs

    def _compare(self, name: str) -> None:
        """Raise ValueError where a file is not the one that was written; those of old have no hash."""
        if name not in self._opened:
            digest = self.manifest.get("files", {}).get(name)
            if digest is not None and hash_file(self.directory / name) != digest:
                raise ValueError("not the file that was made")
            self._opened.add(name)

    def _damaged(self, name: str, why: str) -> UserError:
        return UserError(
            f"{self.directory / name} is damaged ({why}): delete {self.directory.parent} and run "
            "`python train.py phase=data` again"
        )

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
    processes: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Shards:
    """Tokenise every split and domain of `corpus` into `out_dir`; what is already there is kept and returned.

    The caller names `out_dir` after the contents of corpus and tokenizer. The directory appears complete or
    not at all, also when two processes build it at once.

    Args:
        processes: see `Workers`; the files do not depend on it.
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
            "files": {},
        }
        with atomic_dir(out_dir) as temporary, Workers(processes) as workers:
            for (split, domain), encoded in _streams(corpus, tokenizer, dtype, workers):
                (temporary / split).mkdir(exist_ok=True)
                counts = _write_stream(temporary / split / domain, encoded, progress)
                manifest["splits"][split][domain] = counts
                for kind in ("tokens.bin", "docs.npy"):
                    name = f"{split}/{domain}.{kind}"
                    manifest["files"][name] = hash_file(temporary / name)
            write_json(temporary / "manifest.json", manifest)
    shards = Shards(out_dir)
    shards.check_tokenizer(tokenizer.hash)
    return shards


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raise ValueError, LookupError, TypeError or AttributeError for what cannot be a manifest of ours."""
    numbers = (manifest["vocab_size"], manifest["pad_id"])
    for domains in manifest["splits"].values():
        for counts in domains.values():
            numbers += tuple(counts[unit] for unit in ("documents", "tokens", "bytes"))
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
        raise ValueError("a count is not a number from 0 up")
    vocab_size, pad_id = numbers[:2]
    if manifest["dtype"] not in ("uint16", "uint32") or not pad_id < vocab_size <= 1 << 32:
        raise ValueError("dtype, vocab_size and pad_id contradict each other")
    if not isinstance(manifest["tokenizer_hash"], str) or not isinstance(manifest.get("files", {}), dict):
        raise ValueError("tokenizer_hash or files is not what it should be")
    domains = manifest["domains"]
    if not isinstance(domains, list) or not all(plain_name(name) for name in (*domains, *manifest["splits"])):
        raise ValueError("a split or domain has a name that is none")
    if any(set(names) != set(domains) for names in manifest["splits"].values()):
        raise ValueError("splits have other domains than are listed")


def _check_documents(docs: Documents, tokens: int) -> None:
    """Raise ValueError unless the documents lie one after the other in a stream of so many tokens."""
    if (docs.length < 1).any() or (docs.length > tokens).any():
        raise ValueError("a document has a length that none can have")
    ends = np.cumsum(docs.length)
    if (docs.start != ends - docs.length).any() or (int(ends[-1]) if len(ends) else 0) != tokens:
        raise ValueError("its documents do not follow each other")


def _largest(stream: np.ndarray, block: int = 1 << 20) -> int:
    """The largest of the numbers in a stream, read in blocks."""
    return max(int(stream[start : start + block].max()) for start in range(0, len(stream), block))


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A block of documents as tokens, each BOS + text + EOS.

    stream: the tokens' bytes. table: int64 (4, documents): length, uid, cluster, num_bytes of `Documents`.
    """

    place: tuple[str, str]
    stream: bytes
    table: np.ndarray


def _encode(tokenizer: Tokenizer, dtype: np.dtype, block: Block) -> _Encoded:
    stream, table = bytearray(), array("q")
    bos, eos = (np.array([i], dtype).tobytes() for i in (tokenizer.bos_id, tokenizer.eos_id))
    for record in block.records():
        ids = tokenizer.encode_array(record.text)
        stream += bos + ids.astype(dtype).tobytes() + eos
        num_bytes = int(tokenizer.byte_lengths[ids].sum())
        table.extend((len(ids) + 2, record.uid, record.cluster, num_bytes))
    columns = np.frombuffer(table, np.int64).reshape(-1, 4).T
    return _Encoded((block.split, block.domain), bytes(stream), columns)


def _streams(
    corpus: Corpus, tokenizer: Tokenizer, dtype: np.dtype, workers: Workers
) -> Iterator[tuple[tuple[str, str], Iterable[_Encoded]]]:
    """((split, domain), its blocks) for every one, also where there is no document."""
    places = [(split, domain) for split in SPLITS for domain in corpus.domains]
    blocks = (block for place in places for block in corpus.blocks(*place))
    # one map over all, so that no worker waits at the end of a stream
    encoded = groupby(
        workers.map(partial(_encode, tokenizer, dtype), blocks), key=operator.attrgetter("place")
    )
    filled, parts = next(encoded, (None, iter(())))
    for place in places:
        if place != filled:
            yield place, ()
            continue
        yield place, parts
        filled, parts = next(encoded, (None, iter(())))


def _write_stream(
    stem: Path, encoded: Iterable[_Encoded], progress: Callable[[int], None] | None
) -> dict[str, int]:
    """Write the two files of one split and domain and return their counts."""
    tables = [np.empty((4, 0), np.int64)]
    with open(stem.with_name(f"{stem.name}.tokens.bin"), "wb") as stream:
        for part in encoded:
            stream.write(part.stream)
            tables.append(part.table)
            if progress is not None:
                progress(part.table.shape[1])
    length, uid, cluster, num_bytes = np.concatenate(tables, axis=1)
    start = np.cumsum(length) - length
    table = np.array([start, length, uid, cluster, num_bytes, np.arange(len(length))])
    np.save(stem.with_name(f"{stem.name}.docs.npy"), table)
    return {"documents": len(length), "tokens": int(length.sum()), "bytes": int(num_bytes.sum())}
