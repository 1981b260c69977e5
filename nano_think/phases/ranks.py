"""More than one process: who starts them, who writes, what they tell each other.

All processes of a run call the same phase function with the same configuration. Rank 0 decides, builds and
writes; the others wait at each artefact for what it decided, and take part only in fits. Outside of a fit they
share nothing but a store of keys and values: no library takes the process that evaluates for one of many.

The environment is that of `torchrun`, which may start the processes instead: on several machines it has to.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from nano_think.errors import UserError
from nano_think.files import write_json
from nano_think.phases.resume import read_manifest

T = TypeVar("T")

ENTRY = Path(__file__).resolve().parents[2] / "train.py"
LAUNCHER, SWEEPING = "NANO_THINK_LAUNCHER", "NANO_THINK_SWEEPING"
# Phases that train in this process or in several; the others evaluate and write, or start processes themselves.
TRAINING = ("expert", "mla", "finetune", "pipeline")
# The strategy that prints what a fit would take instead of training.
PLAN = "nano_think.phases.plan.Plan"
# How long a rank waits for what rank 0 builds, and for the others in a step of a fit.
BUILDING, STEPPING = timedelta(hours=24), timedelta(minutes=30)
# Seconds that ranks have to end by themselves once rank 0 has ended, or another one has failed.
GRACE, GRACE_WITHOUT_FIRST = 15.0, 3.0
SHOWN_LINES = 20


class Ranks:
    """This process among those of a run, the only one by default.

    store: where rank 0 tells the others what it decided, torch's `Store`. patience: how long these wait for it.
    """

    def __init__(
        self, rank: int = 0, world: int = 1, store: Any = None, patience: timedelta = BUILDING
    ) -> None:
        self.rank, self.world, self.store, self.patience = rank, world, store, patience

    @classmethod
    def here(cls) -> Ranks:
        """The place that the environment gives this process."""
        if "RANK" not in os.environ:
            return cls()
        # slow to import, and needed by several processes alone
        from torch.distributed.rendezvous import rendezvous

        store, rank, world = next(rendezvous("env://", timeout=STEPPING))
        if launcher := os.environ.get(LAUNCHER):
            threading.Thread(target=_end_with, args=(int(launcher),), daemon=True).start()
        return cls(rank, world, store)

    @property
    def follows(self) -> bool:
        """Whether another process decides and writes."""
        return self.rank > 0

    def tell(self, name: str, value: Any = None) -> None:
        """Let the others know a plain value by name; said once, it stands."""
        if self.world > 1:
            self.store.set(name, json.dumps(value))

    def ask(self, name: str, about: str) -> Any:
        """What rank 0 told of `name`, once it has; UserError where the patience ends. about: what rank 0 does."""
        until, pause = time.monotonic() + self.patience.total_seconds(), 0.02
        while not self.store.check([name]):
            if time.monotonic() > until:
                raise UserError(
                    f"rank {self.rank} has waited {self.patience} for rank 0 to {about}: look at what rank 0 last "
                    "said, and start again"
                )
            time.sleep(pause)
            pause = min(1.0, 1.5 * pause)
        return json.loads(self.store.get(name))

    def after_first(self, name: str, action: Callable[[], T]) -> T:
        """Let rank 0 act first, and the others when it is done: they find what it left on disk."""
        if self.follows:
            self.ask(name, name)
            return action()
        made = action()
        self.tell(name)
        return made

    @contextmanager
    def group(self, name: str, device: str) -> Iterator[None]:
        """A process group for a fit on `device` (cpu or cuda), gone when that ends. name: a fit's own."""
        if self.world == 1:
            yield
            return
        import torch.distributed as dist

        store = dist.PrefixStore(name, self.store)
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world, timeout=STEPPING)
        try:
            yield
        finally:
            dist.destroy_process_group()


def number_of_processes(cfg: DictConfig) -> int:
    """How many processes the fits of a run take; UserError for settings that contradict each other."""
    if cfg.strategy._target_ == PLAN:
        if cfg.phase.name not in TRAINING:
            raise UserError(
                f"phase={cfg.phase.name} trains nothing that could be planned: leave out strategy=plan"
            )
        return 1
    devices = cfg.trainer.devices
    per_machine = devices if isinstance(devices, int) and not isinstance(devices, bool) else 0
    if OmegaConf.is_list(devices):
        per_machine = len(devices)
    if per_machine < 1:
        raise UserError(f"trainer.devices={devices} is no number of processes: give 1 or more")
    world = per_machine * (cfg.trainer.get("num_nodes") or 1)
    if world > 1 and cfg.phase.name not in TRAINING:
        raise UserError(
            f"phase={cfg.phase.name} is the work of one process: leave out trainer.devices and strategy"
        )
    if world > 1 and cfg.strategy._target_.endswith(".single"):
        raise UserError(
            f"trainer.devices={devices} are {world} processes: add strategy=ddp or strategy=fsdp2"
        )
    if world > per_machine and "RANK" not in os.environ:
        raise UserError("trainer.num_nodes needs a process on every machine: start train.py with torchrun")
    started = int(os.environ.get("WORLD_SIZE", world)) if "RANK" in os.environ else world
    if started != world:
        raise UserError(
            f"{started} processes were started and trainer.devices asks for {world}: let both agree"
        )
    return world


def run_in(world: int, overrides: list[str], directory: Path, sweeping: bool) -> float | None:
    """The objective of a run in `world` processes of this machine; its manifest says how it ended.

    Raises SystemExit where rank 0 has failed and said why. In a sweep that goes on: UserError with the reason, or
    KeyboardInterrupt.
    """
    directory.mkdir(parents=True, exist_ok=True)
    manifest = directory / "manifest.json"
    try:
        launch(overrides, directory, world, sweeping, threads=max(1, (os.cpu_count() or 1) // world))
    except BaseException as error:
        known = read_manifest(manifest)
        if known.get("status", "running") == "running":
            known |= {"status": "failed", "error": f"ended with status {error}"}
            write_json(manifest, known)
        if sweeping and isinstance(error, SystemExit):
            if known["status"] == "interrupted":
                raise KeyboardInterrupt from error
            raise UserError(known.get("error") or f"rank 0 ended with status {error}") from error
        raise
    return read_manifest(manifest)["result"].get("objective")


def launch(overrides: list[str], directory: Path, world: int, sweeping: bool, threads: int) -> None:
    """Run `train.py` with these overrides in `world` processes of this machine and wait for them.

    Rank 0 has the terminal; of another one only the end of what it said is shown, and only if it was the first to
    fail. Ctrl+C reaches each process once, from here. A process that fails ends all.
    Raises SystemExit with the status of rank 0 if that failed, and UserError if another one did.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GROUP_RANK": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        LAUNCHER: str(os.getpid()),
        SWEEPING: "1" if sweeping else "",
    }
    shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    command = [sys.executable, str(ENTRY), *overrides, f"hydra.run.dir={json.dumps(str(directory))}"]
    command.append("hydra.output_subdir=null")
    processes: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(world)]
        stack.callback(_kill, processes)
        for rank in range(world):
            said: Any = {"stdout": logs[rank], "stderr": subprocess.STDOUT} if rank else {}
            env = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=env, start_new_session=True, **said))
        with _forwarded(processes):
            failed = _first_failure(processes)
        said = _end_of(logs[failed or 0])
    if failed == 0:
        raise SystemExit(max(1, processes[0].returncode))
    if failed is not None:
        status = processes[failed].returncode
        raise UserError(
            f"rank {failed} ended with status {status}, which ends all; the last it said:\n{said}"
        )


def _first_failure(processes: list[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all, but not for long after the first failure; the rank that failed first, None where none did."""
    failed, until = None, float("inf")
    while any(process.poll() is None for process in processes) and time.monotonic() < until:
        if failed is None:
            failed = next((r for r, p in enumerate(processes) if p.poll() not in (None, 0)), None)
        if failed is not None or processes[0].poll() is not None:
            until = min(until, time.monotonic() + (GRACE_WITHOUT_FIRST if failed == 0 else GRACE))
        time.sleep(0.05)
    if failed is None:
        failed = next((r for r, p in enumerate(processes) if p.poll() != 0), None)
    return failed


@contextmanager
def _forwarded(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Hand SIGINT and SIGTERM on to all processes as SIGINT; without effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def hand_on(signum: int, frame: Any) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)

    before = {signum: signal.signal(signum, hand_on) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _kill(processes: list[subprocess.Popen[bytes]]) -> None:
    """End processes and their workers, where they still are."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _end_of(log: IO[bytes]) -> str:
    log.seek(0)
    return "\n".join(log.read().decode(errors="replace").splitlines()[-SHOWN_LINES:])


def _end_with(launcher: int) -> None:
    """End this process when the one that started it is gone, however that ended."""
    while os.getppid() == launcher:
        time.sleep(0.5)
    os._exit(1)
