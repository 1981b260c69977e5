"""The committed record of a study: everything its report is computed from, in one small folder.

    study.json              settings, data, models, tuning, fits, gates, evidence: plain JSON
    losses/test_seed1.npz   losses of every model on every document, one file a split and seed
    losses/ablations_seed1.npz  the same of what else was tried, on the documents of validation
    SHA256SUMS              of all of these; `sha256sum -c SHA256SUMS` checks the folder without our code

Letters: K models, M documents.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nano_think.errors import UserError
from nano_think.evals.losses import DocumentLosses
from nano_think.evals.report import plain
from nano_think.files import atomic_write

# Every model of a study, in the order of its tables: key -> baseline or stage it stands for.
MODELS: dict[str, str] = {
    "unigram": "B0",
    "bigram": "B0",
    "trigram": "B0",
    "transformer": "B1",
    "diffuser": "B1",
    "state_space": "B1",
    "uniform_prob": "B2",
    "uniform_hidden": "B2",
    "static": "B3, 7a",
    "fused_7b": "B4, 7b",
    "fused_7c": "B4, 7c",
    "fused_7d": "B4, 7d",
    "finetuned_transformer": "B5",
    "equal_parameters": "B6",
    "equal_training_flops": "B7",
    "equal_inference_flops": "B8",
    "seed_pool": "B9",
    "oracle_token": "B10",
    "oracle_document": "B10",
    "oracle_domain": "B10",
    "static_per_domain": "bound",
}
SPLITS = ("val", "test")
MAX_BYTES = 5_000_000
# rows of what else was tried, on validation: name, and name/expert or name/without memory
ABLATIONS = "ablations"
_LOSSES = re.compile(rf"(val|test|{ABLATIONS})_seed(\d+)\.npz")
_COLUMNS = ("uid", "domain", "num_tokens", "num_bytes")
# a list without lists, objects or strings inside; a JSON string holds no line break, so none can match
_FLAT_LIST = re.compile(r'\[\n\s*([^\[\]{}"]*?)\n\s*\]')


@dataclass(frozen=True)
class StudyLosses:
    """Losses of K models on the same M documents of one split under one seed, sorted by uid.

    Attributes:
        uid, domain, num_tokens, num_bytes: (M,) int64; see DocumentLosses.
        models: K keys of MODELS, or rows of ablations.
        nll: (K, M) float32, summed nats of each document.
    """

    uid: NDArray[np.int64]
    domain: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    models: tuple[str, ...]
    nll: NDArray[np.float32]

    @classmethod
    def collect(cls, losses: Mapping[str, DocumentLosses]) -> StudyLosses:
        """The losses of several models as one table.

        Raises:
            ValueError: no model, or two models were not scored on the same documents and tokens.
        """
        if not losses:
            raise ValueError("Give the losses of at least one model.")
        first_name, first = next(iter(losses.items()))
        columns = {name: getattr(first, name) for name in _COLUMNS}
        for key, given in losses.items():
            if not all(np.array_equal(columns[name], getattr(given, name)) for name in _COLUMNS):
                raise ValueError(f"{key} and {first_name} were not scored on the same documents and tokens.")
        nll = np.stack([given.sum_nll for given in losses.values()]).astype(np.float32)
        return cls(**columns, models=tuple(losses), nll=nll)

    def of(self, model: str, num_domains: int) -> DocumentLosses:
        """The losses of one model.

        Raises:
            KeyError: it is not among `models`.
        """
        if model not in self.models:
            raise KeyError(model)
        row = self.nll[self.models.index(model)].astype(np.float64)
        return DocumentLosses(self.uid, self.domain, row, self.num_tokens, self.num_bytes, num_domains)

    def to_bytes(self) -> bytes:
        """A compressed .npz file; the same losses give the same bytes."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **(vars(self) | {"models": np.array(self.models)}))
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> StudyLosses:
        """Read what `to_bytes` wrote.

        Raises:
            ValueError: something else, or columns that do not fit each other.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                columns = {name: arrays[name] for name in (*_COLUMNS, "models", "nll")}
        except Exception as error:  # a damaged archive fails in many ways, all of which mean the same
            raise ValueError(f"it is no file of losses ({error})") from None
        result = cls(**(columns | {"models": tuple(columns["models"].tolist())}))
        result._check()
        return result

    def _check(self) -> None:
        documents = len(self.uid)
        if any(getattr(self, name).shape != (documents,) for name in _COLUMNS):
            raise ValueError("its columns are not equally long")
        if self.nll.shape != (len(self.models), documents):
            raise ValueError(f"its losses have the shape {self.nll.shape}, not (models, documents)")
        if not np.isfinite(self.nll).all():
            raise ValueError("it holds losses that are not finite")
        if documents == 0 or (np.diff(self.uid) <= 0).any() or (self.num_tokens < 1).any():
            raise ValueError("its documents must be sorted by uid, each once and with a token")


@dataclass(frozen=True)
class StudyRecord:
    """What a study measured; a report is a function of this alone.

    Attributes:
        facts: the content of study.json; `data.domains`, `models` and `seeds` are needed.
        losses: by (split, seed).
        hashes: SHA-256 of each file it was read from; empty for a record that was not read.
        changed: files that do not match SHA256SUMS; the report names them.
    """

    facts: dict[str, Any]
    losses: dict[tuple[str, int], StudyLosses]
    hashes: Mapping[str, str] = field(default_factory=dict)
    changed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_facts()
        self._check_losses()

    @property
    def domains(self) -> list[str]:
        """Names in the order of the domain index."""
        return list(self.facts["data"]["domains"])

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """What study.json says of each model, in the order of MODELS."""
        return {key: self.facts["models"][key] for key in MODELS if key in self.facts["models"]}

    @property
    def seeds(self) -> dict[int, dict[str, Any]]:
        """What study.json says of each seed."""
        return {int(seed): facts for seed, facts in sorted(self.facts["seeds"].items(), key=_number)}

    def scored_seeds(self, model: str, split: str = "test") -> list[int]:
        """Seeds under which the model was scored on the split."""
        return [
            seed for (s, seed), part in sorted(self.losses.items()) if s == split and model in part.models
        ]

    def of(self, model: str, split: str, seed: int) -> DocumentLosses:
        """Losses of one model.

        Raises:
            KeyError: it was not scored on that split under that seed; see `missing`.
        """
        return self.losses[split, seed].of(model, len(self.domains))

    def missing(self) -> list[str]:
        """Plain statements of what a whole study would hold and this one does not."""
        planned = self.facts.get("settings", {}).get("seeds", list(self.seeds))
        found = []
        if absent := [str(seed) for seed in planned if int(seed) not in self.seeds]:
            found.append(f"seed {', '.join(absent)}: not run")
        if absent := [key for key in MODELS if key not in self.facts["models"]]:
            found.append(f"never built: {', '.join(absent)}")
        for seed in self.seeds:
            for split in SPLITS:
                if (split, seed) not in self.losses:
                    found.append(f"seed {seed}: no losses on {split}")
                elif absent := [key for key in self.models if key not in self.losses[split, seed].models]:
                    found.append(f"seed {seed}: not scored on {split}: {', '.join(absent)}")
        tried = {name for facts in self.seeds.values() for name in facts.get(ABLATIONS, {})}
        if absent := [name for name in self.facts.get("planned_ablations", []) if name not in tried]:
            found.append(f"ablations not run: {', '.join(absent)}")
        return found

    def digest(self) -> str:
        """SHA-256 over the names and hashes of all files: one changed byte anywhere changes it."""
        return _sha256(_sums(self.hashes or _hashes(self._files())).encode())

    def save(self, directory: str | Path) -> str:
        """Write the folder, SHA256SUMS last; files of losses that the record does not hold are removed.

        Returns:
            The digest of what was written.

        Raises:
            UserError: more than 5 MB in all; nothing is written then.
        """
        directory, files = Path(directory), self._files()
        total = sum(len(data) for data in files.values())
        if total > MAX_BYTES:
            raise UserError(
                f"The record of the study takes {total / 1e6:.2f} MB, more than the {MAX_BYTES / 1e6:g} MB "
                "that may be committed: score fewer documents or shorten the histories."
            )
        for name, data in files.items():
            atomic_write(directory / name, data)
        for path in _loss_files(directory):
            if path.relative_to(directory).as_posix() not in files:
                path.unlink()
        sums = _sums(_hashes(files))
        atomic_write(directory / "SHA256SUMS", sums)
        return _sha256(sums.encode())

    @classmethod
    def load(cls, directory: str | Path) -> StudyRecord:
        """Read what `save` wrote, also after it was edited by hand: `changed` then names the files.

        Raises:
            UserError: there is no study.json, or a file is damaged or names models or seeds that do not exist.
        """
        directory = Path(directory)
        if not (directory / "study.json").is_file():
            raise UserError(
                f"{directory} holds no study.json: run phase=study, or give the folder of a study."
            )
        files = {"study.json": (directory / "study.json").read_bytes()}
        losses: dict[tuple[str, int], StudyLosses] = {}
        for path in _loss_files(directory):
            split, seed = _LOSSES.fullmatch(path.name).groups()  # type: ignore[union-attr]
            data = files[f"losses/{path.name}"] = path.read_bytes()
            try:
                losses[split, int(seed)] = StudyLosses.from_bytes(data)
            except ValueError as error:
                raise UserError(
                    f"{path} cannot be used: {error}. Restore it or run the seed again."
                ) from None
        try:
            facts = json.loads(files["study.json"])
        except ValueError as error:
            raise UserError(f"{directory / 'study.json'} is no JSON: {error}.") from None
        hashes = _hashes(files)
        return cls(facts, losses, hashes, _changed(directory / "SHA256SUMS", hashes))

    def _files(self) -> dict[str, bytes]:
        text = json.dumps(plain(self.facts), indent=1, ensure_ascii=False, allow_nan=False)
        flat = _FLAT_LIST.sub(lambda match: "[" + " ".join(match[1].split()) + "]", text)
        parts = {
            f"losses/{split}_seed{seed}.npz": part for (split, seed), part in sorted(self.losses.items())
        }
        return {"study.json": (flat + "\n").encode()} | {name: p.to_bytes() for name, p in parts.items()}

    def _check_facts(self) -> None:
        facts = self.facts
        if not isinstance(facts, dict) or not {"data", "models", "seeds"} <= facts.keys():
            raise UserError("study.json must hold data, models and seeds: run phase=study to write it.")
        if not facts["data"].get("domains"):
            raise UserError(
                "study.json names no domains (data.domains), so no loss could be shown by domain."
            )
        if wrong := [seed for seed in facts["seeds"] if not str(seed).isdigit()]:
            raise UserError(f"study.json: {wrong[0]!r} is no seed; seeds are whole numbers.")
        _refuse_unknown(facts["models"], MODELS, "study.json describes", "a study")

    def _check_losses(self) -> None:
        for (split, seed), part in self.losses.items():
            name = f"losses/{split}_seed{seed}.npz"
            if seed not in self.seeds:
                known = ", ".join(map(str, self.seeds)) or "none"
                raise UserError(
                    f"{name}: study.json knows no seed {seed} (it has {known}); remove the file or "
                    "run that seed."
                )
            if split == ABLATIONS:
                tried = {model.split("/")[0]: None for model in part.models}
                _refuse_unknown(tried, self.seeds[seed].get(ABLATIONS, {}), f"{name} holds", "study.json")
            else:
                _refuse_unknown(part.models, self.facts["models"], f"{name} holds", "study.json")
            if part.domain.min() < 0 or part.domain.max() >= len(self.domains):
                raise UserError(f"{name}: a domain index is outside the {len(self.domains)} of study.json.")
            same = "val" if split == ABLATIONS else split
            first = next(other for (s, _), other in self.losses.items() if s == same)
            if not all(np.array_equal(getattr(part, name), getattr(first, name)) for name in _COLUMNS):
                raise UserError(
                    f"{name} was scored on other documents than the other seeds: run all seeds on one corpus."
                )


def _refuse_unknown(given: Iterable[str], known: Iterable[str], what: str, where: str) -> None:
    known = list(known)
    if unknown := [key for key in given if key not in known]:
        raise UserError(
            f"{what} models that {where} does not have: {', '.join(unknown)}. Known: {', '.join(known)}."
        )


def _number(item: tuple[str, Any]) -> int:
    return int(item[0])


def _loss_files(directory: Path) -> list[Path]:
    folder = directory / "losses"
    return (
        sorted(path for path in folder.iterdir() if _LOSSES.fullmatch(path.name)) if folder.is_dir() else []
    )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _hashes(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: _sha256(data) for name, data in files.items()}


def _sums(hashes: Mapping[str, str]) -> str:
    return "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes))


def _changed(path: Path, hashes: Mapping[str, str]) -> tuple[str, ...]:
    """Files whose hash is not the one in SHA256SUMS, that it lacks, or that only it names."""
    lines = path.read_text().splitlines() if path.is_file() else []
    listed = {name: digest for digest, name in (line.split("  ", 1) for line in lines if "  " in line)}
    return tuple(n for n in sorted(hashes.keys() | listed.keys()) if hashes.get(n) != listed.get(n))
