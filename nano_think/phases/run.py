"""A run: one composed configuration, its folder, and the artefacts it makes or reuses.

An artefact is described by a `Maker` before it exists: kind, plain spec, needs and a build function. Its hash
follows from these, so whether it is already there is known without building anything, and two runs that would
make the same thing share it.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from nano_think.artifacts import provenance
from nano_think.artifacts.recipe import COMPLETE_MARK, Recipe
from nano_think.config import group_of, override_name, validate
from nano_think.errors import UserError
from nano_think.files import (
    atomic_dir,
    atomic_write,
    hash_json,
    locked,
    remove_abandoned,
    remove_dir,
    sole_owner,
    write_json,
)
from nano_think.phases.disk import disk_trouble
from nano_think.phases.machine import versions
from nano_think.phases.overrides import last_of_each, leaves_of, literal, of_other_expert
from nano_think.phases.ranks import PLAN, SWEEPING, Ranks, number_of_processes, run_in
from nano_think.phases.resume import what_stays

# What only the phase named on the command line receives; everything else reaches prerequisites too.
OWN_KEYS = {"phase", "stage", "optimizer", "schedule", "trainer", "callbacks", "logger", "ckpt", "run"}
OWN_KEYS |= {"prompt", "prompt_file", "generate", "eval", "memory", "quantize", "study", "hydra"}
# Bytes of a file that is compared with its hash whenever it may be read, not when it is.
LARGE = 1 << 20
# Phases whose configuration has the numbers of the fused model.
WITH_MLA = {"mla", "finetune", "eval", "audit", "generate", "pipeline", "study"}
# Where a run computes, which a prerequisite does too.
HANDED_ON = {"trainer.devices", "trainer.num_nodes", "trainer.accelerator"}


class Followed(Exception):
    """The part of a build in which a rank other than 0 takes part is over."""


@dataclass(frozen=True)
class Maker:
    """How one artefact is made.

    build: fills the folder it is given and returns results (plain values) for the provenance file.
    trains: whether building it is a fit, in which all ranks take part.
    """

    kind: str
    spec: dict[str, Any]
    build: Callable[[Path], dict[str, Any]]
    needs: dict[str, Maker] = field(default_factory=dict)
    command: str = ""
    trains: bool = False

    @cached_property
    def recipe(self) -> Recipe:
        needs = {name: maker.recipe for name, maker in self.needs.items()}
        return Recipe(self.kind, self.spec, needs, self.command)


class Run:
    """One phase with its configuration.

    cfg: the composed configuration. overrides: the command line it came from. dir: the run folder.
    ranks: the place of this process among those of the run. Only rank 0 writes and speaks.
    """

    def __init__(
        self,
        cfg: DictConfig,
        overrides: list[str],
        directory: Path,
        console: Console,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        self.cfg, self.overrides, self.dir, self.console = cfg, overrides, directory, console
        self.root = Path(cfg.run.root)
        self.artifacts = self.root / "artifacts"
        self.used: dict[str, str] = {}
        self.sweeping = False
        self.manifest: dict[str, Any] = {}

    def say(self, message: str) -> None:
        """One line on the terminal."""
        self.console.print(message, highlight=False, soft_wrap=True)

    def guard(self, name: str, found: str, certain: bool = True) -> None:
        """What `guards.<name>` wants done about a run that cannot end well: refuse, warn, or nothing.

        Raises UserError where it is certain and `refuse` is set.
        """
        choice = self.cfg.guards[name]
        if choice == "refuse" and certain:
            raise UserError(f"{found}; guards.{name}=warn tries it all the same")
        if choice != "off":
            self.say(f"[yellow]warning: {found}[/yellow]")

    def record(self, **values: Any) -> None:
        """Put values into the manifest of the run and write it: what is known survives whatever happens next."""
        self.manifest |= values
        if not self.ranks.follows:
            write_json(self.dir / "manifest.json", self.manifest)

    def record_fit(self, label: str, **values: Any) -> None:
        """The same for one of its fits: what was chosen for it and what it took."""
        fits = self.manifest.get("fits", {})
        self.record(fits={**fits, label: {**fits.get(label, {}), **values}})

    def plain(self, node: Any) -> Any:
        """A config node as plain, resolved values."""
        return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node

    def sub(self, phase: str, expert: str | None = None) -> Run:
        """The run of a prerequisite phase: same data, sizes and seeds, its own optimizer and trainer."""
        more = []
        prereq = self.plain(self.cfg.prereq)
        for name in (phase, expert):
            for key, value in leaves_of(prereq.get(name)):
                more.append(f"{'++' * ('.' in key)}{key}={literal(value)}")
        if self.cfg.expert_seed is not None and phase == "expert":
            more.append(f"seed={self.cfg.expert_seed}")
        return self.composed(phase, more, expert)

    def composed(self, phase: str, more: Iterable[str], expert: str | None = None) -> Run:
        """A run of another phase with this one's settings and `more`; expert: the only one it is about."""
        kept = last_of_each([*self._handed_on(phase), f"phase={phase}", *more])
        cfg = copy.deepcopy(_composed(tuple(kept)))
        if expert is not None:
            # composed with the expert= of the whole run, so that overrides of any expert stay valid
            OmegaConf.set_struct(cfg, False)
            cfg.expert.name, cfg.expert.names = expert, [expert]
        cfg.run.root = str(self.root)
        run = Run(cfg, kept, self.dir, self.console, self.ranks)
        run.manifest = self.manifest
        return run

    def command(self, **choices: Any) -> str:
        """The command line that makes, for a phase, exactly what this run would make or need."""
        named = [f"{key}={value}" for key, value in choices.items() if value is not None]
        phase, expert = choices["phase"], choices.get("expert")
        kept = self._handed_on(phase)
        if phase == self.cfg.phase.name:
            own = [o for o in self.overrides if group_of(o) in OWN_KEYS - {"run", "hydra"}]
            kept = [o for o in own if o not in kept] + kept
        kept = [o for o in kept if override_name(o) not in {*choices, "phase", "expert", "prerequisites"}]
        kept = [o for o in kept if not of_other_expert(o, expert)]
        if str(self.root) != "outputs":
            kept.append(f"run.root={literal(str(self.root))}")
        return shlex.join(["python", "train.py", *named, *kept])

    def _handed_on(self, phase: str) -> list[str]:
        """The overrides that reach a run of `phase`, whatever else it is told."""
        return [
            o
            for o in self.overrides
            if (group_of(o) not in OWN_KEYS or override_name(o) in HANDED_ON)
            and (phase in WITH_MLA or not override_name(o).startswith("training.mla."))
        ]

    def obtain(self, maker: Maker, named: bool = False) -> Path:
        """The folder of an artefact, reused or built together with its needs.

        named: the artefact is what this phase is about; with prerequisites=require all others must exist.
        Raises UserError naming the command where a required one is missing.
        """
        recipe = maker.recipe
        path = recipe.path(self.artifacts)
        if self.ranks.follows:
            return self._follow(maker, path)
        if recipe.exists(self.artifacts):
            self.ranks.tell(f"start {recipe.hash}", "reuse")
            if recipe.hash not in self.used:
                self._check_unchanged(maker)
                self.say(f"[dim]reused {maker.kind} {recipe.hash}[/dim]")
            self.used[recipe.hash] = maker.kind
            self._forget_work(maker)
            return path
        if self.cfg.prerequisites == "require" and not named:
            raise UserError(f"{maker.kind} {recipe.hash} is missing: make it with `{maker.command}`")
        self.ranks.tell(f"start {recipe.hash}", "build")
        for need in maker.needs.values():
            self.obtain(need)
        with self._alone_with(maker):
            missing = not recipe.exists(self.artifacts)
            self.ranks.tell(f"alone {recipe.hash}", missing)
            if not missing:
                return self.obtain(maker)
            self._build(maker, path)
        self.used[recipe.hash] = maker.kind
        self.ranks.tell(f"done {recipe.hash}")
        return path

    def _alone_with(self, maker: Maker) -> AbstractContextManager[None]:
        """Held while an artefact is built: two jobs of a sweep that need the same one must not both make it.

        The processes of one fit build together; for them its first one holds the lock.
        """
        if any(int(os.environ.get(name) or 0) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID")):
            return nullcontext()
        name = f"{maker.kind} {maker.recipe.hash}"
        lock = self.artifacts / f".{name.replace(' ', '-')}.lock"
        return locked(lock, lambda: self.say(f"waiting for another process that builds {name}"))

    def _build(self, maker: Maker, path: Path) -> None:
        """Let an artefact appear at `path`, with its provenance."""
        recipe = maker.recipe
        self.say(f"[bold]building {maker.kind} {recipe.hash}[/bold]")
        started = time.perf_counter()
        with atomic_dir(path) as temporary:
            result = maker.build(temporary)
            seconds = round(time.perf_counter() - started, 1)
            made = {
                **recipe.lineage(self.artifacts),
                "made_by": versions(),
                "seconds": seconds,
                "result": result,
            }
            files = provenance.fingerprints(temporary)
            write_json(temporary / COMPLETE_MARK, {**made, "content": hash_json(files), "files": files})
        self._forget_work(maker)
        self.say(f"built {maker.kind} {recipe.hash} in {seconds} s")

    def _follow(self, maker: Maker, path: Path) -> Path:
        """`obtain` of a rank other than 0: wait for what rank 0 builds, and take part where that is a fit."""
        key, about = maker.recipe.hash, f"make {maker.kind} {maker.recipe.hash}"
        if key not in self.used and self.ranks.ask(f"start {key}", about) == "build":
            for need in maker.needs.values():
                self.obtain(need)
            if self.ranks.ask(f"alone {key}", about):
                if maker.trains:
                    with contextlib.suppress(Followed):
                        maker.build(path)
                self.ranks.ask(f"done {key}", about)
        self.used[key] = maker.kind
        return path

    def _check_unchanged(self, maker: Maker) -> None:
        """Raise UserError where an artefact, or what it was made from, is not what it was when it was made.

        Large files are compared by whoever reads them.
        """
        path = maker.recipe.path(self.artifacts)
        made = provenance.read(path)
        if made.get("hash", maker.recipe.hash) != maker.recipe.hash:
            raise UserError(
                f"{path} holds {made['kind']} {made['hash']}, which belongs elsewhere: delete the folder, and "
                f"`{maker.command}` makes the right one"
            )
        provenance.verify(path, made, largest=LARGE)
        provenance.verify_needs(self.artifacts, made)

    def work_dir(self, maker: Maker) -> Path:
        """Where a build keeps what a restart continues from; gone once the artefact is complete."""
        return self.artifacts / ".work" / f"{maker.kind}-{maker.recipe.hash}"

    def _forget_work(self, maker: Maker) -> None:
        with contextlib.suppress(OSError):  # it costs space, no more
            remove_dir(self.work_dir(maker))

    @staticmethod
    def provenance_of(artifact: Path) -> dict[str, Any]:
        """What an artefact was made from and by, how long that took, and its result."""
        return provenance.read(artifact)

    @classmethod
    def result_of(cls, artifact: Path) -> dict[str, Any]:
        """What the build of an artefact recorded about itself."""
        return cls.provenance_of(artifact)["result"]

    def publish(self, source: Path, name: str) -> Path:
        """Copy an artefact to `checkpoints/<name>`, the place that users and scripts name; returns that place.

        The jobs of a sweep keep their artefacts where they are: one name cannot hold them all.
        """
        if self.sweeping:
            return source
        target = self.root / "checkpoints" / name
        if self.ranks.follows:
            return target
        with atomic_dir(target, replace=True) as temporary:
            shutil.copytree(source, temporary, dirs_exist_ok=True)
        return target


def run_phase(cfg: DictConfig) -> float | None:
    """Run the phase of a Hydra job and leave its folder complete: config, manifest, result.

    Returns the phase's `objective` (for sweepers), if it has one.
    """
    job = HydraConfig.get()
    validate(cfg, {group_of(override) for override in job.overrides.task})
    if cfg.phase.name == "expert" and cfg.expert_seed is not None:
        cfg.seed = cfg.expert_seed
    overrides, directory = list(job.overrides.task), Path(job.runtime.output_dir)
    sweeping = job.mode == RunMode.MULTIRUN
    world = number_of_processes(cfg)
    if world > 1 and "RANK" not in os.environ:
        return run_in(world, overrides, directory, sweeping)
    ranks = Ranks.here() if world > 1 else Ranks()
    run = Run(cfg, overrides, _shared(ranks, directory), console(quiet=ranks.follows), ranks)
    run.sweeping = sweeping or bool(os.environ.get(SWEEPING))
    try:
        run.dir.mkdir(parents=True, exist_ok=True)
        with nullcontext(True) if ranks.follows else sole_owner(run.dir) as alone:
            if not alone:
                raise UserError(
                    f"another process is at work in {run.dir}: wait for it or name another run.dir="
                )
            return _run(run)
    except Exception as error:
        trouble = disk_trouble(error, run.root)
        if trouble is None:
            raise
        raise trouble from error


def _run(run: Run) -> float | None:
    if not run.ranks.follows:
        for folder in (run.artifacts, run.root / "checkpoints", run.root / "sessions", run.dir):
            remove_abandoned(folder)
        run.manifest = what_stays(run.dir)
        atomic_write(run.dir / "config.yaml", OmegaConf.to_yaml(run.cfg, resolve=True))
    run.record(command=["train.py", *run.overrides], seed=run.cfg.seed, **versions(), status="running")
    module, _, name = run.cfg.phase.run.rpartition(".")
    try:
        if run.cfg.strategy._target_ == PLAN:
            result = instantiate(run.cfg.strategy)(run)
        else:
            result = getattr(import_module(module), name)(run)
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        with contextlib.suppress(OSError):  # a disk that is full takes no record of it either
            run.record(status=status, error=str(error), artifacts=run.used)
        raise
    run.record(status="done", artifacts=run.used, result=result)
    run.say(f"[dim]run folder: {run.dir}[/dim]")
    return result.get("objective")


def _shared(ranks: Ranks, directory: Path) -> Path:
    """The run folder of rank 0, which is that of all."""
    if ranks.follows:
        return Path(ranks.ask("run folder", "make a run folder"))
    ranks.tell("run folder", str(directory.absolute()))
    return directory


@lru_cache(maxsize=256)
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    """A composition takes a third of a second, and who describes a pipeline asks for the same ones many times."""
    return compose("config", list(overrides))


def console(quiet: bool = False) -> Console:
    """The terminal, or 110 columns where the output goes into a file: tables stay readable."""
    return Console(quiet=quiet) if sys.stdout.isatty() else Console(width=110, quiet=quiet)
