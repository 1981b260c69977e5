"""What the values of a run may be, so that an impossible one is refused by name before anything is built.

`LIMITS` holds what no signature says: that a learning rate is a number is written there, that it is above 0 here.
What only a constructor can tell (heads that do not divide the width) is asked of the constructor, on a device
without memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nano_think.errors import UserError
from nano_think.signatures import located, short

# Phases that know no network.
WITHOUT_NETWORK = ("data", "tokenizer")
# Far above what any machine holds, and low enough that nothing overflows on the way to the message that says so.
MOST = 1 << 24


@dataclass(frozen=True)
class Whole:
    """A whole number from `least` to `most`; null where `none` allows it."""

    least: int = 1
    most: int = MOST
    none: bool = False

    def __str__(self) -> str:
        return f"a whole number from {self.least} to {self.most}" + " or null" * self.none

    def takes(self, value: Any) -> bool:
        return (value is None and self.none) or (type(value) is int and self.least <= value <= self.most)


@dataclass(frozen=True)
class Real:
    """A finite number from `least` to `most`, or above `least` where `above`; null where `none` allows it."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    none: bool = False

    def __str__(self) -> str:
        lower = (
            f" {'above' if self.above else 'of at least'} {self.least:g}" if self.least > -math.inf else ""
        )
        upper = f" and at most {self.most:g}" if self.most < math.inf else ""
        return f"a finite number{lower}{upper}" + " or null" * self.none

    def takes(self, value: Any) -> bool:
        if value is None:
            return self.none
        if type(value) not in (int, float) or not math.isfinite(value):
            return False
        return (value > self.least if self.above else value >= self.least) and value <= self.most


@dataclass(frozen=True)
class OneOf:
    """One of a few words."""

    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"one of {', '.join(self.words)}"

    def takes(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.words


@dataclass(frozen=True)
class Flag:
    """true or false."""

    def __str__(self) -> str:
        return "true or false"

    def takes(self, value: Any) -> bool:
        return isinstance(value, bool)


Rule = Whole | Real | OneOf | Flag
COUNT, SOME, POSITIVE, SHARE = Whole(), Whole(none=True), Real(0, above=True), Real(0, 1)
SEED = Whole(0, 2**32 - 1)
FIT: dict[str, Rule] = {
    "lr": POSITIVE,
    "weight_decay": Real(0),
    "warmup_steps": Whole(0, 2**40),
    "batch_size": COUNT,
    "accumulate": COUNT,
    "max_epochs": SOME,
    "max_steps": Whole(1, 2**40, none=True),
    "max_flops": Real(0, above=True, none=True),
    "patience": Real(0),
}
STAGE = {key: FIT[key] for key in ("lr", "weight_decay", "warmup_steps", "max_steps", "max_flops")}
MLA = {key: FIT[key] for key in ("batch_size", "accumulate", "max_epochs", "patience")} | {
    "static_tokens": Whole(1, 2**40),
    "router_lr_scale": POSITIVE,
    "anchor": Real(0),
    "entropy_token": Real(),
    "entropy_mean": Real(),
    "memory_dropout": SHARE,
    "unfreeze": OneOf(("none", "adapters", "all")),
    "cache.mode": OneOf(("auto", "off")),
    "cache.memory_gb": Real(0),
    "cache.disk_gb": Real(0),
    **{f"stage_7{letter}.{key}": rule for letter in "bcd" for key, rule in STAGE.items()},
}
LIMITS: dict[str, Rule] = {
    "seed": SEED,
    "precision": OneOf(("auto", "32-true", "bf16-mixed", "16-mixed", "64-true")),
    "size.d_model": Whole(2, 1 << 16),
    "size.vocab_size": Whole(259),
    "size.seq_len": Whole(2, 1 << 20),
    "size.chunk": Whole(1, 1 << 20),
    "data.temperature": Real(0, above=True),
    "data.mode": OneOf(("packed", "padded")),
    "data.val_rows": SOME,
    "data.train_tokens": Whole(1, 2**48, none=True),
    "data.train_part": Whole(0),
    "data.num_workers": Whole(0, 1024),
    "data.processes": Whole(1, 1024, none=True),
    "model.fusion.space": OneOf(("hidden", "prob", "logit")),
    "model.expert_input": OneOf(("context", "raw")),
    "model.router.tau": POSITIVE,
    "model.retrieval.k": Whole(0, 1 << 16),
    "model.retrieval.chunk": Whole(1, 1 << 20),
    "model.retrieval.granularity": OneOf(("chunk", "token", "sequence")),
    "model.retrieval.write_on_read": Flag(),
    "model.store.backend": OneOf(("faiss", "torch", "ivf")),
    "model.store.policy": OneOf(("fifo", "reservoir", "lru")),
    "model.store.capacity": Whole(1, 2**40),
    "model.store.rows": COUNT,
    "trainer.max_steps": FIT["max_steps"],
    "trainer.max_epochs": SOME,
    "trainer.accumulate_grad_batches": SOME,
    "trainer.val_check_interval": SOME,
    "trainer.log_every_n_steps": COUNT,
    "trainer.gradient_clip_val": Real(0, none=True),
    "eval.split": OneOf(("expert_train", "fusion_train", "validation", "test")),
    "eval.rows": SOME,
    "eval.batch_size": COUNT,
    "eval.resamples": COUNT,
    "eval.prompts": Whole(0),
    "eval.sample_tokens": COUNT,
    "generate.max_new_tokens": COUNT,
    "generate.temperature": Real(0),
    "generate.top_k": SOME,
    "generate.top_p": Real(0, 1, above=True),
}
# What need not be there to be right.
OPTIONAL: dict[str, Rule] = {
    "expert_seed": Whole(0, SEED.most, none=True),
    "tokenizer.vocab_size": Whole(259),
    "tokenizer.kind": OneOf(("bpe", "gpt2")),
    "data.source.megabytes": Real(0, 1e6, above=True),
    "data.source.seed": SEED,
    "data.source.max_line_bytes": Whole(1, 2**40),
    "optimizer.lr": Real(0, above=True, none=True),
    "optimizer.weight_decay": Real(0, none=True),
    "model.router.decay": SHARE,
    "model.mla.rope_theta": POSITIVE,
}
# Whole numbers of a network that may be 0; all others count something that must be there.
MAY_BE_ZERO = ("noise_seed", "rope_dim")
MOST_LAYERS = 1000


def check_values(values: Mapping[str, Any], steps: bool = True) -> None:
    """Raise UserError for a value of a resolved configuration that nothing could be made with.

    steps: whether optimizer and schedule are tried too.
    """
    rules = dict(LIMITS)
    for name in values["experts"]:
        rules |= {f"training.{name}.{key}": rule for key, rule in FIT.items()}
    mla = {f"training.mla.{key}": rule for key, rule in MLA.items()}
    mixes = _has(values, "training.mla.per_size")  # phases that do not may have a setting of it handed on
    for path, rule in (rules | mla if mixes else rules).items():
        _check(path, _select(values, path), rule)
    for path, rule in (OPTIONAL if mixes else OPTIONAL | mla).items():
        if _has(values, path):
            _check(path, _select(values, path), rule)
    _check_needs(values)
    if values["phase"]["name"] == "study":  # other phases may be told a part of it
        check_study(values["study"])
    if values["phase"]["name"] not in WITHOUT_NETWORK:
        _check_networks(values)
        if steps:
            _check_steps(values)


def _check(path: str, value: Any, rule: Rule) -> None:
    if not rule.takes(value):
        raise UserError(f"{path}={short(value)} must be {rule}")


def _select(values: Any, path: str) -> Any:
    """The value at a dotted path; UserError where it, or what it stands below, is not there."""
    done: list[str] = []
    for part in path.split("."):
        if not isinstance(values, Mapping):
            raise UserError(
                f"{'.'.join(done)}={short(values)} must be a group of settings, as it holds {path}"
            )
        if part not in values:
            raise UserError(f"{path} is needed and cannot be left out: give it a value")
        values = values[part]
        done.append(part)
    return values


def _has(values: Any, path: str) -> bool:
    first, _, rest = path.partition(".")
    there = isinstance(values, Mapping) and first in values
    return there and (not rest or _has(values[first], rest))


def _check_needs(values: Mapping[str, Any]) -> None:
    """Raise UserError for experts that need what there is not, or each other in a circle."""
    needs = {name: _select(values, f"training.{name}.needs") for name in values["experts"]}
    for name, needed in needs.items():
        if not isinstance(needed, list) or any(other not in list(needs) for other in needed):
            raise UserError(f"training.{name}.needs={short(needed)} must be a list of {', '.join(needs)}")
    done: set[str] = set()
    while ready := [name for name, needed in needs.items() if name not in done and done.issuperset(needed)]:
        done.update(ready)
    if len(done) < len(needs):
        raise UserError(
            f"the needs of {', '.join(sorted(set(needs) - done))} go in a circle: mend training.*.needs"
        )


def _check_networks(values: Mapping[str, Any]) -> None:
    """Raise UserError for networks that their own constructors refuse."""
    from nano_think.artifacts.build import check as check_network  # here, as it imports torch

    names = values["expert"]["names"]
    parts = {f"experts.{name}": values["experts"][name] for name in values["experts"]}
    parts |= {path: _select(values, path) for path in ("model.mla", "model.router")}
    supplied: dict[str, dict[str, int]] = {"model.router": {"num_experts": len(names)}}
    supplied["model.mla"] = {"memory": values["model"]["retrieval"]["k"] > 0}
    for path, spec in parts.items():
        if not isinstance(spec, Mapping) or "_target_" not in spec:
            raise UserError(f"{path}={short(spec)} describes no network: it must name a class by _target_")
        spec = {**spec, **supplied.get(path, {})}
        for where, value in _whole_numbers(spec, path):
            key = where.rsplit(".", 1)[-1]
            most = MOST_LAYERS if key == "num_layers" else MOST
            _check(where, value, Whole(0 if key in MAY_BE_ZERO else 1, most))
        check_network(spec, path)


def _whole_numbers(spec: Any, path: str) -> Iterator[tuple[str, int]]:
    if isinstance(spec, Mapping):
        for key, value in spec.items():
            yield from _whole_numbers(value, f"{path}.{key}")
    elif type(spec) is int:
        yield path, spec


def _check_steps(values: Mapping[str, Any]) -> None:
    """Raise UserError where an optimizer or schedule of this package cannot be made, over a layer of nobody."""
    from torch import nn

    parts = {
        key: {k: v for k, v in values[key].items() if v is not None} for key in ("optimizer", "schedule")
    }
    if not all(str(part.get("_target_")).startswith("nano_think.optim.") for part in parts.values()):
        return
    make = {key: located(part["_target_"]) for key, part in parts.items()}
    said = {key: {k: v for k, v in part.items() if not k.startswith("_")} for key, part in parts.items()}
    try:
        key = "optimizer"
        optimizer = make[key](
            nn.Linear(2, 2), **{"lr": 1e-3, "weight_decay": 0.0, **said[key], "lr_scale": None}
        )
        key = "schedule"
        schedule = make[key](optimizer, total_steps=10, **said[key])
        for _ in range(10):
            optimizer.step()
            schedule.step()
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{key}: {short(error, 200)}") from error


# the least that each number of a study may be
STUDY = {"expert_tokens": 1, "fusion_tokens": 1, "evidence_tokens": 10, "pool": 2, "workers": 1, "rows": 1}


TUNING = ("factors", "fusion_factors", "dropouts", "horizons", "share")


def check_study(settings: Mapping[str, Any]) -> None:
    """Raise UserError for values of the `study` node that mean nothing."""
    for key, least in STUDY.items():
        value = _select({"study": settings}, f"study.{key}")
        if not Whole(least, 2**48, none=key == "rows").takes(value):
            raise UserError(f"study.{key}={short(value)} is not a whole number of at least {least}")
    for key in ("seeds", *(f"tuning.{name}" for name in TUNING)):
        _select({"study": settings}, f"study.{key}")  # that it is there
    seeds = settings["seeds"]
    if not isinstance(seeds, list) or not seeds or not all(SEED.takes(seed) for seed in seeds):
        raise UserError(f"study.seeds={seeds} names no seeds: give whole numbers from 0 on, as [1, 2, 3]")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"study.seeds={seeds} names a seed twice, which would count as two: name each once")
    tuning = settings["tuning"]
    for key in ("factors", "fusion_factors"):
        if not isinstance(tuning[key], list) or not tuning[key] or not all(map(POSITIVE.takes, tuning[key])):
            raise UserError(f"study.tuning.{key}={short(tuning[key])}: give at least one factor, all above 0")
    dropouts = tuning["dropouts"]
    if not isinstance(dropouts, list) or not all(
        SHARE.takes(dropout) and dropout < 1 for dropout in dropouts
    ):
        raise UserError(f"study.tuning.dropouts={short(dropouts)}: give shares of units, from 0 to below 1")
    horizons = tuning["horizons"]
    if not isinstance(horizons, list) or not all(map(Real(0, 1, above=True).takes, horizons)):
        raise UserError(
            f"study.tuning.horizons={short(horizons)}: give shares of a budget, above 0, at most 1"
        )
    if not Real(0, 1, above=True).takes(tuning["share"]):
        raise UserError(
            f"study.tuning.share={short(tuning['share'])} is no share: give a number above 0, at most 1"
        )
