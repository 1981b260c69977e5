"""What may be typed behind `train.py`: taken if it can be run, else refused in one sentence before it begins."""

from __future__ import annotations

import pickle
import random
import shlex
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, open_dict
from omegaconf.grammar_parser import parse

from nano_think import config
from nano_think.artifacts import build
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


@lru_cache(maxsize=1000)
def kept(choices: tuple[str, ...]) -> bytes:
    """The composition of these choices, by Hydra; packed, which is smaller and faster to copy than to compose."""
    return pickle.dumps(compose("config", list(choices), return_hydra_config=True))


def fast_compose(name: str, overrides: list[str]) -> Any:
    """`hydra.compose`, the choices of groups composed once: Hydra's own function puts the rest on top."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    choices = [o for o in parsed if o.key_or_group in (*GROUPS, "experiments", "hydra.searchpath")]
    cfg = pickle.loads(kept(tuple(o.input_line for o in choices)))
    others = [o for o in parsed if o not in choices]
    OmegaConf.set_readonly(cfg.hydra, False)
    with open_dict(cfg):
        ConfigLoaderImpl._apply_overrides_to_config(others, cfg)
    OmegaConf.set_struct(cfg, True)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def read_once(load: Callable[..., Any]) -> Callable[..., Any]:
    """Hydra's reader of a YAML file, which reads no file twice."""
    files: dict[tuple[str, str], bytes] = {}

    def call(source: Any, name: str) -> Any:
        if (source.path, name) not in files:
            files[source.path, name] = pickle.dumps(load(source, name))
        return pickle.loads(files[source.path, name])

    return call


def asked_once(check: Callable[[Any, str], None]) -> Callable[[Any, str], None]:
    """The check of a network, which does not build again what it has accepted."""
    accepted: set[str] = set()

    def call(spec: Any, path: str) -> None:
        if (key := f"{path}: {spec!r}") not in accepted:
            check(spec, path)
            accepted.add(key)

    return call


def drawn(rng: random.Random) -> Case:
    """(arguments, whether they are valid): some valid, nine tenths a valid list with one to three changes."""
    base = list(rng.choice(BASES))
    chance = rng.random()
    if chance < 0.05:
        return Case((base, True), False)
    if chance < 0.1:
        junk = [
            rng.choice(HOSTILE_TEXT) + rng.choice(("", "=")) + rng.choice(VALUES)
            for _ in range(rng.randint(1, 3))
        ]
        return Case(([argument.replace("\x00", "") for argument in junk], False), False)
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        rng.choices(list(CHANGES), list(CHANGES.values()))[0](base, rng)
    return Case(([argument.replace("\x00", "") for argument in base], False), True)


def new_value(base: list[str], rng: random.Random) -> None:
    """A setting that there is, with a value of another one, which may be of its kind, or with any."""
    key, other = rng.choice(leaves()), rng.choice(leaves())
    while rng.random() < 0.5 and type(value_of(other)) is not type(value_of(key)):
        other = rng.choice(leaves())
    value = rng.choice(VALUES) if rng.random() < 0.4 else written(value_of(other))
    base.append(f"{rng.choice(('', '', '', '', '++', '+'))}{key}={value}")


def near_value(base: list[str], rng: random.Random) -> None:
    """A setting that there is, with its own value changed a little."""
    key = rng.choice(leaves())
    base.append(f"{key}={near(value_of(key), rng)}")


def near(value: Any, rng: random.Random) -> str:
    """A value changed a little, as an argument says it."""
    match value:
        case bool():
            return rng.choice((written(not value), "1", f"{value}x"))
        case int() | float():
            numbers = (-value, value * 2, value + 1, value * 1000, value / 3, f"{value}x", [value], value - 1)
            return written(rng.choice(numbers))
        case str():
            return change_text(value, rng) if rng.random() < 0.2 else typo(value, rng)
        case list() if value:
            lists = (value[1:], value * 2, value[0], [[value[0]]], [*value, near(value[0], rng)])
            return written(rng.choice(lists))
        case None:
            return rng.choice(("0", "1", "-1", "0.5", "true", "none", "''", "[]", "{}"))
    return rng.choice(("null", "[]", "{}", "0", "{a: 1}", "abc"))


def typo(text: str, rng: random.Random) -> str:
    """A letter too few, too many or another."""
    place = rng.randrange(len(text) + 1)
    letter = rng.choice("abcdefghijklmnopqrstuvwxyz_0123456789.-")
    return rng.choice((text[:place], text[:place] + letter)) + text[place + rng.randrange(2) :]


def written(value: Any) -> str:
    """A plain value as an argument says it."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list():
            return f"[{','.join(map(written, value))}]"
        case dict():
            return f"{{{','.join(f'{key}:{written(child)}' for key, child in value.items())}}}"
    return str(value)


def misspelt(base: list[str], rng: random.Random) -> None:
    """A key with a letter too few, too many or another, or with more amiss."""
    key = rng.choice([*leaves(), *GROUPS])
    base.append(f"{rng.choice((change_text, typo))(key, rng)}={rng.choice(VALUES)}")


def removed(base: list[str], rng: random.Random) -> None:
    """A setting or a part of one taken away."""
    key = rng.choice(leaves()).split(".")
    base.append(f"~{'.'.join(key[: rng.randint(1, len(key))])}")


def another_option(base: list[str], rng: random.Random) -> None:
    """Another option of a group, in place of the one that was chosen or beside it.

    Of few commands, as each new set of options is another composition, which is what takes long.
    """
    base[:] = rng.choice(BASES[-4:])
    group = rng.choice(list(OPTIONS))
    base[:] = [argument for argument in base if not argument.startswith(f"{group}=") or rng.random() < 0.2]
    base.append(f"{group}={rng.choice(OPTIONS[group])}")


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
    base[place] = rng.choice((change_text, typo))(base[place], rng)


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
    names = ("expert", "mla", "data", "tokenizer", "transformer", "diffuser", "expert", "experts", "")
    changed: list[str] = []
    rng.choice((new_value, near_value))(changed, rng)
    base.append(f"prereq.{rng.choice(names)}.{changed[0].lstrip('+')}")


# How often each is drawn.
CHANGES: dict[Callable[[list[str], random.Random], None], int] = {
    new_value: 6, near_value: 6, another_option: 4, order_and_number: 3, handed_on: 2, removed: 2, misspelt: 1,
    argument_changed: 1, whole_group: 1,
}  # fmt: skip


@lru_cache(maxsize=1)
def everything() -> Any:
    """The composition with all settings of all phases."""
    return config._compose(["phase=study", "size=tiny"], ROOT)


def value_of(key: str) -> Any:
    """The value of a setting among all of them."""
    value = plain()
    for part in key.split("."):
        value = value[part]
    return value


@lru_cache(maxsize=1)
def plain() -> Any:
    """`everything` as plain, resolved values."""
    return OmegaConf.to_container(everything(), resolve=True)


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


# The slow ones in two parts, which two processes may share.
@pytest.mark.parametrize(
    ("count", "seed"), [(60, 0), *(pytest.param(5000, seed, marks=pytest.mark.slow) for seed in (1, 2))]
)
def test_arguments_are_taken_or_refused_in_one_sentence(tmp_path, monkeypatch, count, seed):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "compose", fast_compose)
    monkeypatch.setattr(FileConfigSource, "load_config", read_once(FileConfigSource.load_config))
    monkeypatch.setattr(build, "check", asked_once(build.check))
    monkeypatch.setattr("omegaconf.base.parse", lru_cache(maxsize=4000)(parse))  # of interpolations
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

    tally = campaign("command lines", drawn, judge, count, seed)
    print(f"\n{tally.line()}")
    assert tally.findings == []
    assert list(tmp_path.iterdir()) == []
    assert tally.mutated > tally.tried / 2
    assert tally.reached > tally.tried / 2
    assert tally.growth_mb < 100
