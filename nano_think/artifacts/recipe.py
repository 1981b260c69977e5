"""What an artefact is made from, and where it therefore lives."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nano_think.artifacts import provenance
from nano_think.files import hash_json

# Raised when the meaning of an artefact's files changes: older ones are then rebuilt instead of misread.
FORMAT = 1
COMPLETE_MARK = provenance.FILE


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the content of an artefact.

    kind: corpus, tokenizer, shards, an expert's name, mla_7a ... : the folder it is kept in.
    spec: plain values (networks, numbers, seeds) that decide its content, given its needs.
    needs: the recipes of the artefacts it is made from.
    command: what the user types to make it.
    """

    kind: str
    spec: dict[str, Any]
    needs: dict[str, Recipe] = field(default_factory=dict)
    command: str = ""

    @cached_property
    def hash(self) -> str:
        """12 hex digits over kind, spec and the hashes of all needs, computed without building anything."""
        needs = {name: need.hash for name, need in self.needs.items()}
        return hash_json({"format": FORMAT, "kind": self.kind, "spec": self.spec, "needs": needs})[:12]

    def path(self, root: Path) -> Path:
        """Where the artefact lives under the artefact root."""
        return root / self.kind / self.hash

    def exists(self, root: Path) -> bool:
        """Whether a complete artefact is there (folders appear complete, by rename)."""
        return (self.path(root) / COMPLETE_MARK).is_file()

    def lineage(self, root: Path | None = None) -> dict[str, Any]:
        """Kind, hash, spec and the lineage of all needs as plain values, for provenance files.

        root: of the artefacts; the content of every need that lies there is part of the answer then.
        """
        needs = {}
        for name, need in self.needs.items():
            needs[name] = need.lineage(root)
            if root is not None and need.exists(root):
                needs[name]["content"] = provenance.content_of(need.path(root))
        return {"kind": self.kind, "hash": self.hash, "spec": self.spec, "needs": needs}
