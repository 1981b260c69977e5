"""An order-preserving map over worker processes, for the CPU-bound steps between text and tokens.

The workers are interpreters of their own that are sent pickled calls over a pipe. `multiprocessing` would either
fork, which a process with threads must not do (the progress display and the tokenizer have some), or import the
main program again in every worker, which costs more than many a corpus takes and needs a guard in it. A worker
ends when its pipe closes, so none outlives the parent, however that ended.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

from nano_think.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

# The first items are done in the parent: a small job is over before an interpreter has started (0.3 s).
INLINE_ITEMS = 4
# Beyond this many the parent, which reads and writes, is what they wait for.
MOST_PROCESSES = 8
# Items read ahead of the one whose result is due, for each worker: bounds the memory.
AHEAD = 2

_START = "import sys; sys.path[:] = {path!r}; from nano_think.data.workers import serve; serve()"
# A worker is one thread; libraries that start a pool when they are imported only take memory.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def default_processes() -> int:
    """As many as the cores this process may use, at most `MOST_PROCESSES`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_PROCESSES)


class Workers:
    """Processes that are started when there is enough to do, and are gone after the `with` block.

    What they return does not depend on how many there are, as long as the functions they are given do not.

    Args:
        processes: how many; 1 does everything in the calling process, None is `default_processes()`.

    Raises:
        UserError: `processes` is no such number; a worker died, for example because memory ran out.
    """

    def __init__(self, processes: int | None = None) -> None:
        if processes is not None and (not isinstance(processes, int) or processes < 1):
            raise UserError(
                f"data.processes={processes} must be a whole number from 1, or null for all cores"
            )
        self.processes = processes or default_processes()
        self._inline_left = INLINE_ITEMS
        self._started: list[_Worker] = []
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        # Also after Ctrl+C: whatever they are at, nobody waits for it any more.
        for worker in self._started:
            worker.stop()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """`function` of every item, in their order; a few items are read ahead.

        function: pickled once for each worker and map, so that it may carry data (`functools.partial`).
        """
        items = iter(items)
        for item in islice(items, self._inline_left if self.processes > 1 else None):
            self._inline_left -= 1
            yield function(item)
        pending: deque[Future[Result]] = deque()
        for item in items:
            if self._threads is None:
                self._start()
            pending.append(self._threads.submit(self._call, function, item))  # type: ignore[union-attr]
            if len(pending) >= AHEAD * self.processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _start(self) -> None:
        for _ in range(self.processes):
            self._started.append(_Worker())
            self._free.put(self._started[-1])
        # One thread for each pipe: it waits where the parent would have to choose between writing and reading.
        self._threads = ThreadPoolExecutor(self.processes)

    def _call(self, function: Callable[[Item], Result], item: Item) -> Result:
        worker = self._free.get()
        try:
            return worker.call(function, item)
        finally:
            self._free.put(worker)


class _Worker:
    """One process and the pipe to it."""

    def __init__(self) -> None:
        self._function: object = None
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **_ONE_THREAD},
            start_new_session=True,  # Ctrl+C is the parent's to handle
        )

    def call(self, function: Callable[..., Any], item: Any) -> Any:
        """Send one call and wait for what comes back; what the function raised is raised here."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        known = function is self._function
        self._function = function
        request = (None if known else function, item)
        try:
            pickle.dump(request, self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
            succeeded, value = pickle.load(self._process.stdout)
        except (EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
            raise UserError(
                f"a worker process ended with status {self._process.poll()} before its work was done, perhaps "
                "because memory ran out: run again with data.processes=1"
            ) from error
        if not succeeded:
            raise value
        return value

    def stop(self) -> None:
        """End the process now and reap it."""
        self._process.kill()
        self._process.wait()
        # A pipe may still hold part of a request that nobody will read.
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]


def serve() -> None:
    """The main loop of a worker: until the pipe closes, call what comes and send back what it returns."""
    requests = sys.stdin.buffer
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not come between the replies
    function: Callable[[Any], Any] | None = None
    with contextlib.suppress(EOFError, OSError):
        while True:
            given, item = pickle.load(requests)
            function = given or function
            try:
                reply = (True, function(item))  # type: ignore[misc]
            except Exception as error:
                reply = (False, _portable(error))
            pickle.dump(reply, replies, protocol=pickle.HIGHEST_PROTOCOL)
            replies.flush()


def _portable(error: Exception) -> Exception:
    """The error with the worker's traceback as a note, or one in its words where it cannot be pickled."""
    trace = "".join(traceback.format_exception(error))
    try:
        error.add_note(f"in a worker process:\n{trace}")
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(trace)
