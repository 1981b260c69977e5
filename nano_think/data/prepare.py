"""From a source to a corpus on disk: normalise, find copies, split, write, and report what leaked.

Memory is flat in the size of the texts: they wait in a temporary file on disk, and only hashes (about 700
bytes a document) stay in memory.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nano_think.data.corpus import Corpus, Record
from nano_think.data.dedup import NUM_PERMUTATIONS, exact_jaccard, near_duplicates, signature
from nano_think.data.documents import Document, Source
from nano_think.data.leakage import leakage_report, leakage_summary
from nano_think.data.normalize import fold, normalize
from nano_think.data.split import DEFAULT_SALT, FRACTIONS, SPLITS, own_split, resolve_clusters
from nano_think.errors import UserError
from nano_think.files import atomic_dir, hash_file, hash_json, write_json

FORMAT = 1


def prepare_corpus(
    source: Source,
    out_dir: str | Path,
    salt: str = DEFAULT_SALT,
    jaccard: float = 0.8,
    progress: Callable[[int], None] | None = None,
) -> Corpus:
    """Write the corpus directory of `source` and return its reader.

    The directory appears complete or not at all. If it exists already and was made from the same source, salt
    and threshold, it is used as it is.

    Args:
        source: where the documents come from.
        out_dir: the directory to write.
        salt: key of the split hash; another salt gives another split.
        jaccard: similarity of the word 5-gram sets from which two documents are near copies.
        progress: called now and then with the number of text bytes read so far.

    Raises:
        UserError: if there is no document, a domain has no document in some split, or `out_dir` holds another
            corpus.
    """
    out_dir = Path(out_dir)
    key = {"format": FORMAT, "fingerprint": source.fingerprint(), "salt": salt, "jaccard": jaccard}
    if out_dir.exists():
        return _existing(out_dir, key)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out_dir.parent) as file:
        spool = _Spool(file, salt)
        for document in source:
            spool.add(document)
            if progress is not None:
                progress(spool.text_bytes)
        plan = _Plan.make(spool, jaccard)
        with atomic_dir(out_dir) as directory:
            counts = _write_records(spool, plan, directory)
            _check_domains(counts)
            manifest = _manifest(key, source, spool, plan, counts, directory)
            write_json(directory / "manifest.json", manifest)
            report = leakage_report(Corpus(directory), plan.excluded(spool))
            write_json(directory / "leakage.json", report)
            (directory / "leakage.md").write_text(leakage_summary(report), encoding="utf-8")
    return Corpus(out_dir)


def _existing(out_dir: Path, key: dict[str, Any]) -> Corpus:
    try:
        corpus = Corpus(out_dir)
    except FileNotFoundError as error:
        raise UserError(f"{out_dir} exists and is not a prepared corpus: name another folder.") from error
    if any(corpus.manifest.get(name) != value for name, value in key.items()):
        raise UserError(
            f"{out_dir} holds a corpus of other data or settings: remove it or name another folder."
        )
    return corpus


@dataclass
class _Spool:
    """Normalised documents on disk, exact copies dropped; what is in memory is one row of hashes for each."""

    file: BinaryIO
    salt: str
    offsets: array = field(default_factory=lambda: array("q"))
    uids: array = field(default_factory=lambda: array("q"))
    own: array = field(default_factory=lambda: array("b"))
    signatures: bytearray = field(default_factory=bytearray)
    signed: array = field(default_factory=lambda: array("q"))
    rows: dict[bytes, int] = field(default_factory=dict)
    removed: Counter[str] = field(default_factory=Counter)
    text_bytes: int = 0

    def add(self, document: Document) -> None:
        """Normalise a document and keep it, unless it is empty or an exact copy."""
        text = normalize(document.text, document.domain)
        self.text_bytes += len(text.encode())
        folded = fold(text)
        if not folded:
            self.removed["empty"] += 1
            return
        offset = self.file.seek(0, 2)
        values = asdict(document) | {"text": text}
        content = hashlib.blake2b(folded.encode(), digest_size=16).digest()
        row = self.rows.setdefault(content, len(self.rows))
        if row < len(self.offsets):
            self._keep_one_copy(row, offset, values)
            return
        self._write(values)
        self.offsets.append(offset)
        self.uids.append(content_uid(text))
        self.own.append(own_split(folded, self.salt))
        minhash = signature(folded)
        if minhash is not None:
            self.signed.append(row)
            self.signatures += minhash.tobytes()

    def read(self, row: int) -> dict[str, str]:
        """Return text, domain, source and id of a kept document."""
        self.file.seek(self.offsets[row])
        return json.loads(self.file.readline())

    def _write(self, values: dict[str, str]) -> None:
        self.file.write(json.dumps(values, ensure_ascii=False).encode() + b"\n")

    def _keep_one_copy(self, row: int, offset: int, values: dict[str, str]) -> None:
        kept = self.read(row)
        self.removed[
            "exact_copies" if kept["domain"] == values["domain"] else "exact_copies_across_domains"
        ] += 1
        # The smallest copy stays, whichever came first, so that the order of files does not matter.
        if _copy_order(values) < _copy_order(kept):
            self.file.seek(offset)
            self._write(values)
            self.offsets[row] = offset
            self.uids[row] = content_uid(values["text"])


def _copy_order(values: dict[str, str]) -> tuple[int, str, str, str]:
    return content_uid(values["text"]), values["domain"], values["source"], values["id"]


def content_uid(text: str) -> int:
    """Return the uid of a normalised text: the first 63 bits of its blake2b hash."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class _Plan:
    """Cluster and fate of every spooled document."""

    clusters: list[int]
    cluster_split: dict[int, int]
    keep: list[bool]

    @classmethod
    def make(cls, spool: _Spool, threshold: float) -> _Plan:
        if not spool.uids:
            raise UserError(
                "The source holds no document with any text: check data.root or choose data=builtin."
            )
        signatures = np.frombuffer(spool.signatures, dtype=np.uint32).reshape(-1, NUM_PERMUTATIONS)
        signed = spool.signed

        def exact(i: int, j: int) -> float:
            a, b = (fold(spool.read(signed[row])["text"]) for row in (i, j))
            return exact_jaccard(a, b)

        sets = near_duplicates(signatures, threshold, exact)
        labels = list(range(len(spool.uids)))
        for position, row in enumerate(signed):
            labels[row] = signed[sets.find(position)]
        smallest: dict[int, int] = {}
        for label, uid in zip(labels, spool.uids, strict=True):
            smallest[label] = min(uid, smallest.get(label, uid))
        clusters = [smallest[label] for label in labels]
        keep = resolve_clusters(spool.own, clusters)
        cluster_split = {cluster: spool.own[i] for i, cluster in enumerate(clusters) if keep[i]}
        return cls(clusters, cluster_split, keep)

    def excluded(self, spool: _Spool) -> list[dict[str, Any]]:
        """Describe the near copies left out because their cluster lies in another split, by uid."""
        rows = sorted((spool.uids[row], row) for row, keep in enumerate(self.keep) if not keep)
        result = []
        for uid, row in rows:
            values, cluster = spool.read(row), self.clusters[row]
            result.append(
                {
                    "uid": uid,
                    "cluster": cluster,
                    "own_split": SPLITS[spool.own[row]],
                    "cluster_split": SPLITS[self.cluster_split[cluster]],
                    **{name: values[name] for name in ("domain", "source", "id")},
                }
            )
        return result


def _write_records(spool: _Spool, plan: _Plan, directory: Path) -> dict[str, dict[str, Counter[str]]]:
    """Write the kept records in the order of their uids; return {domain: {split: counts}}."""
    files: dict[tuple[str, str], BinaryIO] = {}
    counts: dict[str, dict[str, Counter[str]]] = {}
    for split in SPLITS:
        (directory / split).mkdir()
    with ExitStack() as stack:
        for record, split in _records(spool, plan):
            place = (split, record.domain)
            if place not in files:
                files[place] = stack.enter_context(open(directory / split / f"{record.domain}.jsonl", "wb"))
            files[place].write(json.dumps(asdict(record), ensure_ascii=False).encode() + b"\n")
            count = counts.setdefault(record.domain, {name: Counter() for name in SPLITS})[split]
            count.update(documents=1, bytes=len(record.text.encode()))
    return dict(sorted(counts.items()))


def _records(spool: _Spool, plan: _Plan) -> Iterator[tuple[Record, str]]:
    for uid, row in sorted((uid, row) for row, uid in enumerate(spool.uids) if plan.keep[row]):
        yield Record(uid=uid, cluster=plan.clusters[row], **spool.read(row)), SPLITS[spool.own[row]]


def _check_domains(counts: dict[str, dict[str, Counter[str]]]) -> None:
    for domain, splits in counts.items():
        total = sum(count["documents"] for count in splits.values())
        for split, count in splits.items():
            if not count["documents"]:
                raise UserError(
                    f"Domain {domain!r} has {total} documents and none of them falls into the split {split}: "
                    f"add documents (a few hundred are enough) or leave the domain out."
                )


def _manifest(
    key: dict[str, Any],
    source: Source,
    spool: _Spool,
    plan: _Plan,
    counts: dict[str, dict[str, Counter[str]]],
    directory: Path,
) -> dict[str, Any]:
    """Facts that depend on the documents and settings only: no time, no path, no machine."""
    description = source.describe()
    splits = {
        split: {
            domain: {"documents": by_split[split]["documents"], "bytes": by_split[split]["bytes"]}
            for domain, by_split in counts.items()
        }
        for split in SPLITS
    }
    files = {
        f"{split}/{domain}.jsonl": hash_file(directory / split / f"{domain}.jsonl")
        for split in SPLITS
        for domain in counts
    }
    return {
        **key,
        "hash": hash_json(files),
        "domains": list(counts),
        "synthetic": {domain: bool(description["synthetic"].get(domain)) for domain in counts},
        "fractions": dict(zip(SPLITS, FRACTIONS, strict=True)),
        "splits": splits,
        "totals": {
            unit: sum(entry[unit] for domains in splits.values() for entry in domains.values())
            for unit in ("documents", "bytes")
        },
        "removed": {
            **{
                name: spool.removed[name] for name in ("empty", "exact_copies", "exact_copies_across_domains")
            },
            "near_copies_across_splits": plan.keep.count(False),
        },
        "skipped": source.skipped(),
        "source": description,
        "files": files,
    }
