"""What users type: every mistake is one clear sentence, free text arrives as typed, sweeps stay sweeps."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from nano_think.config import checked_overrides, register_schema
from nano_think.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def check(*arguments: str) -> list[str]:
    return checked_overrides(list(arguments), ROOT)


def composed(*arguments: str) -> DictConfig:
    """The configuration that Hydra makes of checked arguments."""
    overrides = check(*arguments)
    register_schema()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["sed=2"], ["'sed'", "did you mean 'seed'?"]),
        (["model.router.tao=2"], ["'model.router.tao'", "did you mean 'model.router.tau'?"]),
        (["+seeed=2"], ["did you mean 'seed'?"]),
        (["experts.state_space.d_cnv=3"], ["did you mean 'experts.state_space.d_conv'?"]),
        (["++experts.state_space.d_cnv=3"], ["did you mean 'experts.state_space.d_conv'?"]),
        (["experts.transfomer.num_layers=3"], ["did you mean 'experts.transformer"]),
        (["expert=transfomer"], ["all, diffuser, state_space, transformer", "did you mean 'transformer'?"]),
        (["phase=mla", "expert=transformer"], ["expert=all", "phase=expert expert=transformer"]),
        (["stage=9"], ["7a, 7b, 7c, 7d, all"]),
        (["size=medium"], ["budget30, seed, small, study, tiny"]),
        (["experiments=deno"], ["experiments=deno does not exist"]),
        (["data=jsonl"], ["data.root has no default"]),
        (["tokenizer=gpt2"], ["tokenizer.path has no default"]),
        (["seed=abc"], ["seed=abc", "Integer"]),
        (["seed=-1"], ["seed=-1 must be a whole number from 0"]),
        (["model.router.tau=["], ["model.router.tau=["]),
        (["phases"], ["'phases' is not a setting"]),
        (["qqq=2"], ["no setting 'qqq' (valid here: audit, callbacks, ckpt, compile, data, eval"]),
        (["~experts.foo"], ["experts.foo"]),
        (["-m", "seed=1,2", "optimizer=adamw,moon"], ["did you mean 'muon'?"]),
        (["-m", "stage=7e,7c"], ["7a, 7b, 7c, 7d, all"]),
        (["size.d_model=${size.width}"], ["width"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_mistake_is_one_sentence_that_says_what_to_do(arguments: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        check(*arguments)
    message = str(raised.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


PROMPTS = [
    "In the beginning, (God) said: a=b",
    'it\'s "so"\nsecond\tline ',
    "'quoted'",
    "[1, {two: 3}] ~ # $ % & * !",
    "${seed} and \\${seed} and C:\\new\\'x' and \\",
    "1e3",
    "null",
    "",
    "Ünïcödé — 漢字 🙂",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_arrives_as_it_was_typed(prompt: str) -> None:
    assert composed("phase=generate", f"prompt={prompt}").prompt == prompt


def test_a_prompt_with_commas_is_one_job_of_a_sweep() -> None:
    arguments = check("-m", "phase=generate", "prompt=a, b", "seed=1,2")
    assert arguments == ["-m", "phase=generate", "prompt='a, b'", "seed=1,2"]


@pytest.mark.parametrize("path", ["/a/b_c.d", "/a b/c,d(1)=[x]", "2024", "it's"])
def test_a_path_arrives_as_it_was_typed(path: str) -> None:
    keys = ["data.root", "run.dir", "ckpt", "prompt_file"]
    cfg = composed("data=jsonl", *(f"{key}={path}" for key in keys))
    assert [OmegaConf.select(cfg, key) for key in keys] == [path] * len(keys)


def test_paths_may_interpolate_and_may_be_switched_off() -> None:
    assert composed("run.dir=${run.root}/mine", "run.root=/r").run.dir == "/r/mine"
    assert composed("ckpt=null").ckpt is None
    assert composed("run.dir='/with space'").run.dir == "/with space"


def test_a_keyword_that_no_yaml_states_is_handed_on() -> None:
    assert check("experts.state_space.d_conv=3") == ["++experts.state_space.d_conv=3"]
    assert check("+experts.state_space.d_conv=3") == ["++experts.state_space.d_conv=3"]
    assert composed("experts.state_space.d_conv=3").experts.state_space.d_conv == 3
    assert composed("optimizer.lr=0.5").optimizer.lr == 0.5


def test_what_yaml_states_is_left_alone() -> None:
    arguments = ["phase=mla", "size=tiny", "expert.embed=own", "model.router.tau=2", "hydra.verbose=true"]
    assert check(*arguments) == arguments


def test_explicit_additions_and_deletions_pass() -> None:
    target = "nano_think.callbacks.throughput.Throughput"
    assert composed(f"+callbacks.mine._target_={target}").callbacks.mine._target_ == target
    assert "throughput" not in composed("~callbacks.throughput").callbacks


def test_flags_of_hydra_keep_their_values_and_sweeps_their_lists() -> None:
    assert check("--cfg", "job", "seed=2") == ["--cfg", "job", "seed=2"]
    arguments = ["-m", "optimizer=adamw,muon", "seed=1,2"]
    assert check(*arguments) == arguments
    assert check("--help", "nonsense") == ["--help", "nonsense"]


@pytest.mark.parametrize("interval", ["interval(1e-4,1e-2)", "tag(log,interval(1e-4,1e-2))"])
def test_an_interval_reaches_the_sweeper_that_draws_from_it(interval: str) -> None:
    arguments = ["-m", f"training.transformer.lr={interval}", f"optimizer.weight_decay={interval}"]
    assert check(*arguments) == [*arguments[:2], f"++{arguments[2]}"]


def test_a_config_can_be_printed_before_it_is_complete() -> None:
    assert check("--cfg", "job", "data=jsonl") == ["--cfg", "job", "data=jsonl"]


def test_prerequisites_have_their_own_settings() -> None:
    cfg = composed("prereq.expert.trainer.max_steps=5")
    assert cfg.prereq.expert.trainer.max_steps == 5


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("prereq.experts.trainer.max_steps=3", "did you mean 'expert'?"),
        ("prereq.expert=3", "prereq.<name>.<setting>"),
        ("prereq.expert.trainer.max_step=3", "did you mean 'trainer.max_steps'?"),
    ],
)
def test_a_prerequisite_setting_that_would_be_ignored_is_refused(override, said):
    with pytest.raises(UserError) as caught:
        checked_overrides(["phase=mla", override], ROOT)
    assert said in str(caught.value)
    handed_on = checked_overrides(["phase=mla", "prereq.expert.optimizer=muon"], ROOT)
    assert "++prereq.expert.optimizer=muon" in handed_on
