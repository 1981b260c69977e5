"""Contracts over every file of conf/ and experiments/: a new file is covered without editing anything here."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from nano_think.artifacts.build import build
from nano_think.evals.parameters import count_parameters
from nano_think.model import NanoThink

ROOT = Path(__file__).resolve().parents[2]
GROUPS = sorted(folder.name for folder in (ROOT / "conf").iterdir() if folder.is_dir())
OPTIONS = [
    (group, path.stem) for group in GROUPS for path in sorted((ROOT / "conf" / group).glob("[!_]*.yaml"))
]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "experiments").glob("*.yaml"))
# What an option cannot do without.
NEEDED = {("data", "jsonl"): ["data.root=/texts"], ("tokenizer", "gpt2"): ["tokenizer.path=/gpt2.tiktoken"]}
Composed = Callable[..., DictConfig]


def overrides_of(group: str, option: str) -> list[str]:
    return [f"{group}={option}", *NEEDED.get((group, option), [])]


def nodes(value: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping with a `_target_`, by its dotted path."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield path, value
        for key, child in value.items():
            yield from nodes(child, f"{path}.{key}".lstrip("."))


def located(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda value: value)
def test_every_option_composes_resolves_and_fits_its_signatures(
    composed: Composed, group: str, option: str
) -> None:
    cfg = OmegaConf.to_container(composed(*overrides_of(group, option)), resolve=True)
    found = dict(nodes(cfg))
    assert found
    for path, node in found.items():
        signature = inspect.signature(located(node["_target_"]))
        parameters = signature.parameters.values()
        names = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
        unknown = {key for key in node if not key.startswith("_")} - names
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
        assert not unknown or open_ended, f"{path}: {node['_target_']} has no {sorted(unknown)}"
    assert callable(located(cfg["phase"]["run"])), cfg["phase"]["run"]
    for name in cfg["expert"]["names"]:
        assert callable(located(cfg["training"][name]["objective"]))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_at_its_own_size_and_at_tiny(composed: Composed, name: str) -> None:
    text = (ROOT / "experiments" / f"{name}.yaml").read_text().splitlines()
    assert text[0] == "# @package _global_"
    assert text[1].startswith("# "), "the second line states the hypothesis"
    default = OmegaConf.to_container(composed(), resolve=True)
    for size in ([], ["size=tiny"]):
        cfg = OmegaConf.to_container(composed(f"experiments={name}", *size), resolve=True)
        assert cfg != default
        assert set(cfg) == set(default)
    assert cfg["size"]["name"] == "tiny"


def test_an_experiment_names_only_settings_that_exist(composed: Composed) -> None:
    for name in EXPERIMENTS:
        stated = OmegaConf.load(ROOT / "experiments" / f"{name}.yaml")
        plain = {key: value for key, value in stated.items() if key != "defaults"}
        default = composed("phase=study")  # the phase that has all settings of the others
        for path in leaves(OmegaConf.to_container(OmegaConf.create(plain))):
            if path.startswith("study.ablations."):
                continue  # names of one's own
            parent, _, key = path.rpartition(".")
            node = OmegaConf.select(default, parent) if parent else default
            assert node is not None, f"{name}: {parent}"
            assert key in node or key in keywords(node), f"{name}: {path}"


def leaves(value: Any, path: str = "") -> Iterator[str]:
    if not isinstance(value, dict):
        yield path
        return
    for key, child in value.items():
        yield from leaves(child, f"{path}.{key}".lstrip("."))


def keywords(node: DictConfig) -> set[str]:
    return set(inspect.signature(located(node._target_)).parameters) if "_target_" in node else set()


def test_a_glob_over_experiments_finds_every_file() -> None:
    search_path = create_config_search_path(f"file://{ROOT / 'conf'}")
    # as `train.py` does with --config-dir
    search_path.append("command-line", f"file://{ROOT}")
    parser = OverridesParser.create(ConfigLoaderImpl(search_path))
    (swept,) = parser.parse_overrides(["experiments=glob(*)"])
    assert sorted(swept.sweep_string_iterator()) == EXPERIMENTS
    assert {"demo", "seed_literal"} <= set(EXPERIMENTS)


SEED_NUMBERS = {
    "size.d_model": 384,
    "size.vocab_size": 32_000,
    "size.seq_len": 512,
    "experts.transformer.num_layers": 6,
    "experts.transformer.num_heads": 6,
    "experts.transformer.ffn_dim": 1536,
    "experts.diffuser.num_layers": 4,
    "experts.diffuser.train_T": 100,
    "experts.diffuser.ddim_steps": 10,
    "experts.state_space.num_layers": 6,
    "experts.state_space.d_inner": 768,
    "model.mla.num_heads": 6,
    "model.retrieval.k": 4,
    "training.transformer.lr": 3e-4,
    "training.transformer.weight_decay": 0.1,
    "training.transformer.warmup_steps": 1000,
    "training.transformer.batch_size": 32,
    "training.diffuser.lr": 1e-4,
    "training.diffuser.warmup_steps": 500,
    "training.diffuser.batch_size": 64,
    "training.state_space.lr": 3e-4,
    "training.state_space.weight_decay": 0.1,
    "training.state_space.warmup_steps": 1000,
    "training.state_space.batch_size": 32,
    "training.mla.stage_7c.lr": 1e-4,
    "training.mla.stage_7c.weight_decay": 0.05,
    "training.mla.stage_7c.warmup_steps": 500,
    "training.mla.batch_size": 16,
    "training.mla.accumulate": 4,
    "training.mla.patience": 3,
}


def test_size_seed_has_the_numbers_of_the_plan(composed: Composed) -> None:
    cfg = composed("size=seed")
    assert {key: OmegaConf.select(cfg, key) for key in SEED_NUMBERS} == SEED_NUMBERS
    assert cfg.size.d_model / cfg.experts.transformer.num_heads == 64
    assert cfg.optimizer._target_ == "nano_think.optim.groups.adamw"
    assert cfg.schedule._target_ == "nano_think.optim.schedule.cosine"
    for name in ("transformer", "diffuser", "state_space"):
        assert 10 <= cfg.training[name].max_epochs <= 20
        assert cfg.training[name].patience == 3
        assert cfg.training[name].accumulate == 1


def test_a_size_can_be_overridden_in_one_expert_alone(composed: Composed) -> None:
    cfg = composed("size=seed", "experts.transformer.num_layers=3")
    assert cfg.experts.transformer.num_layers == 3
    assert cfg.experts.diffuser.num_layers == 4
    assert cfg.experts.state_space.num_layers == 6


def network(cfg: DictConfig, device: str) -> NanoThink:
    """The fused model of a configuration, memory included, on a device that may hold no numbers."""
    plain = {key: OmegaConf.to_container(cfg[key], resolve=True) for key in ("experts", "model", "size")}
    spec = {
        "_target_": "nano_think.model.NanoThink",
        "experts": plain["experts"],
        "vocab_size": plain["size"]["vocab_size"],
        "d_model": plain["size"]["d_model"],
        "mla": plain["model"]["mla"] | {"memory": plain["model"]["retrieval"]["k"] > 0},
        "router": plain["model"]["router"] | {"num_experts": len(plain["experts"])},
    }
    with torch.device(device):
        return build(spec)


def counts(cfg: DictConfig) -> dict[str, int]:
    report = count_parameters(network(cfg, "meta"))
    return {component.name: component.total for component in report.components} | {"total": report.total}


def test_parameters_at_seed_size_are_those_of_the_arithmetic(composed: Composed) -> None:
    d, entry = 384, 384 * 384
    transformer = 6 * (4 * d * d + 3 * d * 1536 + 2 * d) + d
    # queries with their rotary part, latent with its norm, keys and values from it, rotary key, output; norm
    mla = d * 6 * (64 + 32) + (d + 1) * 128 + 2 * 128 * d + d * 32 + d * d + d
    slots = d + d + 6
    assert (transformer, mla) == (14_160_768, 528_896)
    assert counts(composed("size=seed")) == {
        "(own)": 3,
        "embedding": 32_000 * d,
        "mla": mla + slots,
        "router": 3 * d + 3,
        "experts.transformer": transformer + entry,
        "experts.diffuser": 6_307_584 + entry,
        "experts.state_space": 5_785_728 + entry,
        "total": 39_515_276,
    }


def test_budget30_stays_under_thirty_million_parameters(composed: Composed) -> None:
    total = counts(composed("size=budget30"))["total"]
    assert 29_000_000 < total < 30_000_000


@pytest.mark.parametrize("option", ["tiny", "small"])
def test_small_sizes_are_small(composed: Composed, option: str) -> None:
    assert counts(composed(f"size={option}"))["total"] < {"tiny": 400_000, "small": 3_000_000}[option]


def test_the_default_network_is_the_one_of_the_plan(composed: Composed) -> None:
    cfg = composed()
    assert (cfg.size.name, cfg.expert.name, cfg.phase.name, cfg.data.source._target_.rpartition(".")[2]) == (
        "small",
        "all",
        "mla",
        "BuiltinSource",
    )
    assert list(network(composed("size=tiny"), "meta").experts) == ["transformer", "diffuser", "state_space"]


def test_choosing_another_expert_changes_only_what_is_about_experts(composed: Composed) -> None:
    everything = OmegaConf.to_container(composed("phase=expert"))
    one = OmegaConf.to_container(composed("phase=expert", "expert=state_space"))
    changed = {key for key in everything if everything[key] != one.get(key)}
    assert changed == {"expert", "experts", "training", "per_size"}


def test_seed_literal_is_the_plan_where_the_default_is_not(composed: Composed) -> None:
    cfg = composed("experiments=seed_literal", "size=seed")
    assert (cfg.experts.diffuser.param, cfg.training.diffuser.ce_weight) == ("eps", 0.0)
    assert (cfg.experts.diffuser.fused_steps, cfg.experts.diffuser.ddim_steps) == (10, 10)
    assert (cfg.model.mla.kv, cfg.expert.embed) == ("full", "own")
    assert {key: OmegaConf.select(cfg, key) for key in SEED_NUMBERS} == SEED_NUMBERS
