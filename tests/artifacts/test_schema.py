"""Checkpoints that were committed when their schema was current load for ever, and say what they said then."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from nano_think.artifacts import migrations, schema
from nano_think.artifacts.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_tensors,
    save_expert,
    save_tensors,
)
from nano_think.artifacts.memory import load_memory
from nano_think.errors import UserError
from nano_think.experts.transformer import TransformerExpert
from nano_think.model import ExpertLM

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


@pytest.fixture
def copied(tmp_path):
    """`copied(**changes)`: a committed Transformer with changes to its spec.json and without provenance."""

    def copy(**changes) -> Path:
        shutil.copytree(COMMITTED / "schema_0" / "transformer", tmp_path / "model")
        (tmp_path / "model" / "provenance.json").unlink()
        file = tmp_path / "model" / "spec.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return tmp_path / "model"

    return copy


@pytest.fixture
def later(tmp_path, monkeypatch):
    """`later(source)`: the code of a later version, which came with the migration `source` from today's schema."""

    def write(source: str) -> None:
        monkeypatch.setattr(migrations, "__path__", [*migrations.__path__, str(tmp_path)])
        name = f"from_{schema.current()}"
        monkeypatch.delitem(sys.modules, f"{migrations.__name__}.{name}", raising=False)
        (tmp_path / f"{name}.py").write_text(source)

    yield write
    for name in [name for name in sys.modules if name.startswith(f"{migrations.__name__}.from_")]:
        del sys.modules[name]


def test_a_model_of_today_states_the_present_schema(tmp_path, byte_tokenizer):
    model = ExpertLM((259, 8), TransformerExpert(8, 1, num_heads=2, ffn_dim=8))
    spec = {"_target_": "nano_think.experts.transformer.TransformerExpert", "d_model": 8}
    save_expert(
        tmp_path, "t", {**spec, "num_layers": 1, "num_heads": 2, "ffn_dim": 8}, model, byte_tokenizer, 8
    )
    assert json.loads((tmp_path / "spec.json").read_text())["schema"] == schema.current() == 1
    assert load_checkpoint(tmp_path).spec["schema"] == 1


def test_a_newer_schema_is_refused_in_a_sentence(copied):
    with pytest.raises(
        UserError, match=r"a newer nano_think \(schema 9, this version reads up to 1\): update"
    ):
        load_checkpoint(copied(schema=9), "make it")


@pytest.mark.parametrize("value", [-1, True, "1", 1.0, None, [1]])
def test_what_is_no_schema_is_no_checkpoint(copied, value):
    with pytest.raises(UserError, match="not a nano_think checkpoint: make one with `make it`"):
        load_checkpoint(copied(schema=value), "make it")


def test_a_migration_is_one_file_and_may_rename_what_the_spec_and_the_weights_say(copied, later):
    """As if today's version had once said `heads` for num_heads and `after_norm` for the final norm."""
    later(
        "def spec(description):\n"
        "    expert = dict(description['expert'])\n"
        "    expert['num_heads'] = expert.pop('heads')\n"
        "    return {**description, 'expert': expert, 'schema': 2}\n"
        "def weights(tensors):\n"
        "    return {name.replace('after_', ''): tensor for name, tensor in tensors.items()}\n"
    )
    folder = copied()
    old = json.loads((folder / "spec.json").read_text())
    old["expert"]["heads"] = old["expert"].pop("num_heads")
    (folder / "spec.json").write_text(json.dumps(old))
    tensors = load_tensors(folder / "expert.safetensors")
    save_tensors(
        folder / "expert.safetensors", {name.replace("norm", "after_norm"): t for name, t in tensors.items()}
    )
    checkpoint = load_checkpoint(folder)
    said = load_tensors(COMMITTED / "schema_0" / "transformer.said.safetensors")
    torch.testing.assert_close(_logits(checkpoint, said["tokens"]), said["logits"], **TOLERANCE)
    assert checkpoint.spec["schema"] == schema.current() == 2


def test_a_model_that_cannot_be_converted_is_refused_with_the_command_that_makes_it(copied, later):
    later("def spec(description):\n    raise ValueError('what its router pooled is not known')\n")
    with pytest.raises(
        UserError, match=r"what its router pooled is not known\): make it again with `make it`"
    ):
        load_checkpoint(copied(), "make it")


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "other"},
        {"kind": ["expert"]},
        {"seq_len": 0},
        {"seq_len": 10**12},
        {"seq_len": "32"},
        {"seq_len": True},
        {"name": None},
        {"name": "../x"},
        {"name": "a\nb"},
        {"expert": None},
        {"expert": [1]},
        {"expert": {"dropout": float("nan")}},
    ],
    ids=str,
)
def test_descriptions_that_could_not_be_ours_are_refused_with_the_command(copied, changes):
    with pytest.raises(UserError, match="make it again with `make it`"):
        load_checkpoint(copied(**changes), "make it")


def test_a_description_nested_beyond_measure_is_refused(copied):
    folder = copied()
    (folder / "spec.json").write_text('{"kind": ' + '{"a": ' * 100_000)
    with pytest.raises(UserError, match=r"no readable spec\.json"):
        load_checkpoint(folder)
