"""Kill runs of train.py again and again, start them again, and compare what they leave with undisturbed ones.

    python -m tests.reliability.kills --kills 200 --out DIR      all phases, until every place has its share
    python -m tests.reliability.kills --short --out DIR          one short chain

What came of a chain is written when it is over, and the same command goes on with the next one.

Most processes are forked from this one, in which the libraries are imported already; every tenth is a new one.
Nothing here has started a thread when it forks, so a child begins as a fresh process would after its imports.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.reliability.compare import differences
from tests.reliability.kill_results import Kill, Outcome, enough, outcomes, table
from tests.reliability.moments import ROOT, Moment, run_train
from tests.texts import write_texts

INTERVAL, STEPS = 3, 24
TINY = ("size=tiny", "size.vocab_size=300", "data=jsonl", "data.val_rows=4", "data.processes=1")
TINY += (
    "data.train_tokens=8192",
    "model.retrieval.chunk=16",
    "model.store.rows=8",
    "++training.mla.static_tokens=1024",
)
TINY += ("callbacks.samples.max_new_tokens=2", "precision=32-true", "eval.resamples=20", "eval.rows=4")
OFTEN = {
    "trainer.max_steps": STEPS,
    "trainer.val_check_interval": 8,
    "trainer.log_every_n_steps": 1,
    "callbacks.checkpoint.every_n_train_steps": INTERVAL,
}


def often(prefix: str = "", steps: int = STEPS) -> list[str]:
    """Settings of a fit that saves, logs and validates all the time, for the phase named or for a prerequisite."""
    return [f"{prefix}{key}={steps if value == STEPS else value}" for key, value in OFTEN.items()]


PREREQUISITES = (*often("prereq.expert.", 6), *often("prereq.mla.", 6))
# A place is passed at most so often before the kill; between two saved states a checkpoint's four times.
MOST = {"validation": 1, "last step": 3, "anywhere": 6, "shards": 14, "corpus": 10, "tokenizer": 5}
MOST |= {"store": 6, "report": 16}
TRAINING = {"checkpoint": 9, "validation": 4, "anywhere": 4}
ENDING = ({"last step": 3}, {"artefact": 3}, {"published": 2}, {"manifest": 1})


@dataclass(frozen=True)
class Chain:
    """A command that is killed some twenty times.

    plan: how often each place is tried, stage after stage, in random order within a stage. A process that comes to
    its end without passing its place ends the chain.
    begins_with: the chain whose undisturbed result it starts from.
    """

    name: str
    arguments: tuple[str, ...]
    plan: tuple[dict[str, int], ...] = (TRAINING, *ENDING)
    begins_with: str | None = "data"


MAKING_DATA = ({"corpus": 3}, {"tokenizer": 3}, {"shards": 11})
CHAINS = [
    Chain("data", ("phase=data",), (*MAKING_DATA, {"report": 1}, {"manifest": 1}), None),
    Chain("tokenizer", ("phase=tokenizer",), ({"corpus": 1}, {"tokenizer": 4}, {"manifest": 1}), None),
    Chain("6a", ("phase=expert", "expert=transformer", "trainer.accumulate_grad_batches=2", *often())),
    Chain("6b", ("phase=expert", "expert=diffuser", "data.num_workers=1", *often(), *PREREQUISITES)),
    Chain("6c", ("phase=expert", "expert=state_space", *often(), *PREREQUISITES)),
    Chain(
        "7a-7d",
        ("phase=mla", "expert=all", "trainer.accumulate_grad_batches=2", *often(steps=12), *PREREQUISITES),
        ({"checkpoint": 10, "validation": 5, "anywhere": 5}, {"store": 12}, *ENDING),
        "experts",
    ),
    Chain(
        "finetune", ("phase=finetune", "expert=transformer", *often(), *PREREQUISITES), begins_with="experts"
    ),
    Chain(
        "pipeline",
        ("phase=pipeline", *PREREQUISITES, *often(steps=6)),
        (*MAKING_DATA, TRAINING, {"report": 12}, {"manifest": 1}),
        None,
    ),
    Chain(
        "eval", ("phase=eval", *PREREQUISITES, *often(steps=6)), ({"report": 3}, {"manifest": 1}), "pipeline"
    ),
]
# Where others begin.
EXPERTS = Chain("experts", ("phase=expert", "expert=all", *often(steps=6)))
SHORT = Chain(
    "short",
    ("phase=expert", "expert=transformer", "trainer.accumulate_grad_batches=2", *often(steps=8)),
    ({"shards": 1}, {"checkpoint": 2}, {"validation": 1}, {"last step": 1}, {"artefact": 1}),
    None,
)


class Harness:
    """Runs chains below one folder. What is drawn follows from the seed and the name of the chain."""

    def __init__(self, out: Path, seed: int, chain: str) -> None:
        self.out, self.rng = out, random.Random(f"{seed} {chain}")
        self.texts = out / "texts"
        if not self.texts.exists():
            _appear(self.texts, write_texts)
        # every tenth start is a new process
        self.started = self.rng.randrange(10)

    def start(self, arguments: list[str], moment: Moment, cold: bool) -> int:
        """Run train.py to its end, killed or not; its exit status, -9 where it was killed."""
        self.started += 1
        with open(self.out / "output.txt", "ab") as output:
            if cold:
                command = [sys.executable, "-m", "tests.reliability.moments", moment.spec(), *arguments]
                return subprocess.run(command, stdout=output, stderr=output, cwd=ROOT, check=False).returncode
            sys.stdout.flush()
            child = os.fork()
            if child == 0:
                _child(arguments, moment, output.fileno())
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def arguments(self, chain: Chain, root: Path, seed: int) -> list[str]:
        """The command line of a chain."""
        return [*TINY, *chain.arguments, f"seed={seed}", f"data.root={self.texts}", f"run.root={root}"]

    def undisturbed(self, chain: Chain, seed: int) -> Path:
        """The root of a run that nobody killed, made once."""
        root = self.out / f"{chain.name}-{seed}-undisturbed"
        if not root.exists():
            _appear(root, lambda folder: self._run_undisturbed(chain, seed, folder))
        return root

    def _run_undisturbed(self, chain: Chain, seed: int, root: Path) -> None:
        self._begin(chain, seed, root)
        never = Moment("", 0, False, str(self.out / "undisturbed.txt"))
        if self.start(self.arguments(chain, root, seed), never, cold=False):
            raise RuntimeError(f"{chain.name} fails by itself: see {self.out / 'output.txt'}")

    def _begin(self, chain: Chain, seed: int, root: Path) -> None:
        """Give a root what the chain starts from."""
        root.mkdir()
        if chain.begins_with is not None:
            before = self.undisturbed(
                next(c for c in [EXPERTS, *CHAINS] if c.name == chain.begins_with), seed
            )
            for part in ("artifacts", "checkpoints"):
                if (before / part).exists():
                    shutil.copytree(before / part, root / part)

    def run(self, chain: Chain, seed: int, kills: list[Kill]) -> list[str]:
        """Kill and start again until the run comes to its end; returns what differs from the undisturbed one.

        kills: where those that happen are entered.
        """
        reference, root = self.undisturbed(chain, seed), self.out / f"{chain.name}-{seed}"
        journal = self.out / f"{chain.name}-{seed}.txt"
        shutil.rmtree(root, ignore_errors=True)
        journal.unlink(missing_ok=True)
        self._begin(chain, seed, root)
        planned = []
        for stage in chain.plan:
            places = [place for place, count in stage.items() for _ in range(count)]
            planned += self.rng.sample(places, len(places))
        arguments = self.arguments(chain, root, seed)
        for place in [*planned, ""]:
            count = self.rng.randint(1, MOST.get(place, 4))
            moment = Moment(place, count, self.rng.random() < 0.5, str(journal))
            cold = self.started % 10 == 9
            status = self.start(arguments, moment, cold)
            if status == 0:
                break
            if status != -signal.SIGKILL:
                raise RuntimeError(f"exit status {status}, see {self.out / 'output.txt'}")
            kills.append(_last_kill(chain.name, journal.read_text().splitlines(), cold))
        _count_recomputed(kills, journal.read_text().splitlines())
        found = differences(reference, root)
        found += [
            f"{k.recomputed} steps done again after {k.place}" for k in kills if k.recomputed > INTERVAL
        ]
        if not found:
            shutil.rmtree(root)
        return found


def _appear(folder: Path, fill: Callable[[Path], object]) -> None:
    """Fill a folder that is there whole or not at all; of several processes that do so one is the first."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    fill(part)
    try:
        part.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(part)


def _child(arguments: list[str], moment: Moment, output: int) -> None:
    """The life of a forked process."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        run_train(moment, arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _last_kill(chain: str, journal: list[str], cold: bool) -> Kill:
    word, place, path = journal[-1].split("\t")
    assert word == "killed", journal[-1]
    return Kill(chain, place, Path(path).name, cold, "saved" in journal)


def _count_recomputed(kills: list[Kill], journal: list[str]) -> None:
    """What each kill cost: steps of a fit that were done before it and are done again after it."""
    done: dict[str, int] = {}
    number = -1
    for line in journal:
        word, *rest = line.split("\t")
        if word == "killed":
            number += 1
        elif word == "from" and number >= 0:
            again = done.get(rest[0], int(rest[1])) - int(rest[1])
            kills[number].recomputed = max(kills[number].recomputed, again)
        elif word == "step":
            done[rest[0]] = int(rest[1])


def worker(out: Path, chain: Chain, seed: int, commit: str) -> Outcome:
    """Run a chain in a process of its own, which starts no thread and keeps nothing of other chains."""
    path = Outcome.path(out, chain.name, seed)
    path.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        began, kills = time.perf_counter(), list[Kill]()
        try:
            trouble = "; ".join(Harness(out / f"seed{seed}", seed, chain.name).run(chain, seed, kills))
        except Exception as error:
            trouble = f"{type(error).__name__}: {error}"
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        times = {"seconds": round(time.perf_counter() - began), "cpu": round(usage.ru_utime + usage.ru_stime)}
        Outcome(chain.name, seed, commit, kills, trouble, **times).write(out)
        os._exit(0)
    os.waitpid(child, 0)
    return Outcome.read(path)


def main() -> None:
    """See the top of this module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the runs; goes on in one that it began"
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--short", action="store_true", help="one chain of six kills")
    parser.add_argument("--only", nargs="*", help="names of chains, each once")
    options = parser.parse_args()
    out, commit = options.out.resolve(), _import_all()
    out.mkdir(parents=True, exist_ok=True)
    named = {chain.name: chain for chain in CHAINS}
    chains = [SHORT] if options.short else [named[name] for name in options.only or named]
    seed, failed = options.seed, list[str]()
    while True:
        for chain in chains:
            # looked up each time, as several processes may share the chains
            if (chain.name, seed) not in outcomes(out, commit):
                outcome = worker(out, chain, seed, commit)
                failed += [outcome.line()] * bool(outcome.trouble)
                print(outcome.line(), flush=True)
        done = outcomes(out, commit).values()
        kills = [kill for outcome in done for kill in outcome.kills]
        if failed or options.short or options.only or enough(kills, options.kills):
            break
        seed += 1
    print(f"{table(kills, 'place')}\n\n{table(kills, 'chain')}")
    cold, cpu = sum(kill.cold for kill in kills), sum(outcome.cpu for outcome in done)
    print(f"{len(kills)} kills in {len(done)} chains of {commit}, {cold} of new processes, {cpu} CPU s")
    if failed:
        sys.exit("\n".join(["not equal to the undisturbed run:", *failed]))


def _import_all() -> str:
    """Import what train.py will, so that forked children begin with it; returns the commit of the code."""
    import lightning.pytorch.loggers
    import torch
    import torch.utils.tensorboard

    import nano_think.phases.evaluate
    import nano_think.phases.machine
    import nano_think.phases.mla
    import nano_think.phases.pipeline
    import nano_think.phases.run
    import nano_think.phases.trainer
    import nano_think.tasks.denoise
    import nano_think.tasks.route

    torch.set_num_threads(1)
    assert lightning.__version__
    return str(nano_think.phases.machine.versions()["commit"])


if __name__ == "__main__":
    main()
