from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn

from nano_think.artifacts.build import build
from nano_think.artifacts.checkpoint import (
    load_checkpoint,
    load_tensors,
    require_same_tokenizer,
    save_expert,
    save_fused,
    save_tensors,
)
from nano_think.errors import UserError
from nano_think.model import ExpertLM
from nano_think.tokenizer import train_bpe

VOCAB, D = 259, 16
COMMAND = "python train.py phase=expert expert=transformer"
SPECS = {
    "transformer": {
        "_target_": "nano_think.experts.transformer.TransformerExpert",
        "d_model": D, "num_layers": 2, "num_heads": 2, "ffn_dim": 32,
    },
    "state_space": {
        "_target_": "nano_think.experts.state_space.StateSpaceExpert",
        "d_model": D, "num_layers": 1, "d_inner": 24, "d_state": 4,
    },
    "diffuser": {
        "_target_": "nano_think.experts.diffuser.DiffuserExpert",
        "d_model": D, "num_layers": 1, "num_heads": 2, "ffn_dim": 32, "train_T": 20, "fused_steps": 2,
    },
}  # fmt: skip


def _expert(kind, randomise):
    model = randomise(ExpertLM((VOCAB, D), build(SPECS[kind])), scale=0.7).eval()
    if kind == "diffuser":
        model.expert.fit_statistics(torch.randn(50, D, generator=torch.Generator().manual_seed(0)))
    return model


@pytest.fixture
def saved(tmp_path, byte_tokenizer, randomise):
    def save(kind="transformer"):
        model = _expert(kind, randomise)
        save_expert(tmp_path / kind, kind, SPECS[kind], model, byte_tokenizer, 32)
        return model, tmp_path / kind

    return save


@pytest.mark.parametrize("kind", list(SPECS))
def test_an_expert_comes_back_with_bitwise_equal_logits(kind, saved, byte_tokenizer):
    model, path = saved(kind)
    loaded = load_checkpoint(path, COMMAND)
    tokens = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens).logits, model(tokens).logits)
    assert not loaded.model.training
    assert (loaded.kind, loaded.name, loaded.spec["seq_len"]) == ("expert", kind, 32)
    assert loaded.tokenizer.hash == byte_tokenizer.hash
    assert loaded.provenance == {}


def test_the_table_lies_beside_the_expert_and_there_is_no_private_head(saved):
    model, path = saved()
    assert set(load_tensors(path / "expert.safetensors")) == set(model.expert.state_dict())
    assert set(load_tensors(path / "embedding.safetensors")) == {"weight"}
    assert not any("head" in name or "embed" in name for name in load_tensors(path / "expert.safetensors"))


@pytest.mark.parametrize("private", [False, True])
def test_a_fused_model_comes_back_bitwise_and_stands_alone(private, tmp_path, byte_tokenizer, randomise):
    spec = {
        "_target_": "nano_think.model.NanoThink",
        "experts": SPECS,
        "vocab_size": VOCAB,
        "d_model": D,
        "mla": {"_target_": "nano_think.mla.MultiHeadLatentAttention", "d_model": D, "num_heads": 2},
        "router": {"_target_": "nano_think.mla.ExpertRouter", "d_model": D, "num_experts": 3},
    }
    if private:
        table = {"_target_": "torch.nn.Embedding", "num_embeddings": VOCAB, "embedding_dim": D}
        spec |= {"fusion": "prob", "expert_input": "raw", "tables": dict.fromkeys(SPECS, table)}
    model = randomise(build(spec)).eval()
    model.experts["diffuser"].fit_statistics(torch.randn(50, D, generator=torch.Generator().manual_seed(0)))
    save_fused(tmp_path / "model", spec, model, byte_tokenizer, 32)
    shutil.move(tmp_path / "model", tmp_path / "elsewhere")
    loaded = load_checkpoint(tmp_path / "elsewhere")
    tokens = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        one, other = model(tokens), loaded.model(tokens)
    assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.weights, other.weights)
    assert (loaded.kind, loaded.name) == ("nano_think", "fused")
    frozen = {name for name, p in loaded.model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(("experts.", "tables."))}


def _damage(path, how):
    """Break a checkpoint folder in one way."""
    if how == "gone":
        shutil.rmtree(path)
    elif how == "empty folder":
        shutil.rmtree(path)
        path.mkdir()
    elif how == "a file":
        shutil.rmtree(path)
        path.write_text("hello")
    elif how == "no weights":
        (path / "expert.safetensors").unlink()
    elif how == "cut weights":
        file = path / "expert.safetensors"
        file.write_bytes(file.read_bytes()[:-40])
    elif how == "weights are a folder":
        (path / "expert.safetensors").unlink()
        (path / "expert.safetensors").mkdir()
    elif how == "a pickle":
        torch.save({"a": torch.ones(2)}, path / "expert.safetensors")
    elif how == "other table":
        save_tensors(path / "embedding.safetensors", {"table": torch.ones(VOCAB, D)})
    elif how == "no tokenizer":
        shutil.rmtree(path / "tokenizer")
    elif how == "broken tokenizer":
        next((path / "tokenizer").glob("*.json")).write_text("{")
    elif how == "broken spec":
        (path / "spec.json").write_text('{"kind": "expert"')
    elif how == "broken provenance":
        (path / "provenance.json").write_text('{"kind"')
    else:
        spec = json.loads((path / "spec.json").read_text())
        if how == "unknown kind":
            spec["kind"] = "elsewhere"
        elif how == "a list":
            spec = [spec]
        elif how == "foreign class":
            spec["expert"]["_target_"] = "os.system"
        elif how == "unknown argument":
            spec["expert"]["flavour"] = "salty"
        elif how == "other width":
            spec["expert"]["ffn_dim"] = 48
        elif how == "no expert":
            del spec["expert"]
        (path / "spec.json").write_text(json.dumps(spec))


@pytest.mark.parametrize(
    "how",
    ["gone", "empty folder", "a file", "no weights", "cut weights", "weights are a folder", "a pickle",
     "other table", "no tokenizer", "broken tokenizer", "broken spec", "broken provenance", "unknown kind",
     "a list", "foreign class", "unknown argument", "other width", "no expert"],
)  # fmt: skip
def test_damaged_folders_are_one_sentence_that_names_the_command(how, saved):
    _, path = saved()
    _damage(path, how)
    with pytest.raises(UserError) as caught:
        load_checkpoint(path, COMMAND)
    assert f"`{COMMAND}`" in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_with_another_vocabulary_than_its_tokenizer_is_refused(tmp_path, randomise):
    model = _expert("transformer", randomise)
    save_expert(tmp_path / "t", "transformer", SPECS["transformer"], model, train_bpe(["aaaa"] * 9, 261), 32)
    with pytest.raises(UserError, match="259 tokens, its tokenizer 261"):
        load_checkpoint(tmp_path / "t", COMMAND)


def test_data_of_another_tokenizer_is_refused(saved, byte_tokenizer):
    _, path = saved()
    loaded = load_checkpoint(path)
    require_same_tokenizer(loaded, byte_tokenizer.hash)
    with pytest.raises(UserError, match="was trained with tokenizer"):
        require_same_tokenizer(loaded, "0" * 32)


def test_tensors_keep_every_bit(tmp_path):
    tensors = {"a": torch.randn(3, 4).T, "flag": torch.tensor(True), "b": torch.randn(2).bfloat16()}
    save_tensors(tmp_path / "x.safetensors", tensors)
    loaded = load_tensors(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert isinstance(nn.Parameter(loaded["a"]), nn.Parameter)
