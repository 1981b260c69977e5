"""Worker processes: order, errors, and that none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from operator import mul, truediv
from pathlib import Path

import pytest

import nano_think.data.workers as workers_module
from nano_think.data.workers import AHEAD, INLINE_ITEMS, Workers, default_processes
from nano_think.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def processes_of(workers: Workers) -> list[int]:
    return [worker._process.pid for worker in workers._started]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_results_come_in_the_order_of_the_items(processes: int) -> None:
    with Workers(processes) as workers:
        assert list(workers.map(partial(mul, 3), range(40))) == [3 * i for i in range(40)]
        # a second function reaches workers that already know the first
        assert list(workers.map(str, range(5))) == list("01234")
        assert len(processes_of(workers)) == (processes if processes > 1 else 0)


def test_a_small_job_starts_no_process() -> None:
    with Workers(2) as workers:
        assert list(workers.map(abs, range(-INLINE_ITEMS, 0))) == [4, 3, 2, 1]
        assert processes_of(workers) == []


def test_items_are_read_only_a_little_ahead() -> None:
    read = []
    items = (read.append(number) or number for number in range(1000))
    with Workers(2) as workers:
        for done, _ in enumerate(workers.map(abs, items), 1):
            assert len(read) - done <= AHEAD * 2


def test_large_items_and_results_do_not_block_each_other() -> None:
    block = b"x" * 3_000_000
    with Workers(2) as workers:
        assert all(len(result) == len(block) for result in workers.map(bytes.upper, [block] * 12))


def test_what_a_function_raises_is_raised_here_with_the_trace_of_the_worker() -> None:
    with Workers(2) as workers, pytest.raises(ZeroDivisionError) as caught:
        list(workers.map(partial(truediv, 1), [1] * 10 + [0]))
    assert "in a worker process" in "".join(caught.value.__notes__)


def test_an_error_that_cannot_be_pickled_keeps_its_words() -> None:
    class Local(Exception):
        pass

    assert "the reason" in str(workers_module._portable(Local("the reason")))


def test_a_worker_that_dies_is_one_clear_message() -> None:
    with Workers(2) as workers:
        results = workers.map(abs, range(1000))
        for _ in range(INLINE_ITEMS + 1):
            next(results)
        for pid in processes_of(workers):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(UserError, match=r"data\.processes=1"):
            list(results)


def test_no_process_is_left_after_a_map_that_was_broken_off() -> None:
    with Workers(2) as workers:
        results = workers.map(time.sleep, [0.0] * (INLINE_ITEMS + 1) + [60.0] * 10)
        for _ in range(INLINE_ITEMS + 1):
            next(results)
        pids = processes_of(workers)
        assert len(pids) == 2
        started = time.perf_counter()
    assert time.perf_counter() - started < 10
    assert not any(alive(pid) for pid in pids)


PARENT = """
    import signal, sys, time
    from nano_think.data.workers import Workers
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is born deaf to it
    with Workers(2) as workers:
        results = workers.map(time.sleep, [0.0] * 5 + [60.0] * 10)
        for _ in range(5):
            next(results)
        print(*[worker._process.pid for worker in workers._started], flush=True)
        next(results)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_do_not_outlive_their_parent(number: signal.Signals) -> None:
    """Ctrl+C and a parent that is killed outright; idle workers end at once, busy ones after their item."""
    script = textwrap.dedent(PARENT).replace("60.0", "60.0" if number == signal.SIGINT else "1.0")
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    assert all(alive(pid) for pid in pids)
    parent.send_signal(number)
    _, complaint = parent.communicate(timeout=120)
    assert complaint.count(b"Traceback") == (1 if number == signal.SIGINT else 0)
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("processes", [0, -1, "two", 1.5])
def test_a_number_of_processes_that_is_none_is_refused(processes: object) -> None:
    with pytest.raises(UserError, match=r"data\.processes=.* must be a whole number from 1"):
        Workers(processes)


def test_the_number_of_processes_follows_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    for cores, expected in ((None, 1), (2, 2), (64, workers_module.MOST_PROCESSES)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert default_processes() == expected
