"""A project of its own in a temporary folder: a hand-made corpus, composed runs, phases run in this process."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from nano_think.config import register_schema
from nano_think.phases import measured
from nano_think.phases import run as run_module
from nano_think.phases.run import Run, run_phase
from tests.texts import write_texts

ROOT = Path(__file__).resolve().parents[2]
TINY = ("size=tiny", "size.vocab_size=300", "data=jsonl", "data.val_rows=4", "model.retrieval.chunk=16")
TINY += ("model.store.rows=8", "++training.mla.static_tokens=1024", "callbacks.samples.max_new_tokens=2")
STEPS = ("trainer.max_steps=6", "++prereq.expert.trainer.max_steps=6", "++prereq.mla.trainer.max_steps=6")


@pytest.fixture(scope="session")
def texts_folder(tmp_path_factory) -> Path:
    """The small corpus of two domains."""
    return write_texts(tmp_path_factory.mktemp("texts"))


class Project:
    """Runs below one folder. `texts` is the corpus that every run reads unless it names another."""

    def __init__(self, root: Path, texts: Path) -> None:
        self.root, self.texts, self.runs = root, texts, 0

    def overrides(self, *more: str) -> list[str]:
        """The overrides of a tiny run below this folder."""
        return [*TINY, f"data.root={self.texts}", f"run.root={self.root}", *more]

    def new(self, *more: str) -> Run:
        """A run, composed as `train.py` would."""
        overrides = self.overrides(*more)
        self.runs += 1
        directory = self.root / "runs" / str(self.runs)
        directory.mkdir(parents=True)
        return Run(
            run_module.compose("config", overrides),
            overrides,
            directory,
            Console(file=io.StringIO(), width=200),
        )

    def go(self, *more: str) -> tuple[dict[str, Any], Run]:
        """Run a phase; its result and the run."""
        run = self.new(*more)
        module, _, name = run.cfg.phase.run.rpartition(".")
        return getattr(import_module(module), name)(run), run

    def phase(self, *more: str) -> Path:
        """`run_phase` as Hydra would call it; the run folder."""
        self.runs += 1
        directory = self.root / "runs" / str(self.runs)
        cfg = compose("config", self.overrides(*more), return_hydra_config=True)
        OmegaConf.set_readonly(cfg.hydra, False)
        cfg.hydra.runtime.output_dir = str(directory)
        HydraConfig.instance().set_config(cfg)
        OmegaConf.set_struct(cfg, False)
        del cfg["hydra"]
        run_phase(_resolved_dir(cfg, directory))
        return directory


def _resolved_dir(cfg: DictConfig, directory: Path) -> DictConfig:
    cfg.run.dir = str(directory)
    return cfg


def output(run: Run) -> str:
    """What the run has printed."""
    return run.console.file.getvalue()


@pytest.fixture
def printed() -> Callable[[Run], str]:
    return output


@pytest.fixture(scope="session", autouse=True)
def _measured_once(tmp_path_factory) -> Iterator[None]:
    """What the machine measures of a fit is remembered for these tests alone, and the same in all of them."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured, "cache_folder", lambda: folder)
        yield


@pytest.fixture(autouse=True)
def _hydra() -> Iterator[None]:
    register_schema()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


@pytest.fixture(scope="session")
def shared_project(texts_folder) -> Callable[[Path], AbstractContextManager[Project]]:
    """Projects for fixtures that several tests share: a context in which their runs can be composed."""

    @contextmanager
    def below(folder: Path) -> Iterator[Project]:
        register_schema()
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            yield Project(folder / "outputs", texts_folder)

    return below


@pytest.fixture
def project(tmp_path, texts_folder) -> Project:
    """A project with nothing built."""
    return Project(tmp_path / "outputs", texts_folder)


@pytest.fixture(scope="session")
def built(tmp_path_factory, texts_folder) -> Project:
    """A project in which `phase=mla expert=all` has run with six steps a fit. Do not change what is there."""
    register_schema()
    project = Project(tmp_path_factory.mktemp("built") / "outputs", texts_folder)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        project.result, project.first = project.go("phase=mla", "expert=all", *STEPS)
    return project
