"""Tiny networks, one small set of shards, and a quiet Trainer for every objective."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from nano_think.data.module import TokenDataModule
from nano_think.data.shards import Shards, build_shards
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

VOCAB, D, L_ROW = 259, 32, 32


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
    """`data(**settings)`: rows of 32 tokens, 8 a batch."""

    def make(**settings: Any) -> TokenDataModule:
        return TokenDataModule(shards.directory, **{"seq_len": L_ROW, "batch_size": 8, "seed": 1, **settings})

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

    def make(kind: str, seed: int = 0, table: nn.Embedding | None = None, **settings: Any) -> ExpertLM:
        torch.manual_seed(seed)
        sizes = {"d_model": D, "num_layers": 2, "dropout": 0.0}
        networks = {
            "transformer": partial(TransformerExpert, num_heads=2, ffn_dim=64),
            "state_space": partial(StateSpaceExpert, d_inner=48, d_state=4),
            "diffuser": partial(DiffuserExpert, num_heads=2, ffn_dim=64, train_T=20, fused_steps=2),
        }
        return ExpertLM(table or (VOCAB, D), networks[kind](**sizes, **settings))

    return make


@pytest.fixture(scope="session")
def fused(expert_lm) -> Callable[..., NanoThink]:
    """`fused(**settings)`: a Transformer and a state-space expert behind an MLA that can read memory."""

    def make(**settings: Any) -> NanoThink:
        torch.manual_seed(5)
        experts = {name: expert_lm(name, seed).expert for seed, name in enumerate(("transformer", "state_space"))}
        mla = partial(MultiHeadLatentAttention, num_heads=2, memory=True)
        return NanoThink(experts, VOCAB, D, **{"mla": mla, **settings})

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
    """`trainer(**settings)`: without logger, checkpoints or bar."""

    def make(**settings: Any) -> L.Trainer:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        quiet |= {"enable_model_summary": False, "inference_mode": False, "num_sanity_val_steps": 0}
        return L.Trainer(accelerator="cpu", devices=1, **{**quiet, "max_epochs": -1, **settings})

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
