"""Every training of the plan at its full dimensions on a CPU: finite, and what it takes in memory and hours.

A step is one of the plan: 32, 64 and 32 rows of 512 tokens for the experts, 4 times 16 for the mixture. Where the
first takes longer than SLOW_STEP seconds, FEW_STEPS replace the 20, and the record says so. With
NANO_THINK_RECORD=path the figures are written there as JSON; NANO_THINK_SEED_STEPS=20 (or any number) takes that
many steps however long they take: about two hours of one core for 20. NANO_THINK_SEED_PARTS="7" does so for some
of 6a, 6b, 6c and 7 only, gives the others one step and keeps what the record says of them.
NANO_THINK_SEED_PRECISION=bf16-mixed takes a third less on a CPU that multiplies bf16 natively.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console

from nano_think.artifacts.recipe import COMPLETE_MARK
from nano_think.config import register_schema
from nano_think.data.shards import build_shards
from nano_think.files import write_json
from nano_think.phases import expert, mla, trainer
from nano_think.phases.fit import Fit
from nano_think.phases.machine import versions
from nano_think.phases.mla import mla_maker, stages_of
from nano_think.phases.run import Maker, Run
from nano_think.tokenizer import BPE_PATTERN, SPECIALS, Tokenizer

ROOT = Path(__file__).resolve().parents[2]
VOCAB, LENGTH = 32_000, 512
ASKED_STEPS = os.environ.get("NANO_THINK_SEED_STEPS")
STEPS, FEW_STEPS = int(ASKED_STEPS or 20), 3
SLOW_STEP = math.inf if ASKED_STEPS else 30.0
PRECISION = os.environ.get("NANO_THINK_SEED_PRECISION", "32-true")
# 36 MB of text are 8.6 million tokens of this vocabulary; 80% train the experts, 10% the mixture
PLAN_TOKENS = {"expert_train": 6_900_000, "fusion_train": 860_000}
PARTS = {"transformer": "6a", "diffuser": "6b", "state_space": "6c", "mla_7c": "7"}
ASKED_PARTS = os.environ.get("NANO_THINK_SEED_PARTS", "6a 6b 6c 7").split()
STEPS_OF = {kind: STEPS if part in ASKED_PARTS else 1 for kind, part in PARTS.items()}


class RandomTokens(Tokenizer):
    """Reads a text "700" as 700 random tokens; its 32,000 tokens are the bytes and pairs of bytes."""

    def __init__(self) -> None:
        pairs = [bytes([first, second]) for first in range(256) for second in range(256)]
        tokens = [bytes([value]) for value in range(256)] + pairs
        ranks = {token: rank for rank, token in enumerate(tokens[: VOCAB - len(SPECIALS)])}
        super().__init__(ranks, BPE_PATTERN)
        self.generator = np.random.default_rng(0)

    def encode_batch(self, texts: list[str], num_threads: int = 2) -> list[list[int]]:
        return [self.generator.integers(0, self.bos_id, int(text)).tolist() for text in texts]


class StepClock(L.Callback):
    """Seconds of every optimizer step and the loss of every batch; cuts slow trainings short."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.losses: list[float] = []
        self.begun: tuple[float, float] | None = None

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.begun is None:
            self.begun = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        if trainer.global_step > len(self.seconds):
            wall, cpu = self.begun
            self.seconds.append(time.perf_counter() - wall)
            self.cpu_seconds.append(time.process_time() - cpu)
            self.begun = None
            too_slow = self.seconds[0] > SLOW_STEP and len(self.seconds) >= FEW_STEPS
            trainer.should_stop = trainer.should_stop or too_slow


@pytest.fixture
def clocks(monkeypatch) -> dict[str, StepClock]:
    """The clock of every fit, by the fit's label."""
    found: dict[str, StepClock] = {}
    callbacks = trainer.configured_callbacks

    def with_clock(fit: Fit, work: Path) -> list[L.Callback]:
        found[fit.label] = StepClock()
        return [*callbacks(fit, work), found[fit.label]]

    monkeypatch.setattr(trainer, "configured_callbacks", with_clock)
    return found


@pytest.fixture
def random_shards(monkeypatch, lay_out_corpus, tmp_path) -> None:
    """In place of the corpus: two domains of documents of random tokens, of 40 to 2,000 each."""
    lengths = np.random.default_rng(1)
    splits = {"expert_train": 60, "fusion_train": 30, "validation": 6, "test": 2}
    texts = {
        split: {domain: lengths.integers(40, 2000, count).astype(str).tolist() for domain in ("a", "b")}
        for split, count in splits.items()
    }
    tokenizer, corpus = RandomTokens(), lay_out_corpus(tmp_path / "corpus", texts)

    def save_tokenizer(path: Path) -> dict[str, Any]:
        tokenizer.save(path / "tokenizer")
        return {}

    def save_shards(path: Path) -> dict[str, Any]:
        build_shards(corpus, tokenizer, path / "shards")
        return {}

    needs = {"tokenizer": Maker("tokenizer", {}, save_tokenizer)}
    made = Maker("shards", {}, save_shards, needs)
    for module in (expert, mla):
        monkeypatch.setattr(module, "shards_maker", lambda run: made)


@pytest.fixture
def seed_run(tmp_path) -> Iterator[Run]:
    """The run of `phase=mla expert=all size=seed` with STEPS steps a training."""
    numbers = {f"training.{kind}.max_steps": STEPS_OF[kind] for kind in PARTS if kind != "mla_7c"}
    numbers |= {"training.mla.static_tokens": 2 * LENGTH, "data.val_rows": 1}
    overrides = ["size=seed", f"precision={PRECISION}", *(f"{key}={value}" for key, value in numbers.items())]
    overrides += ["++prereq.expert.trainer.accelerator=cpu", "trainer.accelerator=cpu"]
    overrides += [f"run.root={tmp_path / 'outputs'}"]
    register_schema()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides)
        # a key that begins with a digit is outside the grammar of overrides
        for stage, steps in (("7b", 1), ("7c", STEPS_OF["mla_7c"])):
            cfg.training.mla[f"stage_{stage}"].max_steps = steps
        yield Run(cfg, overrides, tmp_path / "run", Console(quiet=True))


def forget_peak() -> None:
    """Begin to measure the peak of this process's memory anew, where the system can."""
    with contextlib.suppress(OSError):  # the peak then is that of everything so far
        Path("/proc/self/clear_refs").write_text("5")


def planned(run: Run, name: str) -> tuple[int, int]:
    """Epochs and optimizer steps of the plan on the corpus of PLAN_TOKENS."""
    fused = name.startswith("mla")
    numbers = run.cfg.training["mla" if fused else name]
    rows = numbers.batch_size * numbers.accumulate
    tokens = PLAN_TOKENS["fusion_train" if fused else "expert_train"]
    return numbers.max_epochs, numbers.max_epochs * math.ceil(tokens / (rows * LENGTH))


def figures(run: Run, name: str, clock: StepClock, result: dict[str, Any]) -> dict[str, Any]:
    """What the record says of one training. The first step, which warms up, is left out where there are more."""
    later = slice(1 if len(clock.seconds) > 1 else 0, None)
    seconds, cpu_seconds = (float(np.mean(all_of[later])) for all_of in (clock.seconds, clock.cpu_seconds))
    epochs, steps = planned(run, name)
    return {
        "steps": len(clock.seconds),
        "seconds_per_step": round(seconds, 2),
        "cpu_seconds_per_step": round(cpu_seconds, 2),
        "first_loss": clock.losses[0],
        "last_loss": clock.losses[-1],
        "peak_memory_gb": result["peak_memory_gb"],
        "planned_epochs": epochs,
        "planned_steps": steps,
        "predicted_hours": round(seconds * steps / 3600, 1),
        "predicted_cpu_hours": round(cpu_seconds * steps / 3600, 1),
        "threads": torch.get_num_threads(),
        "precision": PRECISION,
        **versions(),
    }


def write_record(parts: dict[str, Any]) -> None:
    """The figures so far, each with what it was made by, where a record is asked for."""
    if path := os.environ.get("NANO_THINK_RECORD"):
        kept = json.loads(Path(path).read_text())["parts"] if Path(path).is_file() else {}
        write_json(path, {"plan_tokens": PLAN_TOKENS, "parts": kept | parts})


@pytest.mark.slow
def test_every_training_of_the_plan_at_its_full_size(seed_run, random_shards, clocks):
    last = mla_maker(seed_run, "7c")
    first = next(maker for _, maker in stages_of(last))
    record = {}
    for maker in (*(first.needs[name] for name in PARTS if name in first.needs), first, last):
        forget_peak()
        path = seed_run.obtain(maker)
        result = json.loads((path / COMPLETE_MARK).read_text())["result"]
        if maker.kind in PARTS:
            record[PARTS[maker.kind]] = figures(seed_run, maker.kind, clocks[maker.kind], result)
            write_record({part: record[part] for part in record if part in ASKED_PARTS})
            assert np.isfinite([loss for _, loss in result["history"]]).all()
    assert list(record) == ["6a", "6b", "6c", "7"]
    for label, clock in clocks.items():
        assert np.isfinite(clock.losses).all(), label
        cut = clock.seconds[0] > SLOW_STEP
        steps = STEPS_OF.get(label, 1)
        assert len(clock.seconds) == (min(steps, FEW_STEPS) if cut else steps)
        assert len(clock.losses) == len(clock.seconds) * (4 if label.startswith("mla") else 1)
    for name in ("6a", "6c"):  # tokens that are all equally likely: nothing to learn, nothing to overlook
        assert record[name]["first_loss"] == pytest.approx(math.log(VOCAB), abs=0.3)
    assert all(0 < part["peak_memory_gb"] < 64 for part in record.values())
