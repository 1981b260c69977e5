"""`phase=generate` with models that read later tokens: their texts are marked, or cannot be made at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nano_think.artifacts.build import build
from nano_think.artifacts.checkpoint import save_expert, save_fused
from nano_think.artifacts.memory import build_memory, save_memory
from nano_think.errors import UserError
from nano_think.model import ExpertLM

D, CHUNK = 16, 8
TRANSFORMER = {"_target_": "nano_think.experts.transformer.TransformerExpert", "d_model": D}
TRANSFORMER |= {"num_layers": 1, "num_heads": 2, "ffn_dim": 24}
DIFFUSER = {"_target_": "nano_think.experts.diffuser.DiffuserExpert", "d_model": D, "bidirectional": True}
DIFFUSER |= {"num_layers": 1, "num_heads": 2, "ffn_dim": 24, "max_positions": 64}
PROMPT = "prompt=a chunk and more"


@pytest.fixture
def make(randomise, byte_tokenizer, tmp_path):
    """`make(retrieval, router)`: the folder of a fused model of noise with a memory of its own."""

    def checkpoint(retrieval: dict[str, Any], router: dict[str, Any]) -> Path:
        path, vocab_size = tmp_path / "model", byte_tokenizer.vocab_size
        mla = {"_target_": "nano_think.mla.MultiHeadLatentAttention", "d_model": D, "num_heads": 2}
        spec = {"_target_": "nano_think.model.NanoThink", "vocab_size": vocab_size, "d_model": D}
        spec |= {"experts": {"transformer": TRANSFORMER}, "mla": mla | {"memory": True}}
        spec["router"] = {"_target_": "nano_think.mla.ExpertRouter", "d_model": D, "num_experts": 1} | router
        model = randomise(build(spec))
        save_fused(path, spec, model, byte_tokenizer, 64)
        tokens = torch.randint(256, (20, 2 * CHUNK), generator=torch.Generator().manual_seed(0))
        row = torch.arange(2 * CHUNK).expand_as(tokens)
        uid = torch.arange(20).unsqueeze(1).expand_as(tokens)
        batch = {"tokens": tokens, "positions": row, "segments": row * 0, "doc_uid": uid, "cluster": uid}
        batch["domain"] = torch.zeros(20, dtype=torch.int64)
        settings = {"k": 2, "chunk": CHUNK, **retrieval}
        save_memory(build_memory(model, [batch], settings, {"backend": "torch"}), path / "memory")
        return path

    return checkpoint


def generate(project, ckpt: Path) -> tuple[dict[str, Any], dict[str, Any], Any]:
    result, run = project.go("phase=generate", f"ckpt={ckpt}", PROMPT, "generate.max_new_tokens=3")
    (written,) = json.loads(Path(result["json"]).read_text())
    return result, written, run


def test_the_colours_of_the_settings_reach_the_output(make, project, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    settings = ("phase=generate", f"ckpt={make({}, {})}", PROMPT, "generate.max_new_tokens=3")
    project.go(*settings)
    assert "most trusted" not in capsys.readouterr().out
    project.go(*settings, "generate.color=always")
    assert "most trusted" in capsys.readouterr().out
    with pytest.raises(UserError, match="color=red is not known"):
        project.go(*settings, "generate.color=red")


def test_text_of_a_leaky_model_is_marked_on_screen_and_in_json(make, project, printed):
    result, written, run = generate(project, make({"write_on_read": True}, {}))
    assert "NOT CAUSAL: retrieval.write_on_read=true" in printed(run)
    assert written["mark"] == result["mark"]
    assert written["mark"].startswith("NOT CAUSAL: retrieval.write_on_read=true")
    assert 1 <= len(written["tokens"]) <= 3


def test_text_of_a_causal_model_is_not(make, project, printed):
    result, written, run = generate(project, make({}, {}))
    assert "NOT CAUSAL" not in printed(run)
    assert "mark" not in {**written, **result}
    assert written["full_text"].startswith("a chunk and more")


@pytest.mark.parametrize(
    ("retrieval", "router", "option"),
    [
        ({"granularity": "sequence"}, {}, "retrieval.granularity=sequence"),
        ({}, {"pool": "sequence"}, "router.pool=sequence"),
    ],
)
def test_what_cannot_decode_says_so_in_one_sentence(make, project, retrieval, router, option):
    with pytest.raises(UserError, match=f"cannot generate: {option} reads later tokens and cannot decode"):
        generate(project, make(retrieval, router))


def test_a_bidirectional_denoiser_alone_cannot_generate(randomise, byte_tokenizer, project, tmp_path):
    model = ExpertLM((byte_tokenizer.vocab_size, D), randomise(build(DIFFUSER)))
    model.expert.fit_statistics(torch.randn(9, D, generator=torch.Generator().manual_seed(0)))
    save_expert(tmp_path / "expert", "diffuser", DIFFUSER, model, byte_tokenizer, 64)
    with pytest.raises(UserError, match=r"cannot generate: .*bidirectional=true reads later"):
        generate(project, tmp_path / "expert")
