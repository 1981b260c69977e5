"""What every test may rely on: one thread, no network, private cache folders, live parameters, tiny fits."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

from nano_think.data.corpus import Corpus
from nano_think.data.module import TokenDataModule
from nano_think.data.shards import SPLITS, Shards, build_shards
from nano_think.experts.diffuser import DiffuserExpert
from nano_think.experts.state_space import StateSpaceExpert
from nano_think.experts.transformer import TransformerExpert
from nano_think.mla import MultiHeadLatentAttention
from nano_think.model import ExpertLM, NanoThink
from nano_think.optim.groups import adamw
from nano_think.optim.schedule import constant
from nano_think.tasks.denoise import DenoiseTask, fit_target_statistics
from nano_think.tasks.next_token import NextTokenTask
from nano_think.tasks.route import RouteTask
from nano_think.tokenizer import Tokenizer, train_bpe

Texts = Mapping[str, Mapping[str, list[str]]]
# The tiny networks of the training tests: vocabulary of bytes, width, tokens a row.
VOCAB, D, L_ROW = 259, 32, 32

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
os.environ["WANDB_MODE"] = "disabled"
_HOME = tempfile.TemporaryDirectory(prefix="nano_think_tests_")
os.environ["HF_HOME"] = os.environ["MPLCONFIGDIR"] = _HOME.name

settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def randomise() -> Callable[..., nn.Module]:
    """`randomise(module, seed=0, scale=1.0)` puts seeded noise into every parameter and returns the module.

    Zero and constant initialisations (gates, output projections, norm gains) hide the paths behind them, so
    that an audit of a fresh module sees nothing. Matrices get std scale / sqrt(fan-in), vectors std scale.
    """

    def fill(module: nn.Module, seed: int = 0, scale: float = 1.0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(noise * (scale / fan_in**0.5))
        return module

    return fill


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """One token a byte, so that expected tokens can be written down."""
    return train_bpe(["x"], 259)


@pytest.fixture(scope="session")
def lay_out_corpus() -> Callable[[Path, Texts], Corpus]:
    """`lay_out_corpus(root, {split: {domain: [text, ...]}})` writes a prepared corpus by hand.

    uids count up from 1 over the whole corpus; the cluster of a document is its uid plus 1000.
    """

    def write(root: Path, texts: Texts) -> Corpus:
        domains = sorted({domain for split in texts.values() for domain in split})
        uid = 0
        for split in SPLITS:
            (root / split).mkdir(parents=True)
            for domain in domains:
                with open(root / split / f"{domain}.jsonl", "w", encoding="utf-8") as file:
                    for text in texts.get(split, {}).get(domain, []):
                        uid += 1
                        record = {"uid": uid, "cluster": uid + 1000, "text": text, "domain": domain}
                        record |= {"source": "hand", "id": str(uid)}
                        file.write(json.dumps(record) + "\n")
        manifest = {"domains": domains, "hash": f"hash of {root.name}"}
        (root / "manifest.json").write_text(json.dumps(manifest))
        return Corpus(root)

    return write


@pytest.fixture
def write_corpus(lay_out_corpus, tmp_path) -> Callable[..., Corpus]:
    """`write_corpus(texts, name="corpus")`: `lay_out_corpus` in the folder of the test."""
    return lambda texts, name="corpus": lay_out_corpus(tmp_path / name, texts)


@pytest.fixture
def make_shards(write_corpus, byte_tokenizer, tmp_path) -> Callable[..., Shards]:
    """Token shards of `write_corpus`, a token a byte."""

    def make(texts: Texts, name: str = "corpus") -> Shards:
        return build_shards(write_corpus(texts, name), byte_tokenizer, tmp_path / f"{name}_shards")

    return make


def _texts(rng: random.Random, words: list[str], documents: int) -> list[str]:
    return [" ".join(rng.choice(words) for _ in range(rng.randint(3, 25))) for _ in range(documents)]


@pytest.fixture(scope="session")
def shards(tmp_path_factory, lay_out_corpus, byte_tokenizer) -> Shards:
    """Two domains of random short documents over a few words, a token a byte."""
    rng, root = random.Random(0), tmp_path_factory.mktemp("tasks")
    words = {"fruit": ["apple", "pear", "plum", "fig"], "tools": ["saw", "hammer", "nail", "axe", "file"]}
    sizes = {"expert_train": 60, "fusion_train": 30, "validation": 12, "test": 4}
    texts = {
        split: {domain: _texts(rng, vocabulary, count) for domain, vocabulary in words.items()}
        for split, count in sizes.items()
    }
    return build_shards(lay_out_corpus(root / "corpus", texts), byte_tokenizer, root / "shards")


@pytest.fixture
def data(shards) -> Callable[..., TokenDataModule]:
    """`data(**options)`: rows of 32 tokens, 8 a batch."""

    def make(**options: Any) -> TokenDataModule:
        return TokenDataModule(shards.directory, **{"seq_len": L_ROW, "batch_size": 8, "seed": 1, **options})

    return make


@pytest.fixture(scope="session")
def common(byte_tokenizer) -> Callable[..., dict[str, Any]]:
    """`common(lr)`: what every objective is given besides its network."""

    def make(lr: float = 3e-3, optimizer: Callable[..., Any] | None = None) -> dict[str, Any]:
        return {
            "optimizer": optimizer or partial(adamw, lr=lr, weight_decay=0.0),
            "schedule": partial(constant, warmup_steps=0),
            "domains": ["fruit", "tools"],
            "byte_lengths": torch.as_tensor(byte_tokenizer.byte_lengths),
        }

    return make


@pytest.fixture(scope="session")
def expert_lm() -> Callable[..., ExpertLM]:
    """`expert_lm("transformer" | "state_space" | "diffuser", seed=0, table=None)`, dropout off."""

    def make(kind: str, seed: int = 0, table: nn.Embedding | None = None, **options: Any) -> ExpertLM:
        torch.manual_seed(seed)
        sizes = {"d_model": D, "num_layers": 2, "dropout": 0.0}
        networks = {
            "transformer": partial(TransformerExpert, num_heads=2, ffn_dim=64),
            "state_space": partial(StateSpaceExpert, d_inner=48, d_state=4),
            "diffuser": partial(DiffuserExpert, num_heads=2, ffn_dim=64, train_T=20, fused_steps=2),
        }
        return ExpertLM(table or (VOCAB, D), networks[kind](**sizes, **options))

    return make


@pytest.fixture(scope="session")
def fused(expert_lm) -> Callable[..., NanoThink]:
    """`fused(**options)`: a Transformer and a state-space expert behind an MLA that can read memory."""

    def make(**options: Any) -> NanoThink:
        torch.manual_seed(5)
        experts = {
            name: expert_lm(name, seed).expert for seed, name in enumerate(("transformer", "state_space"))
        }
        mla = partial(MultiHeadLatentAttention, num_heads=2, memory=True)
        return NanoThink(experts, VOCAB, D, **{"mla": mla, **options})

    return make


@pytest.fixture
def objective(common, expert_lm, fused, data) -> Callable[..., Any]:
    """`objective("transformer" | "state_space" | "diffuser" | "route", **arguments)`: a ready task."""

    def make(kind: str, lr: float = 3e-3, **arguments: Any) -> Any:
        if kind == "route":
            return RouteTask(fused(), **common(lr), **arguments)
        if kind != "diffuser":
            return NextTokenTask(expert_lm(kind), **common(lr))
        teacher = arguments.pop("teacher", None) or expert_lm("transformer", seed=1)
        teacher.requires_grad_(False)
        network = expert_lm("diffuser", table=teacher.embedding, **arguments.pop("network", {}))
        fit_target_statistics(network, teacher.eval(), data().dataloader("expert_train", rows=8))
        return DenoiseTask(network, teacher=teacher, **common(lr), **arguments)

    return make


@pytest.fixture(scope="session")
def trainer() -> Callable[..., L.Trainer]:
    """`trainer(**options)`: without logger, checkpoints or bar."""

    def make(**options: Any) -> L.Trainer:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        quiet |= {"enable_model_summary": False, "inference_mode": False, "num_sanity_val_steps": 0}
        return L.Trainer(accelerator="cpu", devices=1, **{**quiet, "max_epochs": -1, **options})

    return make


@pytest.fixture(scope="session")
def losses() -> Callable[..., list[float]]:
    """`losses(task, batch, steps)`: train on one batch by hand, the loss a token before each step."""

    def run(task: Any, batch: dict[str, torch.Tensor], steps: int, lr: float = 1e-2) -> list[float]:
        labels, optimizer = int((batch["labels"] != -100).sum()), task.make_optimizer(task.network)
        for group in optimizer.param_groups:
            group["lr"] = lr
        seen = []
        for _ in range(steps):
            loss = task.batch_loss(batch)["loss"] / labels
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        return seen

    return run
