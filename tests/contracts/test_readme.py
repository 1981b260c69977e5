"""Every command of the README works: checked quickly here, run at tiny size in the slow lane."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from nano_think.config import checked_overrides

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, flags=re.M | re.S)
LINES = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
TRAIN = [line for line in LINES if line.startswith("python train.py")]
MAKE = [line for line in LINES if line.startswith("make ")]
SHORT = [
    "size=tiny",
    "data.val_rows=4",
    "trainer.max_steps=4",
    "prereq.expert.trainer.max_steps=4",
    "prereq.mla.trainer.max_steps=4",
    "eval.rows=4",
    "eval.resamples=50",
    "eval.sample_tokens=8",
    "generate.max_new_tokens=8",
]


def words(line: str) -> list[str]:
    return shlex.split(line.replace("$CORPUS", "/corpus"))


def test_the_two_commands_come_first_and_every_line_is_known() -> None:
    assert LINES[:2] == ["make demo", "make test"]
    known = ("make ", "python train.py ", "python scripts/", "tensorboard --logdir outputs", "source .venv/")
    assert [line for line in LINES if not line.startswith(known)] == []
    assert any("phase=mla expert=all" in line for line in TRAIN)
    assert any(" -m " in line for line in TRAIN)
    assert any("data=jsonl" in line for line in TRAIN)


@pytest.mark.parametrize("line", TRAIN)
def test_a_training_command_composes(line: str) -> None:
    assert checked_overrides(words(line)[2:], ROOT)


@pytest.mark.parametrize("line", MAKE)
def test_a_make_command_exists(line: str) -> None:
    subprocess.run([*shlex.split(line), "-n"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("python scripts/")])
def test_a_script_exists_and_knows_its_options(line: str) -> None:
    script = words(line)[1]
    options = {word for word in words(line) if word.startswith("--")}
    result = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert all(option in result.stdout for option in options)


def test_files_and_folders_that_are_named_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_options_that_are_named_exist() -> None:
    for group in ("phase", "expert", "size", "data"):
        (named,) = re.findall(rf"`{group}=((?:\w+ ?){{2,}})`", README)
        exist = {path.stem for path in (ROOT / "conf" / group).glob("[!_]*.yaml")}
        assert set(named.split()) <= exist


def test_the_table_of_sizes_is_true(composed: Callable[..., DictConfig]) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| ([\d,]+) \| (\d+) \|", README, flags=re.M)
    assert len(rows) == 5
    for name, *numbers in rows:
        size = composed(f"size={name}").size
        assert [int(n.replace(",", "")) for n in numbers] == [size.d_model, size.vocab_size, size.seq_len]


def jsonl_corpus(folder: Path) -> None:
    """A few hundred short documents in two domains."""
    nouns, verbs = ["cat", "dog", "bird", "fish", "cow"], ["sees", "eats", "likes", "hears", "finds"]
    for domain in ("one", "two"):
        (folder / domain).mkdir(parents=True)
        with (folder / domain / "part.jsonl").open("w") as file:
            for i in range(400):
                parts = [f"the {nouns[(i * k) % 5]} {verbs[(i + k) % 5]} {i * k % 89}" for k in range(1, 9)]
                file.write(json.dumps({"text": f"{domain}: {', '.join(parts)}."}) + "\n")


@pytest.mark.slow
def test_every_command_runs_at_tiny_size_in_the_order_of_the_readme(tmp_path: Path) -> None:
    jsonl_corpus(tmp_path / "corpus")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CORPUS": str(tmp_path / "corpus"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for line in LINES:
        if not line.startswith("python "):
            continue
        command = re.sub(r"^python (train\.py|scripts/)", rf"python {ROOT}/\1", line)
        if line in TRAIN and "--cfg" not in line:
            source = "size.vocab_size=300" if "data=jsonl" in line else "data.source.megabytes=0.5"
            command += f" {shlex.join(SHORT)} {source}"
        result = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"{line}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    checkpoints = tmp_path / "outputs" / "checkpoints"
    assert (checkpoints / "state_space_expert" / "expert.safetensors").is_file()
    assert (checkpoints / "nano_think" / "model.safetensors").is_file()
    assert len(list((tmp_path / "outputs" / "sweeps" / "mla").glob("*/[0-3]/manifest.json"))) == 4
