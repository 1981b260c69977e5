"""Models on disk: safetensors, a plain spec, provenance and the tokenizer, all in one folder.

expert.safetensors | model.safetensors    weights, every tensor once
embedding.safetensors                     (experts) the table that is both input and tied head
spec.json                                 schema, and `_target_` notation with all defaults written out
tokenizer/                                the tokenizer the model was trained with
provenance.json                           what it was made from: hashes, seeds, numbers, result

A folder may come from anywhere. Reading one executes nothing that it brings, takes memory in proportion to its
size, and ends in a model or in one sentence.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from nano_think.artifacts import provenance, schema
from nano_think.artifacts.build import complete
from nano_think.artifacts.restore import restore
from nano_think.errors import UserError, brief
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
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{path} is missing or damaged ({brief(error)}): delete its folder and make it again"
        ) from error


def save_expert(
    path: Path, name: str, spec: dict[str, Any], model: ExpertLM, tokenizer: Tokenizer, seq_len: int
) -> None:
    """Write one pre-trained expert: its own weights, and the table beside them in a file of its own."""
    save_tensors(path / "expert.safetensors", model.expert.state_dict())
    save_tensors(path / "embedding.safetensors", {"weight": model.embedding.weight})
    tokenizer.save(path / "tokenizer")
    description = {"kind": "expert", "name": name, "seq_len": seq_len, "expert": complete(spec)}
    write_json(path / "spec.json", {"schema": schema.current(), **description})


def save_fused(
    path: Path, spec: dict[str, Any], model: NanoThink, tokenizer: Tokenizer, seq_len: int
) -> None:
    """Write a whole NanoThink, the frozen experts included, so that the folder stands alone."""
    save_tensors(path / "model.safetensors", model.state_dict())
    tokenizer.save(path / "tokenizer")
    description = {"kind": "nano_think", "seq_len": seq_len, "model": complete(spec)}
    write_json(path / "spec.json", {"schema": schema.current(), **description})


def load_checkpoint(
    path: str | Path, how_to_make: str = "python train.py phase=mla expert=all"
) -> Checkpoint:
    """Load a checkpoint folder, strictly; the model is in eval mode.

    Raises UserError for a missing, damaged, exchanged or foreign folder, naming the command that makes a right
    one.
    """
    path = Path(path)
    spec, written = schema.read_spec(path, how_to_make)
    try:
        made = provenance.read(path)
        provenance.verify(path, made)
        if (root := provenance.root_of(path, made)) is not None:
            provenance.verify_needs(root, made)
        tokenizer = Tokenizer.load(path / "tokenizer")
        model = (
            _load_expert(path, spec, written)
            if spec["kind"] == "expert"
            else _load_fused(path, spec, written)
        )
    except UserError as error:
        raise UserError(f"{error}; for the whole checkpoint: `{how_to_make}`") from error
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} does not fit this version of the code ({brief(error)}): make it again with `{how_to_make}`"
        ) from error
    if model.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{path}: the model has {model.vocab_size} tokens, its tokenizer {tokenizer.vocab_size}: "
            f"make it again with `{how_to_make}`"
        )
    return Checkpoint(path, model.eval(), tokenizer, spec, made)


def _load_expert(path: Path, spec: dict[str, Any], written: int) -> ExpertLM:
    table = load_tensors(path / "embedding.safetensors")
    weights = schema.migrated(load_tensors(path / "expert.safetensors"), written)
    if set(table) != {"weight"} or table["weight"].dim() != 2 or not table["weight"].is_floating_point():
        raise ValueError("embedding.safetensors is no table of tokens")
    expert = restore(
        spec["expert"], weights, lambda made: _decodes(made) and made.d_model == table["weight"].shape[1]
    )
    return ExpertLM(nn.Embedding.from_pretrained(table["weight"], freeze=False), expert)


def _load_fused(path: Path, spec: dict[str, Any], written: int) -> NanoThink:
    weights = schema.migrated(load_tensors(path / "model.safetensors"), written)
    model: Any = restore(spec["model"], weights, _is_whole)
    model.freeze_experts()
    return model


def _decodes(network: Any) -> bool:
    """Whether this is an expert: torch's layers have weights too, but nothing to decode with."""
    return hasattr(network, "d_model") and hasattr(network, "init_state") and hasattr(network, "extend")


def _is_whole(network: Any) -> bool:
    """Whether this is a `NanoThink` all of whose experts are experts of its width."""
    if not isinstance(network, NanoThink):
        return False
    width = network.embedding.embedding_dim
    return all(_decodes(expert) and expert.d_model == width for expert in network.experts.values())


def require_same_tokenizer(checkpoint: Checkpoint, tokenizer_hash: str) -> None:
    """Raises UserError where a model meets data that another tokenizer made."""
    if checkpoint.tokenizer.hash != tokenizer_hash:
        raise UserError(
            f"{checkpoint.path} was trained with tokenizer {checkpoint.tokenizer.hash[:12]}, the data uses "
            f"{tokenizer_hash[:12]}: evaluate on data prepared with its own tokenizer, or train it again"
        )
