"""The typed skeleton of a run, and the check of what the user typed before anything else happens.

Only the top level is typed here: below it, the signature of the class that a node names is the schema.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nano_think.errors import UserError
from nano_think.limits import WITHOUT_NETWORK, check_values
from nano_think.signatures import check_keywords, located, parameters, short

CHOICES = {
    "stage": ("7a", "7b", "7c", "7d", "all"),
    "resume": ("auto", "never"),
    "prerequisites": ("auto", "require"),
    "gates": ("warn", "stop"),
    "audit": ("require", "mark"),
    "quantize": ("none", "int8", "bf16"),
    "guards.disk": ("refuse", "warn", "off"),
    "guards.memory": ("refuse", "warn", "off"),
}
# Phases that run a finished model; training knows no coarse weights.
QUANTIZING = ("eval", "generate")
# Nodes whose ??? is supplied by the fit.
SUPPLIED = ("callbacks", "logger")
# What holds settings; `study` and `prereq` may be empty.
GROUPS = (
    "phase", "expert", "experts", "training", "per_size", "size", "data", "tokenizer", "model", "optimizer",
    "schedule", "trainer", "callbacks", "logger", "eval", "generate", "study", "prereq", "memory", "guards", "run",
)  # fmt: skip
# Text that Hydra's grammar must not interpret, and paths that it need not.
TEXTS = ("prompt",)
PATHS = ("prompt_file", "ckpt", "data.root", "run.root", "run.dir", "tokenizer.path", "memory.session")
FLAGS_WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--config-name", "-cn")
FLAGS_OF_HYDRA = ("--help", "-h", "--hydra-help", "--version", "--info", "-i", "--shell-completion", "-sc")


@dataclass
class RunFolders:
    """Where a run writes. `root` holds runs, artefacts and published checkpoints.

    sweep_dir: of a sweep; None: `<root>/sweeps/<phase>/<hash>`, by the command, so that the same one goes on.
    """

    root: str = "outputs"
    dir: str = "${run.root}/runs/${phase.name}/${now:%Y-%m-%d_%H-%M-%S}"
    sweep_dir: str | None = None


@dataclass
class Memory:
    """The named session that `phase=generate` reads from and appends to."""

    session: str | None = None
    reset: bool = False


@dataclass
class Guards:
    """What happens to a run that the disk or the memory is too small for: refuse, warn or off."""

    disk: str = "refuse"
    memory: str = "refuse"


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
    strategy: Any = MISSING
    callbacks: Any = field(default_factory=dict)
    logger: Any = MISSING
    eval: Any = field(default_factory=dict)
    generate: Any = field(default_factory=dict)
    study: Any = field(default_factory=dict)
    prereq: Any = field(default_factory=dict)
    stage: str = "all"
    seed: int = 1
    expert_seed: int | None = None
    precision: str = "auto"
    compile: bool = False
    ckpt: str | None = None
    resume: str = "auto"
    prerequisites: str = "auto"
    gates: str = "warn"
    audit: str = "mark"
    quantize: str = "none"
    prompt: str | None = None
    prompt_file: str | None = None
    memory: Memory = field(default_factory=Memory)
    guards: Guards = field(default_factory=Guards)
    run: RunFolders = field(default_factory=RunFolders)


def register_schema() -> None:
    """Make `schema` available to the defaults list of `conf/config.yaml`."""
    ConfigStore.instance().store(name="schema", node=RunConfig)


def validate(cfg: DictConfig, groups: Iterable[str] = ()) -> None:
    """Raise UserError for a value that no phase could use.

    groups: top-level keys that somebody has touched, of which also what only a costly import can tell is checked.
    """
    try:
        stated = OmegaConf.to_container(cfg, resolve=False)
        for key in _unset(stated):
            if not key.startswith(SUPPLIED):
                raise UserError(f"{key} has no default: add {key}=... to the command")
        values: Any = OmegaConf.to_container(cfg, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise UserError(_one_line(error)) from error
    _check_structure(values)
    for key, choices in CHOICES.items():
        value = OmegaConf.select(cfg, key)
        if value not in choices:
            hint = _nearest(str(value), choices)
            raise UserError(f"{key}={short(value)} is not one of {', '.join(choices)}{hint}")
    phase, expert = values["phase"], values["expert"]
    if values["quantize"] != "none" and phase["name"] not in QUANTIZING:
        raise UserError(
            f"quantize={values['quantize']} is for finished models, phase={phase['name']} is not one that runs "
            f"them: use it with phase={' or phase='.join(QUANTIZING)}"
        )
    if len(expert["names"]) < phase["experts_at_least"]:
        raise UserError(
            f"phase={phase['name']} mixes experts, expert={expert['name']} is a single one: use expert=all, "
            f"or train this one with `python train.py phase=expert expert={expert['name']}`"
        )
    networks = () if phase["name"] in WITHOUT_NETWORK else ("experts", "model")
    check_keywords(values, {*networks, "data", *groups} & set(values))
    # to make an optimizer imports torch's compiler: not where one is only made if a model is missing
    touched = not {"optimizer", "schedule", "experiments"}.isdisjoint(groups)
    check_values(values, steps=touched or phase["name"] not in QUANTIZING)


def _check_structure(values: dict[str, Any]) -> None:
    """Raise UserError where a group is none, and for phases and experts that do not exist."""
    for key in GROUPS:
        if not isinstance(values.get(key), dict):
            raise UserError(f"{key}={short(values.get(key))} must be a group of settings: leave it as it was")
    kinds = {
        "phase.name": str,
        "phase.run": str,
        "phase.experts_at_least": int,
        "expert.name": str,
        "expert.names": list,
    }
    for path, kind in kinds.items():
        group, _, key = path.partition(".")
        if not isinstance(values[group].get(key), kind):
            raise UserError(
                f"{path}={short(values[group].get(key))} is nothing to go by: choose one with {group}="
            )
    names = values["expert"]["names"]
    known = [name for name in values["experts"] if name in values["training"]]
    if not names or any(name not in known for name in names) or len(set(names)) < len(names):
        raise UserError(
            f"expert.names={short(names)} must name some of {', '.join(known)}, each once: use expert="
        )
    function = values["phase"]["run"]
    if not function.startswith("nano_think.phases."):
        raise UserError(
            f"phase.run={short(function)} must name a function below nano_think.phases: use phase="
        )


def checked_overrides(arguments: list[str], config_dir: Path) -> list[str]:
    """The command line as Hydra should read it: checked, free text quoted, unstated keys as `++key=value`.

    Hydra refuses `a.b=c` for a key that no YAML states. Here the key is looked up in the signature of the
    class its node names: a real keyword is handed on, anything else is an error with the nearest valid name.
    The result is composed and validated, so that a bad value is found before a run folder exists; of a sweep
    this holds for the first job.

    Raises UserError, in one sentence, for unknown groups, options, keys and broken values.
    """
    for argument in arguments:
        if not argument.isascii() and any("\ud800" <= character <= "\udfff" for character in argument):
            raise UserError(f"{short(argument)} is not valid UTF-8: type it in UTF-8, or name a file that is")
    flags, overrides = _split(arguments)
    if any(flag in FLAGS_OF_HYDRA for flag in flags):
        return arguments
    groups = _groups(config_dir / "conf") | {"experiments"}
    sweep = "-m" in flags or "--multirun" in flags
    overrides = [_literal(override, sweep) for override in overrides]
    choices = [o for o in overrides if override_name(o) in groups]
    for choice in choices:
        _check_choice(choice, config_dir)
    cfg = _compose(choices, config_dir)
    checked = choices + [_checked(o, cfg, groups) for o in overrides if o not in choices]
    if checked != choices:
        cfg = _compose(checked, config_dir)
    if "--cfg" not in flags and "-c" not in flags:
        validate(cfg, {group_of(override) for override in checked})
        for settings in _handed_on(checked).values():
            changed = {override_name(setting) for setting in settings}
            own = [override for override in checked if override_name(override) not in changed]
            validate(_compose([*own, *settings], config_dir), {key.split(".")[0] for key in changed})
    return [*flags, *checked]


def _handed_on(overrides: list[str]) -> dict[str, list[str]]:
    """The settings of `prereq.<name>.<setting>=`, by name."""
    handed: dict[str, list[str]] = {}
    for override in overrides:
        if override_name(override).startswith("prereq."):
            _, name, setting = override.split(".", 2)
            handed.setdefault(name, []).append(f"++{setting}" if "." in setting.split("=")[0] else setting)
    return handed


def checked_additions(overrides: Iterable[str], cfg: DictConfig, config_dir: Path) -> list[str]:
    """Overrides on top of a composed configuration, checked as `checked_overrides` checks what was typed.

    Raises UserError for unknown groups, options and keys; values show when they are composed.
    """
    groups = _groups(config_dir / "conf")
    checked = []
    for override in overrides:
        if override_name(override) in groups:
            _check_choice(override, config_dir)
            checked.append(override)
        else:
            checked.append(_checked(override, cfg, groups))
    return checked


def _compose(overrides: list[str], config_dir: Path) -> DictConfig:
    """The configuration of the overrides, of a sweep that of the first job; UserError where Hydra objects."""
    register_schema()
    try:
        first = [_first(override) for override in overrides if not _is_glob(override)]
        with initialize_config_dir(str(config_dir / "conf"), version_base="1.3"):
            return compose("config", [*first, f"hydra.searchpath=[file://{config_dir}]"])
    except UserError:
        raise
    except Exception as error:  # what Hydra says of odd values comes in exceptions of every kind
        raise UserError(_one_line(error)) from error


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Flags of Hydra (with their values) and overrides."""
    flags: list[str] = []
    overrides: list[str] = []
    takes_value = False
    for argument in arguments:
        is_flag = takes_value or argument.startswith("-")
        (flags if is_flag else overrides).append(argument)
        takes_value = argument in FLAGS_WITH_VALUE
    return flags, overrides


def _literal(override: str, sweep: bool) -> str:
    """Free text in quotes that Hydra's grammar takes as they stand; other overrides unchanged.

    A prompt is never interpreted. A path may hold an interpolation, and in a sweep a list of paths.
    """
    key, equals, value = override.partition("=")
    if not equals or not (key in TEXTS or (key in PATHS and not sweep)):
        return override
    if key in PATHS and (value == "null" or re.fullmatch(r"[\w.+-]*/[\w./+-]*|(['\"]).*\1", value)):
        return override
    if key in TEXTS:
        value = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    value = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + match[2].replace("'", r"\'"), value)
    return f"{key}='{value}'"


def override_name(override: str) -> str:
    """The key of an override, without Hydra's marks."""
    return override.lstrip("+~").partition("=")[0]


def group_of(override: str) -> str:
    """The first part of the key of an override."""
    return override_name(override).split(".")[0]


def _groups(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if path.is_dir()}


def _is_glob(override: str) -> bool:
    return "=glob(" in override


def _first(override: str) -> str:
    """The override of the first job where `override` is a sweep."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except (HydraException, ValueError, RecursionError) as error:
        raise UserError(f"the value in {short(override)} cannot be read: {_one_line(error)}") from error
    if not parsed.is_sweep_override():
        return override
    # of an interval, which a sweeper such as Optuna's draws from, its beginning
    value: Any = parsed.value()
    first = value.start if parsed.is_interval_sweep() else next(parsed.sweep_string_iterator())
    return f"{override.partition('=')[0]}={first}"


def _check_choice(override: str, config_dir: Path) -> None:
    """Raise UserError, naming the nearest option, where a plain choice of a group does not exist."""
    group, _, value = override.partition("=")
    folder = config_dir / ("" if group == "experiments" else "conf") / group
    if not folder.is_dir() or not re.fullmatch(r"[\w,-]+", value):
        return
    options = sorted(path.stem for path in folder.glob("[!_]*.yaml"))
    for name in value.split(","):
        if name not in (*options, "null"):
            hint = _nearest(name, options)
            raise UserError(f"{group}={name} does not exist, there are {', '.join(options)}{hint}")


def _checked(override: str, cfg: DictConfig, groups: set[str]) -> str:
    """The override with `++` where its key is a keyword that no YAML states."""
    key, equals, value = override.partition("=")
    mark, key = key[: len(key) - len(override_name(key))], override_name(key)
    if mark == "~" or key.startswith(("hydra.", "hydra/")):
        return override
    if not equals:
        raise UserError(f"'{short(override)}' is not a setting: write key=value")
    if key.startswith("prereq."):
        _check_prerequisite(key, value, cfg, groups)
        return f"++{key}={value}"
    node, path = cfg, key.split(".")
    for depth, part in enumerate(path):
        if _may_hold(node, part, adding=bool(mark)):
            if part not in _stated(node):
                return f"++{key}={value}"
        else:
            known = {".".join([*path[:depth], child]) for child in _children(node)}
            known |= groups if depth == 0 else set()
            listed = sorted(known)
            hint = _nearest(key, listed) or f" (valid here: {', '.join(listed[:12])})" * bool(listed)
            raise UserError(f"there is no setting '{short(key)}'{hint}")
        try:
            node = node[part]
        except OmegaConfBaseException:
            return override
    return override


def _check_prerequisite(key: str, value: str, cfg: DictConfig, groups: set[str]) -> None:
    """Raise UserError where `prereq.<name>.<setting>` names no phase or expert, or a setting that is none."""
    _, name, setting = (*key.split(".", 2), "", "")[:3]
    known = ["data", "tokenizer", "expert", "mla", *cfg.experts]
    if name not in known or not setting:
        example = "prereq.expert.trainer.max_steps=100"
        raise UserError(
            f"'{key}' hands nothing on: write prereq.<name>.<setting>, such as {example}; "
            f"the names are {', '.join(known)}{_nearest(name, known)}"
        )
    _checked(f"{setting}={value}", cfg, groups)


def _may_hold(node: Any, name: str, adding: bool) -> bool:
    """Whether `name` can stand below a node: as what it has, a keyword of its class, or an explicit `+key`."""
    if name in _stated(node):
        return True
    if not OmegaConf.is_dict(node):
        return False
    parameters = _parameters(node)
    if parameters:
        return name in _children(node) or any(p.kind is p.VAR_KEYWORD for p in parameters)
    return adding and node._metadata.object_type in (dict, None)


def _stated(node: Any) -> set[str]:
    """Keys that stand below a node."""
    return {str(key) for key in node} if OmegaConf.is_dict(node) else set()


def _children(node: Any) -> set[str]:
    """Keys that may stand below a node: those it has, and the keywords of the class it names."""
    parameters = _parameters(node) if OmegaConf.is_dict(node) else []
    named = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    return _stated(node) | named - {"self"}


def _parameters(node: DictConfig) -> list[inspect.Parameter]:
    """The parameters of the class or function that a node names, none where it names nothing."""
    return parameters(located(str(node["_target_"]))) if "_target_" in node else []


def _unset(node: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys below a plain node that stand as ???."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _unset(value, f"{prefix}{key}.")
        elif value == MISSING:
            yield f"{prefix}{key}"


def _nearest(word: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f": did you mean '{matches[0]}'?" if matches else ""


def _one_line(error: Exception) -> str:
    """What Hydra says and why, on one line, without its advice on environment variables."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else ""
    lines = [short(line.strip().rstrip(".:"), 300) for line in f"{error}\n{cause}".splitlines()]
    noise = ("Set the environment variable", "full_key:", "object_type=")
    said = ": ".join(dict.fromkeys(line for line in lines if line and not line.startswith(noise)))
    return said or f"the settings cannot be read ({type(error).__name__})"
