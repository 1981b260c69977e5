"""The Makefile: a list of what there is, commands that say what they do, nothing outside its place removed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETUP = ["setup", "test", "test-slow", "test-gpu", "lint", "check", "clean"]
CALLS = {
    "data": "train.py phase=data",
    "tokenizer": "train.py phase=tokenizer",
    "expert-transformer": "train.py phase=expert expert=transformer",
    "expert-diffuser": "train.py phase=expert expert=diffuser",
    "expert-state-space": "train.py phase=expert expert=state_space",
    "mla": "train.py phase=mla expert=all",
    "eval": "train.py phase=eval",
    "audit": "train.py phase=audit",
    "generate": "train.py phase=generate",
    "demo": "train.py phase=pipeline experiments=demo",
    "study": "train.py phase=study study.redraw=true study.out=experiments/results/study",
    "sweep": "train.py -m phase=mla expert=all optimizer=adamw,muon seed=1,2",
    "tensorboard": "tensorboard.main --logdir outputs",
    "kills": "-m tests.reliability.kills --out outputs/kills",
    "bench": "-m benchmarks all",
}
PHASES = [f"phase{i}" for i in range(10)]
TARGETS = [*SETUP, *CALLS]
SAME = {"phase0": "setup", "phase1": "data", "phase7": "mla", "phase9": "bench"}


def make(*arguments: str, cwd: Path = ROOT) -> str:
    # a make of its own: flags of one that runs the tests must not reach it
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    result = subprocess.run(
        ["make", *arguments], cwd=cwd, capture_output=True, text=True, check=True, env=environment
    )
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """`VENV=...` of an environment that counts as installed."""
    venv = tmp_path_factory.mktemp("venv")
    (venv / ".installed").touch()
    return f"VENV={venv}"


def test_make_alone_lists_every_target_with_what_it_does() -> None:
    described = dict(re.findall(r"^  ([a-z0-9-]+) +(\S.*)$", make(), flags=re.M))
    assert set(described) == {"help", *TARGETS, *PHASES}


@pytest.mark.parametrize("target", [*TARGETS, *PHASES])
def test_every_target_says_what_it_would_do(installed: str, target: str) -> None:
    commands = make("-n", target, installed)
    assert commands.strip()
    if target in CALLS:
        assert CALLS[target] in commands
    if target in SAME:
        assert commands == make("-n", SAME[target], installed)


def test_a_study_of_a_corpus_is_trained_and_one_without_is_drawn_again(installed: str) -> None:
    (line,) = make("-n", "study", installed, "DATA=texts", "ARGS=study.seeds=[1]").splitlines()
    assert "redraw" not in line
    for part in (
        "experiments=study ",
        "data=jsonl data.root=texts ",
        "study.out=outputs/study ",
        "study.seeds=[1]",
    ):
        assert part in line


def test_phases_six_and_eight_are_several_commands(installed: str) -> None:
    six, eight = make("-n", "phase6", installed), make("-n", "phase8", installed)
    assert re.findall(r"expert=(\w+)", six) == ["transformer", "diffuser", "state_space"]
    assert [line.split("phase=")[1].strip() for line in eight.splitlines()] == ["eval", "generate"]


@pytest.mark.parametrize("target", ["demo", "test", "check", "mla", "phase3", "tensorboard"])
def test_a_fresh_clone_installs_first(tmp_path: Path, target: str) -> None:
    lines = make("-n", target, f"VENV={tmp_path / 'none'}").splitlines()
    torch = next(i for i, line in enumerate(lines) if "install" in line and line.endswith("torch"))
    rest = next(i for i, line in enumerate(lines) if "install" in line and "[dev,sweep]" in line)
    assert "-m venv" in lines[torch - 1]
    assert torch < rest < len(lines) - 1
    assert all("-c constraints.txt" in lines[i] for i in (torch, rest))


@pytest.mark.parametrize("target", ["data", "mla", "demo", "sweep", "test", "generate", "phase4"])
def test_arguments_are_handed_through(installed: str, target: str) -> None:
    assert 'size=tiny prompt="a b"' in make("-n", target, installed, 'ARGS=size=tiny prompt="a b"')


def test_tests_use_both_cores_with_one_thread_each(installed: str) -> None:
    (line,) = make("-n", "test", installed).splitlines()
    assert line.startswith("OMP_NUM_THREADS=1 ")
    assert '-n 2 -m "not slow"' in line


@pytest.mark.parametrize("phase", ["phase2", "phase3", "phase4", "phase5"])
def test_the_building_phases_run_tests_that_exist(installed: str, phase: str) -> None:
    paths = re.findall(r"tests/\S+", make("-n", phase, installed))
    assert paths
    assert all((ROOT / path).exists() for path in paths)


def test_clean_empties_outputs_and_touches_nothing_else(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in (
        "outputs/.gitkeep",
        "outputs/runs/1/report.md",
        "outputs/.hidden/x",
        "nano_think/outputs/keep",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    make("clean", cwd=tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["Makefile", "nano_think/outputs/keep", "outputs/.gitkeep"]


def test_continuous_integration_runs_what_a_developer_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert re.findall(r'^make VENV="\$venv" (\w+)', text, flags=re.M) == ["setup", "check", "test"]


@pytest.mark.parametrize("broken", ["setup", "check", "test", None])
def test_continuous_integration_fails_where_a_step_fails(tmp_path: Path, broken: str | None) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    steps = [
        f"{step}:\n\t@echo ran {step}; {'false' if step == broken else 'true'}\n"
        for step in ("setup", "check", "test")
    ]
    (tmp_path / "Makefile").write_text("\n".join(steps))
    result = subprocess.run([tmp_path / ".ci" / "run"], capture_output=True, text=True, check=False)
    assert (result.returncode == 0) == (broken is None)
    assert ("ran test" in result.stdout) == (broken != "setup")
    assert ("ci: passed" in result.stdout) == (broken is None)


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SEED_PACKAGES = ["torch", "lightning", "hydra-core", "omegaconf", "torchmetrics", "tiktoken", "tensorboard"]


def requirement_name(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9_.-]+", requirement)[0].lower().replace("_", "-")


def test_pins_cover_every_direct_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {requirement_name(line): line for line in lines if not line.startswith("#")}
    needed = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    assert {requirement_name(requirement) for requirement in needed} <= set(pinned)
    assert pinned["torch"] == "torch==2.13.0"
    assert "torchvision" not in pinned


def test_the_core_is_declared_and_bounded_and_leaves_the_rest_to_extras() -> None:
    core = {requirement_name(requirement): requirement for requirement in PROJECT["dependencies"]}
    assert {*SEED_PACKAGES, "faiss-cpu"} <= set(core)
    assert not {"transformers", "einops", "wandb", "datasets", "pytest"} & set(core)
    for requirement in core.values():
        assert ">=" in requirement
        assert "<" in requirement
    # releases that were withdrawn
    assert {"!=2.6.2", "!=2.6.3"} <= set(core["lightning"].removeprefix("lightning").split(","))
    extras = PROJECT["optional-dependencies"]
    assert any(requirement.startswith("faiss-gpu") for requirement in extras["gpu"])
    assert "pytest" in {requirement_name(requirement) for requirement in extras["dev"]}
