"""What every test may rely on: one thread, no network, private cache folders, and live parameters."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

from nano_think.data.corpus import Corpus
from nano_think.data.shards import SPLITS, Shards, build_shards
from nano_think.tokenizer import Tokenizer, train_bpe

Texts = Mapping[str, Mapping[str, list[str]]]

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
