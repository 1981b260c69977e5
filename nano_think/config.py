"""The typed skeleton of a run, and the check of what the user typed before anything else happens.

Only the top level is typed here: below it, the signature of the class that a node names is the schema.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nano_think.errors import UserError

GROUPS = ("phase", "expert", "size", "data", "tokenizer", "model", "optimizer", "schedule", "trainer")
CHOICES = {
    "stage": ("7a", "7b", "7c", "7d", "all"),
    "resume": ("auto", "never"),
    "prerequisites": ("auto", "require"),
    "gates": ("warn", "stop"),
    "audit": ("require", "mark"),
}


@dataclass
class RunFolders:
    """Where a run writes. `root` holds runs, artefacts and published checkpoints."""

    root: str = "outputs"
    dir: str = "${run.root}/runs/${phase.name}/${now:%Y-%m-%d_%H-%M-%S}"
    sweep_dir: str = "${run.root}/sweeps/${phase.name}/${now:%Y-%m-%d_%H-%M-%S}"


@dataclass
class Memory:
    """The named session that `phase=generate` reads from and appends to."""

    session: str | None = None
    reset: bool = False


@dataclass
class RunConfig:
    """Every top-level key of a run. Groups are open nodes, described by the files of `conf/`."""

    phase: Any = MISSING
    expert: Any = MISSING
    experts: Any = field(default_factory=dict)
    training: Any = field(default_factory=dict)
    per_size: Any = field(default_factory=dict)
    size: Any = MISSING
    data: Any = MISSING
    tokenizer: Any = MISSING
    model: Any = MISSING
    optimizer: Any = MISSING
    schedule: Any = MISSING
    trainer: Any = MISSING
    callbacks: Any = field(default_factory=dict)
    logger: Any = MISSING
    eval: Any = field(default_factory=dict)
    generate: Any = field(default_factory=dict)
    prereq: Any = field(default_factory=dict)
    stage: str = "all"
    seed: int = 1
    expert_seed: int | None = None
    precision: str = "auto"
    ckpt: str | None = None
    resume: str = "auto"
    prerequisites: str = "auto"
    gates: str = "warn"
    audit: str = "mark"
    prompt: str | None = None
    prompt_file: str | None = None
    memory: Memory = field(default_factory=Memory)
    run: RunFolders = field(default_factory=RunFolders)


def register_schema() -> None:
    """Make `schema` available to the defaults list of `conf/config.yaml`."""
    ConfigStore.instance().store(name="schema", node=RunConfig)


def validate(cfg: DictConfig) -> None:
    """Raise UserError for a value that no phase could use."""
    for key, choices in CHOICES.items():
        if cfg[key] not in choices:
            raise UserError(
                f"{key}={cfg[key]} is not one of {', '.join(choices)}{_nearest(str(cfg[key]), choices)}"
            )
    if len(cfg.expert.names) < cfg.phase.experts_at_least:
        raise UserError(
            f"phase={cfg.phase.name} mixes experts, expert={cfg.expert.name} is a single one: use expert=all, "
            f"or train this one with `python train.py phase=expert expert={cfg.expert.name}`"
        )
    for key in ("seed", "expert_seed"):
        if cfg[key] is not None and cfg[key] < 0:
            raise UserError(f"{key} must not be negative")


def checked_overrides(arguments: list[str], config_dir: Path) -> list[str]:
    """The command line with each dotted override either known, or turned into `++key=value`.

    Hydra refuses `a.b=c` for a key that no YAML states. Here the key is looked up in the signature of the
    class its node names: a real keyword is handed on, anything else is an error with the nearest valid name.

    Raises UserError, in one sentence, for unknown groups, options, keys and broken values.
    """
    flags, overrides = _split(arguments)
    if any(flag in ("--help", "-h", "--hydra-help", "--version", "--info") for flag in flags):
        return arguments
    choices = [o for o in overrides if _key(o) in _groups(config_dir)]
    register_schema()
    try:
        with initialize_config_dir(str(config_dir / "conf"), version_base="1.3"):
            sample = [_first_choice(o) for o in choices if not o.startswith("experiments=glob")]
            cfg = compose("config", [*sample, f"hydra.searchpath=[file://{config_dir}]"])
    except HydraException as error:
        raise UserError(_one_line(error)) from error
    return [*flags, *choices, *(_checked(o, cfg, config_dir) for o in overrides if o not in choices)]


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Flags of Hydra (with their values) and overrides."""
    flags, overrides, takes_value = [], [], False
    for argument in arguments:
        is_flag = takes_value or argument.startswith("-")
        (flags if is_flag else overrides).append(argument)
        takes_value = argument in (
            "--cfg",
            "-c",
            "--package",
            "-p",
            "--config-dir",
            "-cd",
            "--config-name",
            "-cn",
        )
    return flags, overrides


def _key(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+~")


def _groups(config_dir: Path) -> set[str]:
    return {path.name for path in (config_dir / "conf").iterdir() if path.is_dir()} | {"experiments"}


def _first_choice(override: str) -> str:
    key, _, value = override.partition("=")
    return f"{key}={value.split(',')[0]}"


def _checked(override: str, cfg: DictConfig, config_dir: Path) -> str:
    if override.startswith(("+", "~")) or "=" not in override:
        return override
    key, _, value = override.partition("=")
    if key.startswith("hydra."):
        return override
    if key.startswith("prereq."):
        return f"++{override}"
    node, path = cfg, key.split(".")
    for depth, part in enumerate(path):
        children = _children(node)
        if part not in children:
            known = [".".join([*path[:depth], child]) for child in children]
            if depth == 0:
                known += sorted(_groups(config_dir))
            hint = _nearest(key, known) or f" (valid here: {', '.join(sorted(known)[:12])})" * bool(known)
            raise UserError(f"there is no setting '{key}'{hint}")
        if not OmegaConf.is_dict(node) or part not in node:
            return f"++{key}={value}"
        try:
            node = node[part]
        except OmegaConfBaseException:
            return override
    return override


def _children(node: Any) -> set[str]:
    """Keys that may stand below a node: those it has, and the keywords of the class it names."""
    if not OmegaConf.is_dict(node):
        return set()
    children = {str(key) for key in node}
    if "_target_" in node:
        module, _, name = str(node["_target_"]).rpartition(".")
        signature = inspect.signature(getattr(importlib.import_module(module), name))
        children |= {key for key in signature.parameters if key != "self"}
    return children


def _nearest(word: str, known: Any) -> str:
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f": did you mean '{matches[0]}'?" if matches else ""


def _one_line(error: Exception) -> str:
    """Hydra's message without its advice on environment variables, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(line for line in lines if "HYDRA_FULL_ERROR" not in line)
