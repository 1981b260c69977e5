"""What may be typed behind `train.py`: taken if it can be run, else refused in one sentence before it begins."""

from __future__ import annotations

import copy
import random
import shlex
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, open_dict

from nano_think import config
from nano_think.config import checked_overrides
from nano_think.errors import UserError
from tests.reliability.mutations import HOSTILE_TEXT, Case, campaign, change_text

ROOT = Path(__file__).resolve().parents[2]
GROUPS = sorted(folder.name for folder in (ROOT / "conf").iterdir() if folder.is_dir())
OPTIONS = {group: sorted(p.stem for p in (ROOT / "conf" / group).glob("[!_]*.yaml")) for group in GROUPS}
OPTIONS["experiments"] = sorted(path.stem for path in (ROOT / "experiments").glob("*.yaml"))


def readme_commands() -> Iterator[list[str]]:
    """The overrides of every `python train.py` of the README."""
    for line in (ROOT / "README.md").read_text().splitlines():
        if line.startswith("python train.py "):
            yield [word.replace("$CORPUS", "/texts") for word in shlex.split(line)[2:]]


README = list(readme_commands())
BASES = [
    *README,
    ["phase=mla", "size=tiny", "optimizer=muon", "schedule=wsd", "model.mla.kv=full"],
    ["phase=expert", "expert=diffuser", "size=tiny", "experts.diffuser.param=eps", "trainer.max_steps=6"],
    ["phase=study", "experiments=study", "data=jsonl", "data.root=/texts", "study.seeds=[1,2]"],
    ["phase=tokenizer", "tokenizer.vocab_size=600", "data.source.megabytes=2"],
    ["phase=generate", "expert=transformer", "generate.top_k=null", "prompt=Hello, [world]"],
    ["phase=eval", "eval.rows=3", "eval.split=validation", "precision=32-true", "data.mixing=[1,2,3,4,5]"],
    ["phase=mla", "expert=all", "training.mla.stage_7c.lr=1e-3", "++prereq.expert.trainer.max_steps=9"],
    ["phase=parameters", "size=seed", "experts.state_space.d_conv=3", "expert.embed=own"],
]  # fmt: skip
VALUES = (
    "0", "-1", "1", "2", "3", "7", "0.5", "-0.5", "1e-3", "1e400", "nan", "inf", "-inf", "null", "true", "''",
    "10000000000", str(2**63), str(10**30), "9" * 5000, "[]", "{}", "[1,2]", "[[]]", "{a:1}", "{a:{b:[null]}}",
    "???", "${seed}", "${size.d_model}", "${nothing}", "${oc.env:NOTHING}", "${${seed}}", "${", "'", '"', "[", "{",
    "a,b", "1,2", "range(3)", "glob(*)", "choice(1,2)", "interval(0,1)", "int(x)", "(", "\\", "=", "=1", "#", "@",
    "漢字", "\x07", "é", "os.system", "nano_think.model.NanoThink", "-", "--", "7e", "a b", " ", "1_000", "0x10",
    "1:30", "yes", "~", "abc", "[" * 400, "{a:" * 400,
)  # fmt: skip


@lru_cache(maxsize=64)
def kept(choices: tuple[str, ...]) -> tuple[Any, Any]:
    """The composition of these choices, by Hydra."""
    return compose("config", list(choices), return_hydra_config=True)


def fast_compose(name: str, overrides: list[str]) -> Any:
    """`hydra.compose`, the choices of groups composed once: Hydra's own function puts the rest on top."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    choices = [o for o in parsed if o.key_or_group in (*GROUPS, "experiments", "hydra.searchpath")]
    cfg = copy.deepcopy(kept(tuple(o.input_line for o in choices)))
    others = [o for o in parsed if o not in choices]
    OmegaConf.set_readonly(cfg.hydra, False)
    with open_dict(cfg):
        ConfigLoaderImpl._apply_overrides_to_config(others, cfg)
    OmegaConf.set_struct(cfg, True)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def drawn(rng: random.Random) -> Case:
    """(arguments, whether they are valid): some valid, nine tenths a valid list with one to three changes."""
    base = list(rng.choice(BASES))
    if rng.random() < 0.05:
        return Case((base, True), False)
    if rng.random() < 0.05:
        junk = [
            rng.choice(HOSTILE_TEXT) + rng.choice(("", "=")) + rng.choice(VALUES)
            for _ in range(rng.randint(1, 3))
        ]
        return Case(([argument.replace("\x00", "") for argument in junk], False), False)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        CHANGES[rng.randrange(len(CHANGES))](base, rng)
    return Case(([argument.replace("\x00", "") for argument in base], False), True)


def new_value(base: list[str], rng: random.Random) -> None:
    """A setting that there is, with another value."""
    base.append(f"{rng.choice(('', '', '', '+', '++'))}{rng.choice(leaves())}={rng.choice(VALUES)}")


def near_value(base: list[str], rng: random.Random) -> None:
    """A setting that there is, with its own value changed a little."""
    key = rng.choice(leaves())
    value = OmegaConf.to_container(everything(), resolve=True)
    for part in key.split("."):
        value = value[part]
    if isinstance(value, bool) or not isinstance(value, int | float):
        value = change_text(str(value), rng)
    else:
        value = rng.choice(
            (-value, value * 2, value + 1, value * 1000, value / 3, f"{value}x", [value], value - 1)
        )
    base.append(f"{key}={value}")


def misspelt(base: list[str], rng: random.Random) -> None:
    """A key with a letter too few, too many or another."""
    key = rng.choice([*leaves(), *GROUPS])
    base.append(f"{change_text(key, rng)}={rng.choice(VALUES)}")


def removed(base: list[str], rng: random.Random) -> None:
    """A setting or a part of one taken away."""
    key = rng.choice(leaves()).split(".")
    base.append(f"~{'.'.join(key[: rng.randint(1, len(key))])}")


def whole_group(base: list[str], rng: random.Random) -> None:
    """A group replaced, by an option that there is, one that there is not, or a value."""
    group = rng.choice(
        [*OPTIONS, "prereq.expert.trainer", "training.mla", "model.router", "hydra.sweeper", "study"]
    )
    mark = rng.choice(("", "", "", "+", "++", "~"))
    base.append(f"{mark}{group}={rng.choice([*OPTIONS.get(group, []), *VALUES])}")


def argument_changed(base: list[str], rng: random.Random) -> None:
    """One argument changed as text."""
    place = rng.randrange(len(base))
    base[place] = change_text(base[place], rng)


def order_and_number(base: list[str], rng: random.Random) -> None:
    """An argument twice, dropped, or of another command."""
    place = rng.randrange(len(base))
    match rng.randrange(3):
        case 0:
            base.append(base[place])
        case 1 if len(base) > 1:
            del base[place]
        case _:
            base.append(rng.choice(rng.choice(BASES)))


def handed_on(base: list[str], rng: random.Random) -> None:
    """A setting of a prerequisite."""
    names = ("expert", "mla", "data", "tokenizer", "transformer", "experts", "x", "")
    base.append(f"prereq.{rng.choice(names)}.{rng.choice(leaves())}={rng.choice(VALUES)}")


CHANGES: tuple[Callable[[list[str], random.Random], None], ...] = (
    new_value, new_value, near_value, near_value, misspelt, removed, whole_group, argument_changed,
    order_and_number, handed_on,
)  # fmt: skip


@lru_cache(maxsize=1)
def everything() -> Any:
    """The composition with all settings of all phases."""
    return config._compose(["phase=study", "size=tiny"], ROOT)


@lru_cache(maxsize=1)
def leaves() -> tuple[str, ...]:
    """Dotted keys of all settings."""

    def walk(node: Any, path: str) -> Iterator[str]:
        if not isinstance(node, dict) or not node:
            yield path
            return
        for key, child in node.items():
            yield from walk(child, f"{path}.{key}".lstrip("."))

    plain = OmegaConf.to_container(everything(), resolve=False)
    return tuple(key for key in walk(plain, "") if "per_size" not in key)


@pytest.mark.parametrize("count", [60, pytest.param(10_000, marks=pytest.mark.slow)])
def test_arguments_are_taken_or_refused_in_one_sentence(tmp_path, monkeypatch, count):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "compose", fast_compose)
    reach: list[Callable[[], None]] = []
    validate = config.validate
    monkeypatch.setattr(config, "validate", lambda *given: (reach[0](), validate(*given)))

    def judge(data: tuple[list[str], bool], reached: Callable[[], None]) -> None:
        arguments, valid = data
        reach[:] = [reached]
        try:
            checked = checked_overrides(list(arguments), ROOT)
        except UserError:
            assert not valid
            raise
        assert len(checked) >= len(arguments)

    tally = campaign("command lines", drawn, judge, count)
    print(f"\n{tally.line()}")
    assert tally.findings == []
    assert list(tmp_path.iterdir()) == []
    assert tally.mutated > tally.tried / 2
    assert tally.reached > tally.tried / 4
    assert tally.growth_mb < 100
