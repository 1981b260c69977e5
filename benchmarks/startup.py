"""Start-up: from the command line to the first generated token and to the first optimizer step."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import Case, Group, Measured, Options
from benchmarks.harness.case import GateError
from nano_think.artifacts.build import build
from nano_think.artifacts.checkpoint import save_expert
from nano_think.files import write_json
from nano_think.model import ExpertLM
from nano_think.tokenizer import train_bpe

ROOT = Path(__file__).resolve().parents[1]
TOKEN, STEP = "phase=generate, one token, to the end", "phase=expert, one step, to the end"
NOTES = (
    "Fresh processes with warm caches: corpus, tokenizer and shards are there, and what the machine has measured.",
    "The token's process ends with it. The step's goes on to validate and save; when the step was over is below.",
)


def group(options: Options) -> Group:
    """Whole commands in processes of their own; a quick run generates only, with a network that never learned."""
    size = "tiny" if options.quick else "small"
    folder = tempfile.TemporaryDirectory(prefix="startup_")
    commands = Commands(Path(folder.name), size)
    keep = {"folder": folder}  # lives as long as the cases do
    cases = [Case(TOKEN, partial(commands.generation, **keep), tokens=1, check=commands.generated)]
    derived: dict[str, Callable[[Measured], float]] = {}
    if not options.quick:
        cases.append(Case(STEP, partial(commands.training, **keep), tokens=1, check=commands.trained))
        for clock in ("wall_s", "cpu_s"):
            derived[f"first optimizer step after, {clock}"] = partial(commands.first_step, clock)
    return Group(f"start-up, size={size}", cases, notes=NOTES, derived=derived)


class Commands:
    """`train.py` in new processes, everything below one folder."""

    def __init__(self, root: Path, size: str) -> None:
        self.root, self.size = root, size
        self.number, self.steps = 0, list[dict[str, float]]()

    def generated(self) -> None:
        """A token comes out."""
        (made,) = json.loads((self._generate() / "generation.json").read_text())
        if not made["text"]:
            raise GateError("phase=generate made no token")

    def trained(self) -> None:
        """A step is taken."""
        manifest = json.loads((self._train() / "manifest.json").read_text())
        if manifest["status"] != "done":
            raise GateError("phase=expert did not end")

    def generation(self, folder: Any) -> Callable[[], object]:
        """One unit: a process that generates a token."""
        return self._generate

    def training(self, folder: Any) -> Callable[[], object]:
        """One unit: a process that trains for a step, of an artefact that is not there yet."""
        return self._train

    def first_step(self, clock: str, measured: Measured) -> float:
        """The median of what the runs noted when their first step was over."""
        return statistics.median(step[clock] for step in self.steps)

    def _generate(self) -> Path:
        published = self.root / "checkpoints" / "transformer_expert"
        if not published.exists():
            untrained(published) if self.size == "tiny" else self._train()
        settings = ("phase=generate", f"ckpt={published}", "prompt=the", "generate.max_new_tokens=1")
        return self._run(*settings, f"size={self.size}")

    def _train(self) -> Path:
        warmup = f"++training.transformer.warmup_steps={1000 + self.number}"
        settings = ("phase=expert", "expert=transformer", f"size={self.size}", "trainer.max_steps=1", warmup)
        folder = self._run(*settings)
        self.steps.append(json.loads((folder / "manifest.json").read_text())["first_step"])
        return folder

    def _run(self, *settings: str) -> Path:
        self.number += 1
        folder = self.root / "runs" / str(self.number)
        command = [sys.executable, "train.py", *settings, f"run.root={self.root}", f"run.dir={folder}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(settings)} failed: {done.stderr[-500:]}")
        return folder


def untrained(folder: Path) -> None:
    """A checkpoint of a small Transformer that never learned."""
    tokenizer = train_bpe(["the cat sat on the mat"] * 20, 264)
    spec = {"_target_": "nano_think.experts.transformer.TransformerExpert"}
    spec |= {"d_model": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 16}
    model = ExpertLM((tokenizer.vocab_size, 16), build(spec))
    save_expert(folder, "transformer", spec, model, tokenizer, seq_len=32)
    lineage = {"kind": "transformer", "hash": "untrained", "needs": {}}
    write_json(folder / "provenance.json", {**lineage, "result": {"tokens": 0}})
