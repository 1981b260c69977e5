"""What the contract tests share: configurations as a run would see them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from nano_think.config import checked_overrides, register_schema

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def composed() -> Callable[..., DictConfig]:
    """`composed("phase=mla", "size=tiny")`: the unresolved configuration of a command line."""

    @lru_cache(maxsize=64)
    def made(*overrides: str) -> DictConfig:
        checked = checked_overrides(["--cfg", "job", *overrides], ROOT)[2:]
        register_schema()
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return compose("config", [*checked, f"hydra.searchpath=[file://{ROOT}]"])

    return made
