"""The command line: list groups, or run them one after another."""

from __future__ import annotations

import argparse
import fnmatch
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from benchmarks.harness.case import GateError, Group, Options
from benchmarks.harness.discover import group_files, load_group
from benchmarks.harness.measure import measure
from benchmarks.harness.memory import peaks_of
from benchmarks.harness.process import prepare
from benchmarks.harness.report import RESULTS, memory_table, settings, show, write
from benchmarks.harness.statistics import FlopsError
from nano_think.evals.report import render_table


def parser() -> argparse.ArgumentParser:
    """Arguments of `python -m benchmarks`."""
    made = argparse.ArgumentParser("python -m benchmarks", description="Ours and its peers, side by side.")
    made.add_argument("groups", nargs="*", help="names, or `all`; none: list them")
    made.add_argument("--rounds", type=int, default=9)
    limit = "begin no round but the first later than that after the start of the group"
    made.add_argument("--seconds", type=float, default=float("inf"), help=limit)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--quick", action="store_true", help="sizes of a test, one round, nothing written")
    only = "cases whose name fits, such as '*bf16'; may be given several times"
    made.add_argument("--only", metavar="PATTERN", action="append", help=only)
    made.add_argument("--compile", action="store_true", help="also cases under torch.compile")
    made.add_argument("--checkpoint", type=Path, help="a trained model, for the group `latency`")
    made.add_argument("--memory", action="store_true", help="also peak memory, a process for each case")
    made.add_argument(
        "--keep-memory", action="store_true", help="the allocator keeps freed memory, for all cases"
    )
    made.add_argument("--out", type=Path, help=f"folder of results, {RESULTS} by default")
    return made


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 after a gate or a formula that is wrong."""
    args = parser().parse_args(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    known = group_files()
    if not args.groups:
        for name, line in known.items():
            console.print(f"{name:<14} {line}", markup=False)
        return 0
    names = list(known) if args.groups == ["all"] else args.groups
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"there is no benchmark group {unknown[0]!r}; there are {', '.join(known)}")
    prepare(args.threads, kept=args.keep_memory)
    for name in names:
        try:
            run(name, args, console)
        except (GateError, FlopsError) as error:
            console.print(f"error in {name}: {error}", markup=False)
            return 1
    return 0


def run(name: str, args: argparse.Namespace, console: Console) -> None:
    """Measure one group, show it and write it down (a quick run only where a folder is named)."""
    options = Options(quick=args.quick, compiled=args.compile, checkpoint=args.checkpoint)
    group = selected(load_group(name, options), args.only)
    if not group.cases:
        for missing in group.missing:
            console.print(f"{name}: not here: {missing.name}: {missing.why}", markup=False)
        return
    say = lambda line: console.print(line, style="dim", markup=False)  # noqa: E731
    measured = measure(group, 1 if args.quick else args.rounds, args.quick, say, args.seconds)
    show(measured, console)
    memory = None
    if args.memory:
        cases = [case.name for case in group.cases]
        memory = peaks_of(name, cases, args.threads, args.quick, args.keep_memory)
        render_table(memory_table(memory), console)
    if args.out or not args.quick:
        made_with = {"command": sys.argv[1:], **settings(args.threads, args.keep_memory)}
        path = write(name, measured, made_with, memory, args.out or RESULTS)
        console.print(f"written: {path}", markup=False)


def selected(group: Group, patterns: list[str] | None) -> Group:
    """The cases that fit one of the patterns; peers of those left out and all derived figures go with them."""
    if patterns is None:
        return group
    names = [c.name for c in group.cases if any(fnmatch.fnmatch(c.name, pattern) for pattern in patterns)]
    if not names:
        raise SystemExit(
            f"no case fits {' or '.join(patterns)}: there are {', '.join(c.name for c in group.cases)}"
        )
    kept = [
        replace(case, peers=tuple(peer for peer in case.peers if peer in names))
        for case in group.cases
        if case.name in names
    ]
    return replace(group, cases=kept, derived={})


if __name__ == "__main__":
    sys.exit(main())
