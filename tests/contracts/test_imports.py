"""Imports run one way, and light things stay light."""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "nano_think"
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)
# modules that are nothing without a package which is not for everyone, loaded where it is there
NEEDS = dict.fromkeys(("nano_think.ops.elementwise_triton", "nano_think.ops.scan_triton"), "triton")
OTHERS = ["data", "vector_store", "mla", "model"]
OPTIONAL = ("datasets", "einops", "scipy", "transformers", "wandb", "zstandard")


def contracts() -> list[dict]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]


def lint(directory: Path) -> subprocess.CompletedProcess[str]:
    code = "from importlinter.cli import lint_imports; import sys; sys.exit(lint_imports(no_cache=True))"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=directory, capture_output=True, text=True, check=False
    )


def loaded_by(statement: str) -> set[str]:
    """Names in sys.modules of a fresh interpreter after `statement`."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_the_contracts_of_import_linter_hold() -> None:
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout
    assert "0 broken" in result.stdout


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("ops/rope.py", "import nano_think.nn.norm"),
        ("experts/transformer.py", "import nano_think.mla"),
        ("engine/sampling.py", "import omegaconf"),
        ("data/packing.py", "import lightning"),
        ("evals/losses.py", "import nano_think.data.module"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, file: str, line: str) -> None:
    shutil.copytree(PACKAGE, tmp_path / "nano_think", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "nano_think" / file).open("a") as source:
        source.write(f"\n{line}\n")
    result = lint(tmp_path)
    assert result.returncode == 1, result.stdout
    assert "1 broken" in result.stdout


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("Hydra and OmegaConf only in phases and config", {"config", "phases"}),
        ("Lightning only in tasks, callbacks, phases and the data module", {"tasks", "callbacks", "phases"}),
    ],
)
def test_a_new_part_of_the_package_cannot_escape_a_contract(name: str, allowed: set[str]) -> None:
    (contract,) = (c for c in contracts() if c["name"] == name)
    parts = {module.split(".")[1] for module in MODULES if "." in module}
    assert {module.split(".")[1] for module in contract["source_modules"]} == parts - allowed


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=lambda path: path.parent.name)
def test_package_files_import_nothing(path: Path) -> None:
    docstring, *rest = ast.parse(path.read_text()).body
    assert isinstance(docstring, ast.Expr)
    if path.parent != PACKAGE:
        assert rest == []
    assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in rest)


def test_every_module_imports() -> None:
    modules = [m for m in MODULES if m not in NEEDS or importlib.util.find_spec(NEEDS[m])]
    loaded = loaded_by(f"import importlib\nfor m in {modules!r}: importlib.import_module(m)")
    assert set(modules) <= loaded
    assert "torchvision" not in loaded


def test_optional_packages_are_imported_where_they_are_used() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {name.split(".")[0] for name in names} & set(OPTIONAL), path


def test_model_and_engine_start_without_what_training_needs() -> None:
    loaded = loaded_by("import nano_think.engine.session, nano_think.model, nano_think.vector_store")
    assert not loaded & {"lightning", "pytorch_lightning", "hydra", "omegaconf", "matplotlib", "tensorboard"}
    assert not any(name.startswith("nano_think.data") for name in loaded)


def test_what_a_configuration_means_is_known_without_lightning() -> None:
    loaded = loaded_by("import nano_think.phases.expert, nano_think.phases.mla, nano_think.phases.generate")
    assert not loaded & {"lightning", "torchmetrics", "tensorboard"}


@pytest.mark.parametrize(
    ("module", "foreign"),
    [
        (
            "experts.transformer",
            ["data", "vector_store", "mla", "model", "experts.state_space", "experts.diffuser"],
        ),
        (
            "experts.state_space",
            ["data", "vector_store", "mla", "model", "experts.transformer", "experts.diffuser"],
        ),
        ("experts.diffuser", ["data", "vector_store", "mla", "model", "experts.state_space"]),
        ("vector_store", ["data", "mla", "model", "experts", "nn"]),
        ("mla", ["data", "vector_store", "model", "experts"]),
    ],
)
def test_the_parts_can_be_built_in_parallel(module: str, foreign: list[str]) -> None:
    loaded = loaded_by(f"import nano_think.{module}")
    for name in foreign:
        wanted = f"nano_think.{name}"
        assert not any(f"{found}.".startswith(f"{wanted}.") for found in loaded), wanted


def test_the_command_line_is_checked_before_anything_heavy_is_imported() -> None:
    loaded = loaded_by("import nano_think.config")
    assert not loaded & {"torch", "lightning", "nano_think.model"}


def test_no_package_that_breaks_lightning_is_installed() -> None:
    """A torchvision built for another torch makes `import lightning` fail."""
    if importlib.util.find_spec("torchvision") is not None:
        importlib.import_module("torchvision")
