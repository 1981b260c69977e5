"""The corpus that is always there: five domains without any download.

Code and technical prose come from the running Python; the other three domains from deterministic grammars
(`builtin_story`, `builtin_argument`, `builtin_scripture`) and are marked synthetic in every record.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from nano_think.data import builtin_argument, builtin_scripture, builtin_stdlib, builtin_story
from nano_think.data.builtin_words import Rng
from nano_think.data.documents import Document
from nano_think.errors import UserError
from nano_think.files import hash_json

# Raised whenever a grammar or a selection rule changes, so that prepared copies are not reused.
VERSION = 1

GRAMMARS: dict[str, dict[str, Callable[[Rng], str]]] = {
    "general": builtin_story.STORIES,
    "philosophy": builtin_argument.ARGUMENTS,
    "theology": builtin_scripture.SCRIPTURES,
}
LIBRARY: dict[str, Callable[[], Iterable[Document]]] = {
    "academic": builtin_stdlib.prose_documents,
    "code": builtin_stdlib.code_documents,
}
# No domain is more than this many times as large as another one.
MAX_IMBALANCE = 2.0
# A library document fills at most this share of its domain, so that also small splits hold several documents.
MIN_DOCUMENTS, SMALLEST_LIMIT = 64, 2048


class BuiltinSource:
    """Five domains of about the same size: academic, code, general, philosophy, theology.

    Args:
        megabytes: wanted size of all text together. Where the standard library has less documentation
            than a fifth of that, the other domains are held to twice as much as it has.
        seed: chooses the modules and drives the grammars; the same seed gives the same text.

    Raises:
        UserError: if `megabytes` is not positive.
    """

    def __init__(self, megabytes: float = 8.0, seed: int = 0) -> None:
        if megabytes <= 0:
            raise UserError(f"data.source.megabytes={megabytes} must be positive.")
        self.megabytes = megabytes
        self.seed = seed

    @property
    def text_bytes(self) -> int:
        """Of all text together."""
        return int(self.megabytes * 1e6)

    def __iter__(self) -> Iterator[Document]:
        budget = int(self.megabytes * 1e6 / (len(LIBRARY) + len(GRAMMARS)))
        chosen = [self._select(domain, budget) for domain in LIBRARY]
        sizes = [sum(map(_size, documents)) for documents in chosen]
        limit = int(min([budget, *(MAX_IMBALANCE * size for size in sizes if size)]))
        for documents in chosen:
            yield from _up_to(documents, limit)
        for domain in GRAMMARS:
            yield from self._generate(domain, limit)

    def fingerprint(self) -> str:
        """Hex key of the arguments, the grammars' version and the Python whose library is read."""
        python = [platform.python_implementation(), platform.python_version()]
        return hash_json(["builtin", VERSION, self.megabytes, self.seed, python])

    def describe(self) -> dict[str, Any]:
        """Facts for the manifest."""
        domains = sorted([*LIBRARY, *GRAMMARS])
        return {
            "name": "builtin",
            "domains": domains,
            "licences": {
                domain: builtin_stdlib.LICENCE if domain in LIBRARY else "generated text, free of rights"
                for domain in domains
            },
            "synthetic": {domain: domain in GRAMMARS for domain in domains},
            "grammars": {domain: list(kinds) for domain, kinds in GRAMMARS.items()},
            "megabytes": self.megabytes,
            "seed": self.seed,
            "python": platform.python_version(),
            "version": VERSION,
        }

    def skipped(self) -> dict[str, Any]:
        """Nothing is ever malformed here."""
        return {}

    def _select(self, domain: str, budget: int) -> list[Document]:
        longest = max(budget // MIN_DOCUMENTS, SMALLEST_LIMIT)
        documents = [document for document in LIBRARY[domain]() if _size(document) <= longest]
        order = Rng("library", domain, self.seed).sample(documents, len(documents))
        return list(_up_to(order, budget))

    def _generate(self, domain: str, budget: int) -> Iterator[Document]:
        kinds = list(GRAMMARS[domain])
        done = number = 0
        while done < budget:
            kind = kinds[number % len(kinds)]
            text = GRAMMARS[domain][kind](Rng(VERSION, self.seed, domain, number))
            yield Document(text, domain, f"synthetic:grammar/{kind}", f"{kind}-{self.seed}-{number}")
            done += len(text.encode())
            number += 1


def _size(document: Document) -> int:
    return len(document.text.encode())


def _up_to(documents: list[Document], budget: int) -> Iterator[Document]:
    """Yield documents as long as the next one still fits."""
    done = 0
    for document in documents:
        if done + _size(document) <= budget:
            done += _size(document)
            yield document
