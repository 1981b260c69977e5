"""`train.py` as a user meets it: a mistake is one line, and leaves nothing half-made behind."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from torch import nn

from nano_think.artifacts.build import build
from nano_think.artifacts.checkpoint import save_expert
from nano_think.model import ExpertLM
from nano_think.tokenizer import train_bpe

ROOT = Path(__file__).resolve().parents[1]
SENTENCES = ["the cat sat on the mat", "a dog ran over the hill", "no bird sings in the rain", "we eat bread"]

Train = Callable[..., str]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Train:
    """`train("phase=mla", ...)` runs train.py in this process; returns its error line, "" for success."""

    def call(*arguments: str) -> str:
        GlobalHydra.instance().clear()
        argv = ["train.py", *arguments, f"run.root={tmp_path / 'outputs'}", "size=tiny"]
        monkeypatch.setattr(sys, "argv", argv)
        try:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        except SystemExit as end:
            return str(end.code or "")
        return ""

    return call


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two domains of a few short documents in the layout of data=jsonl."""
    for domain in ("one", "two"):
        folder = tmp_path / "texts" / domain
        folder.mkdir(parents=True)
        lines = [
            json.dumps({"text": f"{domain} {i}: {SENTENCES[i % 4]}, then {SENTENCES[(i // 4) % 4]} {i * i}"})
            for i in range(60)
        ]
        (folder / "part.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "texts"


PROVENANCE = {"kind": "transformer", "hash": "0123abcd", "needs": {}, "result": {"tokens": 1000}}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A Transformer expert that was never trained, with a tokenizer of its own."""
    path = tmp_path / "checkpoint"
    tokenizer = train_bpe(SENTENCES * 20, 270)
    spec = {"_target_": "nano_think.experts.transformer.TransformerExpert"}
    spec |= {"d_model": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 16}
    model = ExpertLM(nn.Embedding(tokenizer.vocab_size, 16), build(spec))
    save_expert(path, "transformer", spec, model, tokenizer, seq_len=32)
    (path / "provenance.json").write_text(json.dumps(PROVENANCE))
    return path


def assert_one_line(message: str, *parts: str) -> None:
    assert message.startswith("error: ")
    assert "\n" not in message
    for part in parts:
        assert part in message


def assert_nothing_half_made(root: Path) -> None:
    """Only complete artefacts, and run folders that say how they ended."""
    for path in root.rglob("*"):
        assert not path.name.endswith((".tmp", ".new", ".ckpt")), path
    for artefact in root.glob("artifacts/*/*"):
        assert (artefact / "provenance.json").is_file(), artefact
    for manifest in root.glob("runs/**/manifest.json"):
        assert json.loads(manifest.read_text())["status"] == "failed"
    assert not (root / "checkpoints").exists()


def test_generation_waits_for_neither_lightning_nor_a_compiler(checkpoint: Path, tmp_path: Path) -> None:
    """Most of a cold start would be these imports."""
    code = "import runpy, sys, atexit; heavy = {'lightning', 'torch._dynamo', 'sympy'}; "
    code += "atexit.register(lambda: print(sorted(heavy & set(sys.modules)))); "
    code += "runpy.run_path('train.py', run_name='__main__')"
    options = [
        "phase=generate",
        "size=tiny",
        f"ckpt={checkpoint}",
        "prompt=the cat",
        "generate.max_new_tokens=3",
    ]
    command = [sys.executable, "-c", code, *options, f"run.root={tmp_path / 'outputs'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


def test_a_mistake_on_the_real_command_line_leaves_no_file(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "phase=mla", "expert=transformer"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert_one_line(line, "expert=all")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argument", ["seeed=1", "expert=unknown", "stage=9", "data=jsonl"])
def test_what_the_configuration_shows_is_refused_before_a_run_folder_exists(
    train: Train, tmp_path: Path, argument: str
) -> None:
    assert_one_line(train(argument))
    assert not (tmp_path / "outputs").exists()


def test_a_single_expert_is_refused_before_data_is_looked_at(train: Train, tmp_path: Path) -> None:
    message = train("phase=mla", "expert=diffuser", "data=jsonl", f"data.root={tmp_path / 'missing'}")
    assert_one_line(message, "expert=all")


def test_required_prerequisites_are_named_with_their_command(
    train: Train, corpus: Path, tmp_path: Path
) -> None:
    message = train("phase=mla", "prerequisites=require", "data=jsonl", f"data.root={corpus}")
    assert_one_line(message, "is missing", "`python train.py phase=", f"data.root={corpus}", "size=tiny")
    assert_nothing_half_made(tmp_path / "outputs")


def test_an_empty_data_folder(train: Train, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    message = train("phase=data", "data=jsonl", f"data.root={tmp_path / 'texts'}")
    assert_one_line(message, str(tmp_path / "texts"), "<domain>/*.jsonl")
    assert_nothing_half_made(tmp_path / "outputs")


def test_a_broken_line_is_named_where_it_is_fatal(train: Train, corpus: Path, tmp_path: Path) -> None:
    with (corpus / "one" / "part.jsonl").open("a") as file:
        file.write('{"text": \n')
    options = ["phase=data", "data=jsonl", f"data.root={corpus}", "data.source.on_error=fatal"]
    assert_one_line(train(*options), "part.jsonl", "61")
    assert_nothing_half_made(tmp_path / "outputs")


def test_a_vocabulary_that_the_text_cannot_fill(train: Train, corpus: Path, tmp_path: Path) -> None:
    options = ["phase=tokenizer", "data=jsonl", f"data.root={corpus}", "size.vocab_size=30000"]
    assert_one_line(train(*options), "vocab_size=30000", "or lower")
    assert_nothing_half_made(tmp_path / "outputs")


def test_a_checkpoint_of_another_tokenizer(
    train: Train, corpus: Path, checkpoint: Path, tmp_path: Path
) -> None:
    options = ["phase=eval", "expert=transformer", f"ckpt={checkpoint}", "data=jsonl", f"data.root={corpus}"]
    assert_one_line(train(*options, "size.vocab_size=290"), "tokenizer")
    assert_nothing_half_made(tmp_path / "outputs")


@pytest.mark.parametrize("ckpt", ["missing", "."])
def test_a_checkpoint_that_is_none(train: Train, tmp_path: Path, ckpt: str) -> None:
    message = train("phase=generate", "prompt=x", f"ckpt={tmp_path / ckpt}")
    assert_one_line(message, str(tmp_path), "make")
    assert_nothing_half_made(tmp_path / "outputs")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["prompt=the cat", "generate.top_k=0"], "top_k=0"),
        (["prompt=the cat", "generate.temperature=-1"], "temperature"),
        (["prompt=" + "the cat, " * 50], "shorten"),
        (["prompt_file=/does/not/exist.txt"], "/does/not/exist.txt"),
        (["prompt=x", "memory.session=mine"], "memory"),
        (["prompt=x", "memory.reset=true"], "name it by memory.session="),
    ],
    ids=["top_k", "temperature", "long", "file", "session", "reset"],
)
def test_what_generation_cannot_do(
    train: Train, checkpoint: Path, tmp_path: Path, arguments: list[str], part: str
) -> None:
    message = train("phase=generate", "expert=transformer", f"ckpt={checkpoint}", *arguments)
    assert_one_line(message, part)
    assert_nothing_half_made(tmp_path / "outputs")


def test_a_prompt_with_every_mark_of_hydras_grammar_is_continued(
    train: Train, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = 'the [cat], a=b: "it\'s"\n${seed}'
    options = ["phase=generate", "expert=transformer", f"ckpt={checkpoint}", f"prompt={prompt}"]
    assert train(*options, "generate.max_new_tokens=2") == ""
    assert prompt in capsys.readouterr().out
    (path,) = (tmp_path / "outputs").rglob("generation.json")
    assert json.loads(path.read_text())[0]["prompt"] == prompt


def test_a_private_table_spares_the_state_space_expert_the_wait_for_the_transformer(
    train: Train, corpus: Path, tmp_path: Path
) -> None:
    options = ["data=jsonl", f"data.root={corpus}", "size.vocab_size=290", "data.val_rows=2"]
    assert train("phase=data", *options) == ""
    alone = ["phase=expert", "expert=state_space", "prerequisites=require", "trainer.max_steps=2", *options]
    assert_one_line(train(*alone), "`python train.py phase=expert expert=transformer")
    assert train(*alone, "expert.embed=own") == ""
    outputs = tmp_path / "outputs"
    assert (outputs / "checkpoints" / "state_space_expert" / "expert.safetensors").is_file()
    assert not (outputs / "artifacts" / "transformer").exists()
    diffuser = ["phase=expert", "expert=diffuser", "prerequisites=require", "expert.embed=own", *options]
    assert_one_line(train(*diffuser), "`python train.py phase=expert expert=transformer")


def test_a_sweep_has_one_folder_a_job(train: Train, corpus: Path, tmp_path: Path) -> None:
    options = ["phase=data", "data=jsonl", f"data.root={corpus}", "size.vocab_size=290"]
    assert train("-m", *options, "seed=1,2") == ""
    manifests = sorted((tmp_path / "outputs" / "sweeps").rglob("manifest.json"))
    found = [json.loads(path.read_text()) for path in manifests]
    assert [(manifest["seed"], manifest["status"]) for manifest in found] == [(1, "done"), (2, "done")]
    for path in manifests:
        config = (path.parent / "config.yaml").read_text()
        assert "???" not in config.split("callbacks:")[0]
    (summary,) = (tmp_path / "outputs" / "sweeps").rglob("summary.md")
    assert [line for line in summary.read_text().splitlines() if "seed=2" in line and "done" in line]
    # neither the corpus nor its tokens depend on the seed of the training
    assert len(list((tmp_path / "outputs" / "artifacts" / "shards").iterdir())) == 1


@pytest.mark.slow
def test_the_literal_plan_runs_end_to_end_at_tiny_size(train: Train, tmp_path: Path) -> None:
    short = ["data.source.megabytes=0.5", "data.val_rows=4", "eval.rows=4", "eval.resamples=50"]
    short += ["prereq.expert.trainer.max_steps=10", "prereq.mla.trainer.max_steps=10"]
    assert train("phase=pipeline", "experiments=seed_literal", *short) == ""
    (report,) = (tmp_path / "outputs").rglob("report.md")
    assert "diffuser" in report.read_text()
