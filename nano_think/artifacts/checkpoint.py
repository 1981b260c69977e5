"""Models on disk: safetensors, a plain spec, provenance and the tokenizer, all in one folder.

expert.safetensors | model.safetensors    weights, every tensor once
embedding.safetensors                     (experts) the table that is both input and tied head
spec.json                                 `_target_` notation with all defaults written out
tokenizer/                                the tokenizer the model was trained with
provenance.json                           what it was made from: hashes, seeds, numbers, result
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from nano_think.artifacts.build import build, complete
from nano_think.errors import UserError
from nano_think.files import atomic_write, write_json
from nano_think.model import ExpertLM, NanoThink
from nano_think.tokenizer import Tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """A model with all that is needed to use it."""

    path: Path
    model: ExpertLM | NanoThink
    tokenizer: Tokenizer
    spec: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def kind(self) -> str:
        """`expert` or `nano_think`."""
        return self.spec["kind"]

    @property
    def name(self) -> str:
        """The expert's name, or `fused`."""
        return self.spec.get("name", "fused")


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors, by temporary name and rename."""
    atomic_write(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read safetensors; raises UserError for a file that is missing, cut short or something else."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} is missing or damaged ({error}): delete its folder and make it again"
        ) from error


def save_expert(
    path: Path, name: str, spec: dict[str, Any], model: ExpertLM, tokenizer: Tokenizer, seq_len: int
) -> None:
    """Write one pre-trained expert: its own weights, and the table beside them in a file of its own."""
    save_tensors(path / "expert.safetensors", model.expert.state_dict())
    save_tensors(path / "embedding.safetensors", {"weight": model.embedding.weight})
    tokenizer.save(path / "tokenizer")
    description = {"kind": "expert", "name": name, "seq_len": seq_len, "expert": complete(spec)}
    write_json(path / "spec.json", description)


def save_fused(
    path: Path, spec: dict[str, Any], model: NanoThink, tokenizer: Tokenizer, seq_len: int
) -> None:
    """Write a whole NanoThink, the frozen experts included, so that the folder stands alone."""
    save_tensors(path / "model.safetensors", model.state_dict())
    tokenizer.save(path / "tokenizer")
    write_json(path / "spec.json", {"kind": "nano_think", "seq_len": seq_len, "model": complete(spec)})


def read_spec(path: Path, how_to_make: str) -> dict[str, Any]:
    """The spec of a checkpoint folder; raises UserError naming `how_to_make` where there is none."""
    if not path.exists():
        raise UserError(f"there is no checkpoint at {path}: make it with `{how_to_make}`")
    try:
        spec = json.loads((path / "spec.json").read_text())
        if spec["kind"] not in ("expert", "nano_think"):
            raise KeyError(spec["kind"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a nano_think checkpoint (no readable spec.json): make one with `{how_to_make}`"
        ) from error
    return spec


def load_checkpoint(
    path: str | Path, how_to_make: str = "python train.py phase=mla expert=all"
) -> Checkpoint:
    """Load a checkpoint folder, strictly; the model is in eval mode.

    Raises UserError for a missing, damaged or foreign folder, naming the command that makes a right one.
    """
    path = Path(path)
    spec = read_spec(path, how_to_make)
    try:
        tokenizer = Tokenizer.load(path / "tokenizer")
        model = _load_expert(path, spec) if spec["kind"] == "expert" else _load_fused(path, spec)
        provenance = _read_provenance(path)
    except UserError as error:
        raise UserError(f"{error}; for the whole checkpoint: `{how_to_make}`") from error
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        message = str(error).splitlines()[0]
        raise UserError(
            f"{path} does not fit this version of the code ({message}): make it again with `{how_to_make}`"
        ) from error
    if model.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{path}: the model has {model.vocab_size} tokens, its tokenizer {tokenizer.vocab_size}: "
            f"make it again with `{how_to_make}`"
        )
    return Checkpoint(path, model.eval(), tokenizer, spec, provenance)


def _read_provenance(path: Path) -> dict[str, Any]:
    """What the folder was made from; empty for a model that somebody saved by hand."""
    file = path / "provenance.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _load_expert(path: Path, spec: dict[str, Any]) -> ExpertLM:
    table = load_tensors(path / "embedding.safetensors")["weight"]
    expert = build(spec["expert"])
    expert.load_state_dict(load_tensors(path / "expert.safetensors"))
    return ExpertLM(nn.Embedding.from_pretrained(table, freeze=False), expert)


def _load_fused(path: Path, spec: dict[str, Any]) -> NanoThink:
    model = build(spec["model"])
    model.load_state_dict(load_tensors(path / "model.safetensors"))
    model.freeze_experts()
    return model


def require_same_tokenizer(checkpoint: Checkpoint, tokenizer_hash: str) -> None:
    """Raises UserError where a model meets data that another tokenizer made."""
    if checkpoint.tokenizer.hash != tokenizer_hash:
        raise UserError(
            f"{checkpoint.path} was trained with tokenizer {checkpoint.tokenizer.hash[:12]}, the data uses "
            f"{tokenizer_hash[:12]}: evaluate on data prepared with its own tokenizer, or train it again"
        )
