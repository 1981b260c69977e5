"""The seven data sets of the project's architecture text, streamed from the Hugging Face Hub.

`HUB_SETS` is the manifest: id, revision, columns, sample count, licence. A "sample" is what the architecture
counts: an abstract, a story, a paragraph of WikiText, a source file, a passage of philosophy, a verse. Rows
that belong together are joined before splitting: WikiText paragraphs to articles, verses to chapters, so that
no article or chapter can lie in two splits.
"""

from __future__ import annotations

import gzip
import json
import logging
import math
import os
import socket
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nano_think.data.documents import Document
from nano_think.data.hub_rows import JOINERS
from nano_think.errors import UserError
from nano_think.files import hash_file, hash_json

Row = dict[str, Any]
Loader = Callable[["HubSet"], Iterable[Row]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubSet:
    """One data set on the Hub.

    Attributes:
        name: short name, as in the architecture text.
        repo, revision, config, split: what `datasets.load_dataset` is asked for.
        columns: columns that are read.
        samples: how many samples are taken; the unit the last sample belongs to is finished.
        joiner: key of `hub_rows.JOINERS`, which turns rows into documents.
        domain: domain of its documents.
        licence: licence of the text, as the set's card states it.
        note: what a user should know about the choice.
    """

    name: str
    repo: str
    revision: str
    config: str | None
    split: str
    columns: tuple[str, ...]
    samples: int
    joiner: str
    domain: str
    licence: str
    note: str = ""


HUB_SETS = (
    HubSet(
        name="arxiv_abstracts",
        repo="gfissore/arxiv-abstracts-2021",
        revision="7dd8dab8b39c5bfcb11f87c0c0c67ab01d9ca53e",
        config=None,
        split="train",
        columns=("id", "title", "abstract"),
        samples=10_000,
        joiner="abstract",
        domain="academic",
        licence="CC0-1.0",
    ),
    HubSet(
        name="ml_arxiv",
        repo="CShorten/ML-ArXiv-Papers",
        revision="c878972daa0a5ec5f0d684354b6c8018f27d1316",
        config=None,
        split="train",
        columns=("title", "abstract"),
        samples=10_000,
        joiner="abstract",
        domain="academic",
        licence="AFL-3.0 (card); arXiv metadata and abstracts CC0-1.0",
        note="Papers that arxiv_abstracts holds too are found as copies: copies are sought over all sets.",
    ),
    HubSet(
        name="tinystories",
        repo="roneneldan/TinyStories",
        revision="f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
        config=None,
        split="train",
        columns=("text",),
        samples=10_000,
        joiner="plain",
        domain="general",
        licence="CDLA-Sharing-1.0",
        note="Stories written by a language model.",
    ),
    HubSet(
        name="wikitext",
        repo="Salesforce/wikitext",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        config="wikitext-103-raw-v1",
        split="train",
        columns=("text",),
        samples=10_000,
        joiner="wikitext",
        domain="general",
        licence="CC-BY-SA-3.0 and GFDL",
        note="A sample is a row that is not blank (heading or paragraph); rows are joined to articles.",
    ),
    HubSet(
        name="codeparrot",
        repo="codeparrot/codeparrot-clean",
        revision="35a59fb025bc0a102f7d96eac09d145b896d487b",
        config=None,
        split="train",
        columns=("repo_name", "path", "content", "license"),
        samples=5_000,
        joiner="code",
        domain="code",
        licence="per file; only permissive ones are taken (hub_rows.PERMISSIVE)",
    ),
    HubSet(
        name="stanford_plato",
        repo="sedthh/gutenberg_english",
        revision="main",
        config=None,
        split="train",
        columns=("TEXT", "METADATA"),
        samples=1_000,
        joiner="philosophy",
        domain="philosophy",
        licence="public domain in the USA",
        note="Substitute: entries of the Stanford Encyclopedia are under their authors' copyright. Instead "
        "passages of Project Gutenberg books of the Library of Congress classes B, BC, BD, BH and BJ "
        "(philosophy, logic, metaphysics, aesthetics, ethics), at most 25 from a book.",
    ),
    HubSet(
        name="openbible",
        repo="JDRJ/kjv-bible",
        revision="main",
        config=None,
        split="train",
        columns=("book", "chapter", "verse", "text"),
        samples=10_000,
        joiner="bible",
        domain="theology",
        licence="King James text: public domain (Crown letters patent in the UK)",
        note="Substitute for oliverbob/openbible, whose single column mixes KJV, ASV, WEB and quiz questions "
        "without references; a sample is a verse, verses are joined to chapters.",
    ),
)


class HubSource:
    """Documents of the seven sets, in the order of `HUB_SETS`.

    Args:
        fixtures: folder with `<name>.jsonl[.gz]` per set in the set's own schema, read instead of the Hub.
        scale: share of the sample counts to take, e.g. 0.01 for a trial.
        load: replaces the Hub: gets a `HubSet` and gives its rows.

    Raises:
        UserError: if the package `datasets` or the network is missing, or a set has not the columns it should
        have.
    """

    def __init__(
        self, fixtures: str | Path | None = None, scale: float = 1.0, load: Loader | None = None
    ) -> None:
        if not 0 < scale < math.inf:
            raise UserError(f"data.source.scale={scale} must be positive and finite.")
        self.fixtures = Path(fixtures) if fixtures is not None else None
        self.scale = scale
        self._load = load or (self._load_fixture if self.fixtures else load_from_hub)
        self._counts: dict[str, Counter[str]] = {}

    def __iter__(self) -> Iterator[Document]:
        self._counts = {}
        for hub_set in HUB_SETS:
            counts = self._counts[hub_set.name] = Counter()
            yield from self._documents(hub_set, counts)
            if counts["samples"] < self._samples(hub_set):
                logger.warning(
                    "%s gave %d of %d samples", hub_set.name, counts["samples"], self._samples(hub_set)
                )

    def fingerprint(self) -> str:
        """Hex key of the manifest and the scale; with fixtures also of the files."""
        files = sorted(self.fixtures.glob("*.jsonl*")) if self.fixtures else []
        contents = [[path.name, hash_file(path)] for path in files]
        return hash_json(["hub", [asdict(hub_set) for hub_set in HUB_SETS], self.scale, contents])

    def describe(self) -> dict[str, Any]:
        """Facts for the manifest."""
        domains = sorted({hub_set.domain for hub_set in HUB_SETS})
        return {
            "name": "hub",
            "domains": domains,
            "licences": {
                domain: "; ".join(f"{s.name}: {s.licence}" for s in HUB_SETS if s.domain == domain)
                for domain in domains
            },
            "synthetic": dict.fromkeys(domains, False),
            "sets": [asdict(hub_set) for hub_set in HUB_SETS],
            "scale": self.scale,
        }

    def skipped(self) -> dict[str, Any]:
        """Per set: rows read, samples and documents taken, rows refused by reason."""
        return {name: dict(sorted(counts.items())) for name, counts in self._counts.items()}

    def _samples(self, hub_set: HubSet) -> int:
        return max(1, round(hub_set.samples * self.scale))

    def _documents(self, hub_set: HubSet, counts: Counter[str]) -> Iterator[Document]:
        rows = self._checked(hub_set, counts)
        for samples, identifier, text in JOINERS[hub_set.joiner](rows, counts):
            counts.update(samples=samples, documents=1)
            source = f"{hub_set.name}:{identifier.split('#')[0]}" if "#" in identifier else hub_set.name
            yield Document(text, hub_set.domain, source, identifier or str(counts["documents"]))
            if counts["samples"] >= self._samples(hub_set):
                return

    def _checked(self, hub_set: HubSet, counts: Counter[str]) -> Iterator[Row]:
        for row in self._load(hub_set):
            if not isinstance(row, Mapping):
                counts["no_row"] += 1
                continue
            missing = [column for column in hub_set.columns if column not in row]
            if missing:
                raise UserError(
                    f"{hub_set.repo} has no column {missing[0]!r} but {', '.join(row)}: "
                    f"its schema has changed, use data=builtin or data=jsonl."
                )
            counts["rows"] += 1
            yield row

    def _load_fixture(self, hub_set: HubSet) -> Iterator[Row]:
        assert self.fixtures is not None
        for path in (self.fixtures / f"{hub_set.name}.jsonl", self.fixtures / f"{hub_set.name}.jsonl.gz"):
            if path.is_file():
                yield from _rows_of(path)
                return
        raise UserError(
            f"No {hub_set.name}.jsonl in {self.fixtures}: the folder must hold one file for each set."
        )


def _rows_of(path: Path) -> Iterator[Row]:
    """The lines of a fixture; UserError naming the first that cannot be read."""
    opener, number = gzip.open if path.suffix == ".gz" else open, 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for line in file:
                number += 1
                yield json.loads(line)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        place = f"{path}:{number + isinstance(error, UnicodeDecodeError)}"
        raise UserError(f"{place}: cannot be read ({type(error).__name__}: {error}); mend it.") from error


def load_from_hub(hub_set: HubSet) -> Iterator[Row]:
    """Stream the rows of a set.

    Raises:
        UserError: if `datasets` is not installed or the Hub cannot be reached.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError("data=hub needs the package datasets: pip install nano_think[hub].") from error
    _check_network(hub_set)
    try:
        yield from datasets.load_dataset(
            hub_set.repo, hub_set.config, split=hub_set.split, revision=hub_set.revision, streaming=True
        )
    except Exception as error:  # the client raises types of five libraries for the same lack of a network
        raise _unreachable(hub_set, f"{type(error).__name__}: {error}".splitlines()[0]) from error


def _check_network(hub_set: HubSet) -> None:
    """Fail at once without network: the client itself would retry for half a minute for each set."""
    proxied = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "HF_ENDPOINT"))
    if proxied or os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE"):
        return
    try:
        socket.create_connection(("huggingface.co", 443), timeout=5).close()
    except OSError as error:
        raise _unreachable(hub_set, str(error)) from error


def _unreachable(hub_set: HubSet, reason: str) -> UserError:
    return UserError(
        f"Cannot read {hub_set.repo} from the Hugging Face Hub ({reason}): "
        f"check the network, or use data=builtin or data=jsonl data.root=DIR."
    )
