"""Values that nothing could be made with are refused by name, those of every size and phase are taken."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf

from nano_think import config
from nano_think.errors import UserError
from nano_think.limits import check_values
from nano_think.signatures import check_keywords, fits, located, named, short

ROOT = Path(__file__).resolve().parents[1]


@lru_cache(maxsize=1)
def composed() -> dict[str, Any]:
    return OmegaConf.to_container(config._compose(["phase=study", "size=tiny"], ROOT), resolve=True)


def changed(path: str, value: Any) -> dict[str, Any]:
    """The settings of `phase=study size=tiny` with another value at a dotted path, `...` for none."""
    values = copy.deepcopy(composed())
    *groups, key = path.split(".")
    node = values
    for group in groups:
        node = node[group]
    if value is ...:
        del node[key]
    else:
        node[key] = value
    return values


def check(values: dict[str, Any]) -> None:
    check_keywords(values, ("experts", "model", "optimizer", "schedule", "trainer", "data"))
    check_values(values)


def refused(path: str, value: Any) -> str:
    with pytest.raises(UserError) as caught:
        check(changed(path, value))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


WHOLE = (0, -1, 2.0, 0.5, "3", "abc", True, [1], {}, 10**30)
NUMBER = (-1, "1e-3", True, float("nan"), float("inf"), [], None)
CASES = [
    *(("training.transformer.batch_size", value) for value in WHOLE),
    *(("training.transformer.lr", value) for value in (0, *NUMBER)),
    *(("training.mla.stage_7c.lr", value) for value in (0, *NUMBER)),
    *(("training.diffuser.weight_decay", value) for value in NUMBER),
    *(("size.seq_len", value) for value in (1, *WHOLE)),
    *(("size.d_model", value) for value in (1, *WHOLE)),
    *(("size.vocab_size", value) for value in (3, 258, *WHOLE)),
    *(("experts.transformer.num_layers", value) for value in (1001, *WHOLE)),
    *(("experts.state_space.d_inner", value) for value in WHOLE),
    *(("experts.diffuser.dropout", value) for value in (1.5, *NUMBER)),
    *((f"data.{key}", value) for key in ("val_rows", "train_tokens", "processes") for value in WHOLE),
    ("training.transformer.max_steps", 0),
    ("training.transformer.patience", -1),
    ("training.transformer.warmup_steps", -1),
    ("training.transformer.max_flops", 0),
    ("training.transformer.needs", ["transformer"]),
    ("training.transformer.needs", ["diffuser"]),
    ("training.transformer.needs", ["nobody"]),
    ("training.transformer.needs", "transformer"),
    ("training.transformer.needs", [["diffuser"]]),
    ("training.mla.memory_dropout", 1.5),
    ("training.mla.unfreeze", "some"),
    ("training.mla.cache.mode", "on"),
    ("training.mla.static_tokens", 0),
    ("training.mla.stage_7b", 5),
    ("training.transformer.lr", ...),
    ("size.chunk", 0),
    ("data.temperature", 0),
    ("data.mode", "loose"),
    ("data.train_part", -1),
    ("data.num_workers", -1),
    ("data.source.megabytes", 0),
    ("data.source.megabytes", "much"),
    ("data.source.nothing", 1),
    ("model.router.tau", 0),
    ("model.router.floor", 0.5),
    ("model.router.pool", "mean"),
    ("model.router.span", 0),
    ("model.mla.num_heads", 3),
    ("model.mla.num_heads", 32),
    ("model.mla.rope_theta", 0),
    ("model.mla.kv", "none"),
    ("model.mla._target_", "os.system"),
    ("model.mla._target_", "nano_think.mla.Nothing"),
    ("model.mla._target_", 3),
    ("model.fusion.space", "output"),
    ("model.expert_input", "none"),
    ("model.retrieval.k", -1),
    ("model.retrieval.granularity", "word"),
    ("model.retrieval.write_on_read", 1),
    ("model.store.policy", "lifo"),
    ("model.store.rows", 0),
    ("experts.transformer.num_heads", 3),
    ("experts.transformer.num_heads", 64),
    ("experts.diffuser.num_heads", 5),
    ("experts.diffuser.train_T", 0),
    ("experts.diffuser.schedule", "quadratic"),
    ("experts.diffuser.param", "x1"),
    ("experts.transformer.nothing", 1),
    ("experts.transformer", 3),
    ("trainer.max_steps", 0),
    ("trainer.gradient_clip_val", -1),
    ("trainer.val_check_interval", 0),
    ("trainer.accumulate_grad_batches", 0),
    ("trainer.nothing", 0),
    ("optimizer.lr", -1),
    ("optimizer.betas", [2.0, 3.0]),
    ("optimizer.betas", [0.9]),
    ("optimizer.betas", 0.9),
    ("optimizer.weight_decay", -1),
    ("optimizer.nothing", 1),
    ("schedule.nothing", 1),
    ("schedule.final", "low"),
    *(("precision", value) for value in ("fp8", "bf16-true", "16-true")),
    ("seed", -1),
    ("seed", 2**32),
    ("expert_seed", -1),
    ("eval.split", "train"),
    ("eval.batch_size", 0),
    ("eval.rows", 0),
    ("generate.temperature", -1),
    ("generate.top_p", 0),
    ("generate.top_k", 0),
    ("generate.max_new_tokens", 0),
    ("study.workers", 0),
    ("study.seeds", [1, 1]),
    ("study.tuning.share", 2),
    ("study.tuning.share", ...),
    ("study.tuning", ...),
    ("study.seeds", ...),
    ("study.tuning.factors", 1),
    ("model.mla", ...),
    ("model.mla", 7),
    ("model.router", ...),
    ("tokenizer.vocab_size", 258),
    ("tokenizer.kind", "bytes"),
]


@pytest.mark.parametrize(("path", "value"), CASES, ids=lambda value: str(value)[:30])
def test_an_impossible_value_is_refused_by_name(path, value):
    message = refused(path, value)
    node = path.rsplit(".", 1)[0]
    assert path in message or message.startswith((f"{node}:", f"{node}.")) or "training.*.needs" in message


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (
            "training.transformer.lr",
            "training.transformer.lr is needed and cannot be left out: give it a value",
        ),
        ("model.router.tau", "model.router.tau is needed"),
    ],
)
def test_a_value_taken_away_is_missed(path, said):
    assert said in refused(path, ...)


def test_messages_say_what_would_be_right():
    assert refused("training.transformer.lr", -1) == (
        "training.transformer.lr=-1 must be a finite number above 0"
    )
    assert refused("size.seq_len", 1) == "size.seq_len=1 must be a whole number from 2 to 1048576"
    assert refused("data.val_rows", 0).endswith("must be a whole number from 1 to 16777216 or null")
    assert (
        refused("experts.transformer.num_heads", 3)
        == "experts.transformer: num_heads 3 must divide d_model 64"
    )
    assert refused("model.mla.kv", "none").endswith("must be one of latent, full, seed_bottleneck")
    assert "it has d_model, num_layers" in refused("experts.transformer.nothing", 1)
    assert refused("model.fusion.space", "x" * 5000) == (
        f"model.fusion.space={'x' * 60}... must be one of hidden, prob, logit"
    )


@pytest.mark.parametrize("size", ["tiny", "small", "study", "seed", "budget30"])
@pytest.mark.parametrize("phase", ["study", "expert", "data"])
def test_every_size_is_possible(size, phase):
    config.validate(config._compose([f"phase={phase}", f"size={size}"], ROOT), config.GROUPS)


@pytest.mark.parametrize(
    "path", ["optimizer.lr", "data.val_rows", "study.rows", "trainer.max_steps", "expert_seed"]
)
def test_null_is_taken_where_it_means_something(path):
    check_values(changed(path, None))


def test_settings_of_the_mixture_may_be_said_to_a_phase_that_does_not_mix():
    said = config._compose(["phase=expert", "++training.mla.static_tokens=1024"], ROOT)
    config.validate(said)
    with pytest.raises(UserError, match=r"training\.mla\.static_tokens=0 must be a whole number"):
        config.validate(config._compose(["phase=expert", "++training.mla.static_tokens=0"], ROOT))


def test_an_experiment_may_speak_of_a_study_to_another_phase():
    config.validate(config._compose(["phase=expert", "experiments=study"], ROOT))


def test_annotations_are_read_as_types():
    assert fits(3, float)
    assert not fits(True, int)
    assert not fits(3.0, int)
    assert not fits("3", int | None)
    assert fits(None, int | None)
    assert fits("a", Literal["a", "b"])
    assert not fits("c", Literal["a", "b"])
    assert fits([0.9, 1], tuple[float, float])
    assert not fits([0.9], tuple[float, float])
    assert not fits(float("nan"), float)
    assert fits(object(), Any)
    assert named(int | None) == "a whole number or null"
    assert named(Literal["a", "b"]) == "one of a, b"


@pytest.mark.parametrize(
    "target", ["", ".", "..a", "os", "os.nothing", "nothing.at.all", "nano_think.limits.LIMITS"]
)
def test_what_names_no_class_is_refused(target):
    with pytest.raises(UserError, match="dotted path"):
        located(target)


def test_a_value_in_a_message_is_short_and_on_one_line():
    assert short("a\nb\x00\ud800") == r"a\nb\x00\ud800"
    assert short("x" * 61) == "x" * 60 + "..."
