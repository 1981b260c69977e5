"""The scripts: aliases resolve to the same configuration, and generation needs a checkpoint and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nano_think.artifacts.build import build
from nano_think.artifacts.checkpoint import save_fused
from nano_think.tokenizer import train_bpe

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*command: str, cwd: Path | None = None, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env=ENVIRONMENT,
        input=text,
        check=False,
    )


@pytest.mark.parametrize(
    ("script", "call"),
    [
        (["pretrain_experts.py", "--expert", "state_space"], ["phase=expert", "expert=state_space"]),
        (["train_mla.py"], ["phase=mla", "expert=all"]),
    ],
    ids=["pretrain_experts", "train_mla"],
)
def test_an_alias_resolves_to_the_configuration_of_its_call(script: list[str], call: list[str]) -> None:
    more = ["size=tiny", "experts.state_space.d_conv=3", "--cfg", "job", "--resolve"]
    alias = run(f"scripts/{script[0]}", *script[1:], *more, cwd=ROOT)
    plain = run("train.py", *call, *more, cwd=ROOT)
    assert alias.returncode == plain.returncode == 0, alias.stderr + plain.stderr

    def settings(output: str) -> list[str]:
        # the time of the call is part of the run folder's name
        return [line for line in output.splitlines() if "outputs/" not in line]

    assert settings(alias.stdout) == settings(plain.stdout)
    assert "d_conv: 3" in alias.stdout
    assert f"= python train.py {' '.join([*call, *more[:2]])}" in alias.stderr


def test_pretrain_experts_demands_an_expert() -> None:
    result = run("scripts/pretrain_experts.py", "size=tiny", cwd=ROOT)
    assert result.returncode != 0
    assert "--expert" in result.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fused model that was never trained, in the layout of a published checkpoint."""
    path = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_bpe(["the cat sat on the mat and the dog sat on the cat"] * 20, 272)
    expert = {"_target_": "nano_think.experts.transformer.TransformerExpert"}
    expert |= {"d_model": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 16}
    other = {"_target_": "nano_think.experts.state_space.StateSpaceExpert"}
    other |= {"d_model": 16, "num_layers": 1, "d_inner": 16, "d_state": 4}
    spec = {
        "_target_": "nano_think.model.NanoThink",
        "experts": {"transformer": expert, "state_space": other},
        "vocab_size": tokenizer.vocab_size,
        "d_model": 16,
        "mla": {"_target_": "nano_think.mla.MultiHeadLatentAttention", "d_model": 16, "num_heads": 2},
        "router": {"_target_": "nano_think.mla.ExpertRouter", "d_model": 16, "num_experts": 2},
    }
    torch.manual_seed(0)
    save_fused(path, spec, build(spec), tokenizer, seq_len=32)
    return path


def generate(checkpoint: Path, *options: str, cwd: Path, text: str | None = None):
    return run(str(ROOT / "scripts/generate.py"), "--ckpt", str(checkpoint), *options, cwd=cwd, text=text)


def test_generate_writes_text_and_json_from_a_clean_directory(checkpoint: Path, tmp_path: Path) -> None:
    options = ["--prompt", 'the cat, "sat"', "--max-new-tokens", "5", "--json", "out.json"]
    result = generate(checkpoint, *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (record,) = json.loads((tmp_path / "out.json").read_text())
    assert record["experts"] == ["transformer", "state_space"]
    assert result.stdout == record["full_text"] + "\n"
    assert result.stdout.startswith('the cat, "sat"')
    assert 1 <= len(record["tokens"]) <= 5
    for token in record["tokens"]:
        assert sum(token["weights"].values()) == pytest.approx(1, abs=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_generate_reads_standard_input_and_repeats_itself(checkpoint: Path, tmp_path: Path) -> None:
    options = ["--max-new-tokens", "4", "--seed", "3"]
    first, second = (generate(checkpoint, *options, cwd=tmp_path, text="the dog\nsat") for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert first.stdout.startswith("the dog\nsat")


def test_generate_imports_neither_lightning_nor_hydra(checkpoint: Path, tmp_path: Path) -> None:
    argv = ["generate.py", "--ckpt", str(checkpoint), "--prompt", "the", "--max-new-tokens", "2"]
    code = (
        f"import runpy, sys; sys.argv = {argv!r}\n"
        f"runpy.run_path({str(ROOT / 'scripts/generate.py')!r}, run_name='__main__')\n"
        "print(sorted({'lightning', 'pytorch_lightning', 'hydra', 'omegaconf'} & set(sys.modules)))"
    )
    result = run("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--prompt", "the", "--top-k", "0"], "top_k=0"),
        (["--prompt", "the cat " * 100], "shorten"),
        (["--prompt-file", "missing.txt"], "missing.txt"),
    ],
    ids=["top_k", "long", "file"],
)
def test_bad_input_is_one_line(checkpoint: Path, tmp_path: Path, options: list[str], part: str) -> None:
    result = generate(checkpoint, *options, cwd=tmp_path)
    assert result.returncode != 0
    assert part in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_a_missing_checkpoint_names_the_command_that_makes_one(tmp_path: Path) -> None:
    result = generate(tmp_path / "nothing", "--prompt", "the", cwd=tmp_path)
    assert result.returncode != 0
    assert len(result.stderr.splitlines()) == 1
    assert "python train.py phase=mla expert=all" in result.stderr
