"""From a source to a corpus on disk: normalise, find copies, split, write, and report what leaked.

Memory is flat in the size of the texts: they wait in a temporary file on disk, and what stays in memory is about
100 bytes a document. What is computed for each document alone runs in worker processes.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nano_think.data.corpus import Corpus
from nano_think.data.dedup import exact_jaccard, near_duplicates
from nano_think.data.documents import Source
from nano_think.data.leakage import leakage_report, leakage_summary
from nano_think.data.normalize import fold
from nano_think.data.split import DEFAULT_SALT, FRACTIONS, SPLITS, resolve_clusters
from nano_think.data.spool import Spool, batches, digest_batch
from nano_think.data.workers import Workers
from nano_think.errors import UserError
from nano_think.files import atomic_dir, hash_file, hash_json, write_json

FORMAT = 1


def prepare_corpus(
    source: Source,
    out_dir: str | Path,
    salt: str = DEFAULT_SALT,
    jaccard: float = 0.8,
    progress: Callable[[int], None] | None = None,
    processes: int | None = None,
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
        processes: see `Workers`; the files do not depend on it.

    Raises:
        UserError: if there is no document, a domain has no document in some split, or `out_dir` holds another
            corpus.
    """
    out_dir = Path(out_dir)
    key = {"format": FORMAT, "fingerprint": source.fingerprint(), "salt": salt, "jaccard": jaccard}
    if out_dir.exists():
        return _existing(out_dir, key)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        workers = stack.enter_context(Workers(processes))
        lines = stack.enter_context(tempfile.TemporaryFile(dir=out_dir.parent))
        signatures = stack.enter_context(tempfile.TemporaryFile(dir=out_dir.parent, buffering=0))
        spool = Spool(lines, signatures)
        for digests in workers.map(partial(digest_batch, salt=salt), batches(source)):
            for digest in digests:
                spool.add(digest)
            if progress is not None:
                progress(spool.text_bytes)
        plan = _Plan.make(spool, jaccard)
        with atomic_dir(out_dir) as directory:
            counts = _write_records(spool, plan, directory)
            _check_domains(counts)
            manifest = _manifest(key, source, spool, plan, counts, directory)
            write_json(directory / "manifest.json", manifest)
            report = leakage_report(Corpus(directory), plan.excluded(spool), workers)
            write_json(directory / "leakage.json", report)
            (directory / "leakage.md").write_text(leakage_summary(report), encoding="utf-8")
    return Corpus(out_dir)


def _existing(out_dir: Path, key: dict[str, Any]) -> Corpus:
    if not (out_dir / "manifest.json").is_file():
        raise UserError(f"{out_dir} exists and is not a prepared corpus: name another folder.")
    corpus = Corpus(out_dir)
    if any(corpus.manifest.get(name) != value for name, value in key.items()):
        raise UserError(
            f"{out_dir} holds a corpus of other data or settings: remove it or name another folder."
        )
    return corpus


@dataclass(frozen=True)
class _Plan:
    """Fate of every spooled document that is no exact copy, an entry for each in all arrays.

    rows: where the spool has it, rising. clusters: smallest uid of its near copies. keep: whether it is written.
    """

    rows: np.ndarray
    clusters: np.ndarray
    keep: np.ndarray

    @classmethod
    def make(cls, spool: Spool, threshold: float) -> _Plan:
        if not len(spool):
            raise UserError(
                "The source holds no document with any text: check data.root or choose data=builtin."
            )
        rows = spool.without_copies()
        signed = np.asarray(spool.signed)[rows]
        with_signature = rows[signed >= 0]
        signed = signed[signed >= 0]  # rising, as the rows are

        def exact(i: int, j: int) -> float:
            pair = with_signature[np.searchsorted(signed, (i, j))].tolist()
            return exact_jaccard(*(fold(spool.read(row)["text"]) for row in pair))

        sets = near_duplicates(spool.signatures, threshold, exact, signed)
        # documents without a signature are alone; labels above all signatures name them
        labels = len(spool.signatures) + np.arange(len(rows))
        labels[np.searchsorted(rows, with_signature)] = [sets.find(place) for place in signed.tolist()]
        _, label = np.unique(labels, return_inverse=True)
        uids = np.asarray(spool.uids)[rows]
        smallest = np.full(label.max() + 1, np.iinfo(np.int64).max)
        np.minimum.at(smallest, label, uids)
        own = np.asarray(spool.own)[rows]
        return cls(rows, smallest[label], resolve_clusters(own, label))

    def excluded(self, spool: Spool) -> list[dict[str, Any]]:
        """Describe the near copies left out because their cluster lies in another split, by uid."""
        left_out = self.clusters[~self.keep]
        kept = self.keep & np.isin(self.clusters, left_out)
        split_of = {
            cluster: spool.own[row]
            for cluster, row in zip(self.clusters[kept].tolist(), self.rows[kept].tolist(), strict=True)
        }
        result = []
        for row, cluster in zip(self.rows[~self.keep].tolist(), left_out.tolist(), strict=True):
            values = spool.read(row)
            result.append(
                {
                    "uid": spool.uids[row],
                    "cluster": cluster,
                    "own_split": SPLITS[spool.own[row]],
                    "cluster_split": SPLITS[split_of[cluster]],
                    **{name: values[name] for name in ("domain", "source", "id")},
                }
            )
        return sorted(result, key=lambda entry: entry["uid"])


def _write_records(spool: Spool, plan: _Plan, directory: Path) -> dict[str, dict[str, Counter[str]]]:
    """Write the kept records in the order of their uids; return {domain: {split: counts}}."""
    files: dict[tuple[str, str], BinaryIO] = {}
    counts: dict[str, dict[str, Counter[str]]] = {}
    domains = list(spool.domains)
    for split in SPLITS:
        (directory / split).mkdir()
    with ExitStack() as stack:
        for row, cluster in _kept(spool, plan):
            split, domain = SPLITS[spool.own[row]], domains[spool.domain_numbers[row]]
            place = (split, domain)
            if place not in files:
                files[place] = stack.enter_context(open(directory / split / f"{domain}.jsonl", "wb"))
            # the fields of `Record`: two numbers before those that the line begins with
            files[place].write(b'{"uid": %d, "cluster": %d, ' % (spool.uids[row], cluster))
            files[place].write(memoryview(spool.line(row))[1:])
            count = counts.setdefault(domain, {name: Counter() for name in SPLITS})[split]
            count.update(documents=1, bytes=spool.num_bytes[row])
    return dict(sorted(counts.items()))


def _kept(spool: Spool, plan: _Plan) -> Iterator[tuple[int, int]]:
    """(row, cluster) of the documents to write, by uid."""
    rows, clusters = plan.rows[plan.keep], plan.clusters[plan.keep]
    for place in np.argsort(np.asarray(spool.uids)[rows], kind="stable").tolist():
        yield int(rows[place]), int(clusters[place])


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
    spool: Spool,
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
            "near_copies_across_splits": int((~plan.keep).sum()),
        },
        "skipped": source.skipped(),
        "source": description,
        "files": files,
    }
