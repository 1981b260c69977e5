"""Processes of a run: how they start and end, what they tell each other; stand-ins take the place of fits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from nano_think.errors import UserError
from nano_think.ops import processes
from nano_think.phases import ranks as ranks_module
from nano_think.phases.ranks import Ranks, launch, number_of_processes, run_in
from nano_think.phases.run import Followed, Maker, Run
from nano_think.tasks.base import FitTask

ROOT = Path(ranks_module.__file__).resolve().parents[2]
WAIT = 120.0


def start(monkeypatch, tmp_path: Path, script: str, world: int = 2) -> None:
    """`launch` with a script in the place of train.py; `rank` and `here`, a folder, are known to it."""
    head = "import json, os, sys, time, signal\n"
    (tmp_path / "entry.py").write_text(head + place(tmp_path) + script)
    monkeypatch.setattr(ranks_module, "ENTRY", tmp_path / "entry.py")
    launch(["a=b"], tmp_path / "run", world, sweeping=True, threads=1)


def place(folder: Path) -> str:
    return f"from pathlib import Path\nrank, here = int(os.environ['RANK']), Path({str(folder)!r})\n"


def test_processes_know_their_place_and_command(monkeypatch, tmp_path):
    names = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "MASTER_ADDR",
        "NANO_THINK_SWEEPING",
    )
    script = f"said = [sys.argv[1:], [os.environ[name] for name in {names}]]\n"
    script += "(here / f'{rank}.json').write_text(json.dumps(said))"
    start(monkeypatch, tmp_path, script, world=3)
    for rank in range(3):
        arguments, found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert arguments == ["a=b", f'hydra.run.dir="{tmp_path / "run"}"', "hydra.output_subdir=null"]
        assert found == [str(rank), str(rank), "3", "3", "0", "127.0.0.1", "1"]


def test_one_that_fails_ends_all_and_is_heard(monkeypatch, tmp_path):
    monkeypatch.setattr(ranks_module, "GRACE", 0.5)
    script = "(here / f'pid{rank}').write_text(str(os.getpid()))\n"
    script += "if rank == 1: print('on its way'); sys.exit('the disk is on fire')\ntime.sleep(600)"
    with pytest.raises(UserError, match=r"(?s)rank 1 ended with status 1, .*on its way\nthe disk is on fire"):
        start(monkeypatch, tmp_path, script)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid0").read_text()), 0)


def test_the_status_of_rank_0_is_that_of_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(ranks_module, "GRACE_WITHOUT_FIRST", 0.5)
    with pytest.raises(SystemExit) as end:
        start(monkeypatch, tmp_path, "sys.exit(3) if rank == 0 else time.sleep(600)")
    assert end.value.code == 3


@pytest.mark.parametrize(
    ("status", "raised"),
    [(None, "ended with status 3"), ("failed", "no text"), ("interrupted", None), ("done", None)],
)
def test_a_sweep_learns_how_the_run_of_several_processes_ended(monkeypatch, tmp_path, status, raised):
    said = {"status": status, "error": "no text", "result": {"objective": 1.5}}
    script = (
        f"(here / 'run' / 'manifest.json').write_text({json.dumps(said)!r}) if {status is not None} else 0\n"
    )
    script += f"sys.exit({0 if status == 'done' else 3} if rank == 0 else 0)"
    (tmp_path / "entry.py").write_text(f"import os, sys\n{place(tmp_path)}{script}")
    monkeypatch.setattr(ranks_module, "ENTRY", tmp_path / "entry.py")
    monkeypatch.setattr(ranks_module, "GRACE_WITHOUT_FIRST", 0.5)

    def run() -> float | None:
        return run_in(2, [], tmp_path / "run", sweeping=True)

    if raised is not None:
        with pytest.raises(UserError, match=raised):
            run()
    elif status == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        assert run() == 1.5
    found = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert found["status"] == (status or "failed")


def test_an_interrupt_reaches_each_process_once(monkeypatch, tmp_path):
    script = """
heard = []
signal.signal(signal.SIGINT, lambda *_: heard.append(1))
(here / f'ready{rank}').touch()
if rank == 0:
    while not (here / 'ready1').exists(): time.sleep(0.01)
    os.kill(os.getppid(), signal.SIGTERM)
until = time.monotonic() + 60
while not heard and time.monotonic() < until: time.sleep(0.01)
time.sleep(0.3)
(here / f'heard{rank}').write_text(str(len(heard)))
"""
    start(monkeypatch, tmp_path, script)
    assert [(tmp_path / f"heard{rank}").read_text() for rank in (0, 1)] == ["1", "1"]


def test_processes_end_with_the_one_that_started_them(tmp_path):
    """Also where that is killed and can tell nobody."""
    child = f"""
import os, time
from pathlib import Path
from nano_think.phases.ranks import Ranks
if int(os.environ["RANK"]) < 2:
    Ranks.here()
    (Path({str(tmp_path)!r}) / os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(600)
"""
    (tmp_path / "child.py").write_text(child)
    parent = f"""
from pathlib import Path
from nano_think.phases import ranks
ranks.ENTRY = Path({str(tmp_path / "child.py")!r})
ranks.launch([], Path("nowhere"), 2, False, 1)
"""
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    launcher = subprocess.Popen([sys.executable, "-c", parent], env=here)
    try:
        until = time.monotonic() + WAIT
        while not all((tmp_path / str(rank)).exists() for rank in (0, 1)):
            assert time.monotonic() < until
            time.sleep(0.02)
        pids = [int((tmp_path / str(rank)).read_text()) for rank in (0, 1)]
    finally:
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()
    while any(map(is_there, pids)):
        assert time.monotonic() < until
        time.sleep(0.02)


def is_there(pid: int) -> bool:
    """Whether a process runs; one that has ended may wait for somebody to ask how."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def pair() -> tuple[Ranks, Ranks]:
    store = HashStore()
    return Ranks(0, 2, store), Ranks(1, 2, store, patience=timedelta(seconds=0.1))


def test_others_wait_for_what_rank_0_tells_and_not_for_ever():
    first, second = pair()
    with pytest.raises(UserError, match=r"rank 1 has waited 0:00:00.1.* for rank 0 to write a poem"):
        second.ask("poem", "write a poem")
    first.tell("poem", {"lines": [1, 2]})
    assert second.ask("poem", "write a poem") == {"lines": [1, 2]}
    order = []
    with pytest.raises(UserError, match="for rank 0 to fill"):
        second.after_first("fill", lambda: order.append("second"))
    first.after_first("fill", lambda: order.append("first"))
    second.after_first("fill", lambda: order.append("second"))
    assert order == ["first", "second"]


def test_one_process_tells_nobody():
    alone = Ranks()
    alone.tell("anything")
    assert alone.after_first("anything", lambda: 3) == 3
    with alone.group("fit", "cpu"):
        assert processes.place() == (0, 1)


def test_others_build_nothing_and_take_part_in_fits(project):
    """Rank 0 builds a chain of three; rank 1 is called for the one that trains, and for its needs before it."""
    first, second = (
        project.new("phase=expert", "expert=transformer"),
        project.new("phase=expert", "expert=transformer"),
    )
    first.ranks, second.ranks = pair()
    calls: list[tuple[int, str]] = []

    def chain(run: Run) -> Maker:
        def build(name: str):
            def built(path: Path) -> dict:
                calls.append((run.ranks.rank, name))
                if run.ranks.follows:
                    raise Followed
                (path / "file").write_text(name)
                return {}

            return built

        data = Maker("data", {}, build("data"))
        fit = Maker("fit", {}, build("fit"), {"data": data}, trains=True)
        return Maker("report", {}, build("report"), {"fit": fit})

    path = first.obtain(chain(first))
    assert second.obtain(chain(second)) == path
    assert calls == [(0, "data"), (0, "fit"), (0, "report"), (1, "fit")]
    assert second.obtain(chain(second)) == path  # without another word from rank 0
    calls.clear()
    again, follower = (
        project.new("phase=expert", "expert=transformer"),
        project.new("phase=expert", "expert=transformer"),
    )
    again.ranks, follower.ranks = pair()
    assert again.obtain(chain(again)) == follower.obtain(chain(follower)) == path
    assert calls == []
    before = set(project.root.rglob("*"))
    follower.record(status="done")
    assert follower.publish(path, "name") == project.root / "checkpoints" / "name"
    assert set(project.root.rglob("*")) == before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["trainer.devices=2"], "trainer.devices=2 are 2 processes: add strategy=ddp"),
        (["trainer.devices=2", "phase=eval", "strategy=ddp"], "phase=eval is the work of one process"),
        (["trainer.devices=0", "strategy=ddp"], "trainer.devices=0 is no number of processes"),
        (["trainer.devices=auto", "strategy=ddp"], "trainer.devices=auto is no number of processes"),
        (["++trainer.num_nodes=2", "strategy=ddp"], "start train.py with torchrun"),
    ],
)
def test_settings_that_contradict_each_other_are_one_sentence(project, settings, said):
    with pytest.raises(UserError, match=said):
        number_of_processes(project.new("phase=mla", *settings).cfg)


def test_what_the_environment_started_has_to_agree(project, monkeypatch):
    cfg = project.new("phase=mla", "trainer.devices=[0,1]", "strategy=ddp").cfg
    assert number_of_processes(cfg) == 2
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"4 processes were started and trainer.devices asks for 2"):
        number_of_processes(cfg)


def test_a_prerequisite_computes_where_the_run_does(project):
    run = project.new("phase=mla", "trainer.devices=2", "strategy=ddp", "trainer.max_steps=5")
    cfg = run.sub("expert", "transformer").cfg
    assert (cfg.trainer.devices, cfg.strategy._target_, cfg.trainer.max_steps) == (
        2,
        "nano_think.phases.strategies.ddp",
        None,
    )


def test_a_batch_has_to_be_divisible(project):
    from nano_think.phases.expert import expert_maker

    run = project.new("phase=expert", "expert=transformer")
    run.ranks = Ranks(0, 3, HashStore())
    with pytest.raises(
        UserError, match=r"training.transformer.batch_size=8 is .* divided among 3: choose a multiple"
    ):
        expert_maker(run, "transformer")


@pytest.mark.parametrize("rows", [8, 7, 5])
def test_random_numbers_of_rows_do_not_depend_on_the_process(monkeypatch, rows):
    """7 and 5 rows: the last batch of a validation, in which ranks have different numbers of rows, or none."""

    def numbers(count: int) -> torch.Tensor:
        return torch.rand((count, 16), generator=torch.Generator().manual_seed(3))

    whole, world = numbers(rows), 4 if rows == 8 else 6
    for rank in range(world):
        own = len(range(rank, rows, world))
        monkeypatch.setattr(processes, "place", lambda rank=rank: (rank, world))
        if rows == 8:
            assert torch.equal(processes.own_rows(numbers, own), whole[rank::world])
        kept = processes.own_rows(numbers, max(1, own), rows)
        assert len(kept) == max(1, own)
        if own:
            assert torch.equal(kept, whole[rank::world])


def test_packages_and_devices_that_are_not_there_are_named(monkeypatch):
    from nano_think.phases import strategies

    with pytest.raises(UserError, match="needs a package that is not there: `pip install deepspeed`"):
        strategies.deepspeed(2)
    monkeypatch.setattr(strategies.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match="strategy=deepspeed needs a GPU"):
        strategies.deepspeed(2)
    with pytest.raises(UserError, match="strategy=fsdp2 divides parameters too"):
        strategies.deepspeed(2, stage=3)
    assert FitTask.drawn(torch.ones, {"labels": torch.zeros(3, 2)}).tolist() == [1, 1, 1]
