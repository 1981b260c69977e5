"""Checkpoints that were committed when their schema was current load for ever, and say what they said then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nano_think.artifacts.checkpoint import Checkpoint, load_checkpoint, load_tensors
from nano_think.artifacts.memory import load_memory

COMMITTED = Path(__file__).resolve().parents[1] / "data_files" / "checkpoints"
FOLDERS = sorted(path for path in COMMITTED.glob("schema_*/*") if path.is_dir())
# other processors and libraries round otherwise; the logits themselves are about 0.1
TOLERANCE = {"rtol": 1e-4, "atol": 2e-6}


def _logits(checkpoint: Checkpoint, tokens: torch.Tensor, memory=None) -> torch.Tensor:
    options = {} if memory is None else {"memory": memory}
    with torch.no_grad():
        return checkpoint.model(tokens, **options).logits[0, -3:]


def _unknown_document(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """A batch of one document that the memory does not know."""
    nowhere = torch.full_like(tokens, -1)
    positions = torch.arange(tokens.shape[1]).unsqueeze(0)
    return {
        "tokens": tokens,
        "positions": positions,
        "segments": torch.zeros_like(tokens),
        "doc_uid": nowhere,
        "cluster": nowhere,
    }


def test_every_kind_of_model_is_there_in_the_first_schema():
    kinds = {path.name for path in FOLDERS if path.parent.name == "schema_0"}
    assert kinds == {"transformer", "diffuser", "state_space", "nano_think"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_it_loads_and_says_what_it_said_when_it_was_written(folder):
    checkpoint = load_checkpoint(folder)
    said = load_tensors(folder.with_name(f"{folder.name}.said.safetensors"))
    torch.testing.assert_close(_logits(checkpoint, said["tokens"]), said["logits"], **TOLERANCE)
    assert checkpoint.name == ("fused" if folder.name == "nano_think" else folder.name)
    assert checkpoint.provenance["result"]
    memory = load_memory(folder / "memory")
    assert (memory is not None) == ("found" in said)
    if memory is not None:
        slots = memory.slots(_unknown_document(said["tokens"]))
        assert torch.equal(slots.hits.ids, said["found"])
        with_memory = _logits(checkpoint, said["tokens"], slots)
        torch.testing.assert_close(with_memory, said["logits_with_memory"], **TOLERANCE)
