"""Worker processes that compare answers by math-verify; one that gets stuck is killed and replaced.

Starting a process takes most of a second, so a few idle ones are kept for the next call.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, cast

# a busy machine spends CPU seconds slowly; on the clock a process gets this many times its limit, plus a constant
_PATIENCE, _PATIENCE_MORE = 20, 60
_START = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
if len(sys.argv) > 2:
    from calm_fast.consistency.answers.lifeline import end_with_parent
    end_with_parent(int(sys.argv[2]))
from {module} import main
main()
"""
_MODULE = "calm_fast.consistency.answers.math_worker"
# most idle processes that are kept (60 MB each at first), and most questions that one of them may have served: caches
# of sympy and of the parser grow
_MOST_KEPT, _SERVED = 4, 5000
Events = queue.Queue[tuple["_Worker", "list[Any] | None"]]


@dataclass
class Comparison:
    """Answers of one question and their verdicts so far.

    texts: the answers. known: (i, j), i < j -> equal, or None where the comparison timed out. unreadable, no_value:
    answers whose reading, or evaluation, killed a process.
    """

    texts: list[str]
    known: dict[tuple[int, int], bool | None] = field(default_factory=dict)
    unreadable: set[int] = field(default_factory=set)
    no_value: set[int] = field(default_factory=set)

    def blame(self, step: str, answers: Sequence[int]) -> None:
        """Record the step that killed a process, so that the next one leaves it out."""
        if step == "read":
            self.unreadable.add(answers[0])
        elif step == "value":
            self.no_value.add(answers[0])
        else:
            self.known[answers[0], answers[1]] = None

    def message(self, timeout: float) -> bytes:
        """Return the task as the worker reads it."""
        known = [[i, j, verdict] for (i, j), verdict in self.known.items()]
        unreadable, no_value = sorted(self.unreadable), sorted(self.no_value)
        task = {"texts": self.texts, "known": known, "timeout": timeout}
        return json.dumps({**task, "unreadable": unreadable, "no_value": no_value}).encode() + b"\n"


class _Worker:
    """A child process, its task, and the step that it has announced."""

    def __init__(self, events: Events, command: tuple[str, ...]) -> None:
        self.task: int | None = None
        self.step: tuple[str, list[int]] | None = None
        self.ready = False
        self.failure = ""
        self.served = 0
        self.heard = time.monotonic()
        self.events, self.command, self.owner = events, command, os.getpid()
        # the child's end of this pipe becomes readable when this process ends: nothing is written to it
        watched, held = os.pipe()
        self.lifeline = os.fdopen(held, "wb", buffering=0)
        inherited = (watched,) if os.name == "posix" else ()
        try:
            self.process = subprocess.Popen(
                (*command, *map(str, inherited)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=inherited,
                # sympy's answers may depend on the order of a set, and that on the hash seed
                env={**os.environ, "PYTHONHASHSEED": "0"},
            )
        finally:
            os.close(watched)
        self.input = cast(IO[bytes], self.process.stdin)  # both are pipes
        self.output = cast(IO[bytes], self.process.stdout)
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        with self.output as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break  # killed in the middle of a line
                event = json.loads(line)
                # record the start here: the event may come between two calls, when no call reads events
                if event[0] == "ready":
                    self.ready = True
                elif event[0] == "failed":
                    self.failure = event[1]
                self.events.put((self, event))
        self.events.put((self, None))

    def give(self, number: int, message: bytes) -> None:
        """Send task `number`."""
        self.task, self.step, self.heard = number, None, time.monotonic()
        self.served += 1
        try:
            self.input.write(message)
            self.input.flush()
        except OSError:
            pass  # the process has died, as its last event says

    def end(self) -> None:
        """Kill the process and wait for its end."""
        if os.getpid() != self.owner:
            return  # this is a fork, and the process belongs to its parent
        self.process.kill()
        self.process.wait()
        self.listener.join(timeout=1)
        self.lifeline.close()
        try:
            self.input.close()
        except OSError:
            pass


class _IdleWorkers:
    """Processes between two calls; each belongs either to one call or to this list."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.idle: list[_Worker] = []
        self.started: weakref.WeakSet[_Worker] = weakref.WeakSet()
        self.hooked = False

    def take(self, events: Events) -> _Worker:
        """Return a process that reports to `events`: an idle one that is alive, or a new one."""
        command = (sys.executable, "-c", _START.format(module=_MODULE), json.dumps(sys.path))
        if not self.hooked:
            self.hooked = True
            atexit.register(self.end_all)
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=self._forget)
        while True:
            with self.lock:
                worker = self.idle.pop() if self.idle else None
            if worker is None:
                worker = _Worker(events, command)
                self.started.add(worker)
                return worker
            # in this order: a process that dies after the check below reports that to these events
            worker.events, worker.heard = events, time.monotonic()
            if worker.process.poll() is None and worker.command == command:
                return worker
            worker.end()

    def give_back(self, worker: _Worker) -> None:
        """Keep a process, or end it if it is busy, dead or old, or if enough are kept."""
        if worker.owner != os.getpid():
            return
        with self.lock:
            usable = worker.task is None and not worker.failure and worker.process.poll() is None
            if usable and worker.served < _SERVED and len(self.idle) < _MOST_KEPT:
                self.idle.append(worker)
                return
        worker.end()

    def end_all(self) -> None:
        """End the idle processes."""
        with self.lock:
            ending, self.idle = self.idle, []
        for worker in ending:
            worker.end()

    def _forget(self) -> None:
        """Forget all processes after a fork: they are the parent's, and one of its threads may have held the lock."""
        self.lock, self.idle, self.not_ours = threading.Lock(), [], self.idle
        for worker in list(self.started):
            worker.lifeline.close()  # they end with the parent, and not with this process


kept = _IdleWorkers()


def end_workers() -> None:
    """End the idle processes that `group_answers` keeps for its next call; that call starts new ones.

    They also end with this process, however it ends.
    """
    kept.end_all()


def compare(comparisons: Sequence[Comparison], workers: int, timeout: float) -> Iterator[int]:
    """Fill `known` of every comparison, and yield the index of each one when it is finished, in any order.

    Works in threads, in forks and in daemonic processes. A few processes that are idle at the end are kept for the next
    call, until `end_workers()` or the end of this process.

    Args:
        workers: most processes. timeout: CPU seconds for each reading of an answer and each comparison of two.
    Raises:
        RuntimeError: the processes cannot be started, or die before they begin a step.
    """
    waiting = deque(range(len(comparisons)))
    deaths = dict.fromkeys(waiting, 0)
    events: Events = queue.Queue()
    pool: set[_Worker] = set()
    clock_limit = timeout * _PATIENCE + _PATIENCE_MORE if hasattr(signal, "setitimer") else timeout + 1

    def begin(worker: _Worker) -> None:
        if worker.ready and worker.task is None and waiting:
            number = waiting.popleft()
            worker.give(number, comparisons[number].message(timeout))

    def hire() -> None:
        worker = kept.take(events)
        pool.add(worker)
        begin(worker)

    try:
        left = len(waiting)
        for _ in range(min(workers, left)):
            hire()
        while left:
            try:
                worker, event = events.get(timeout=1)
            except queue.Empty:
                for late in pool:
                    if (late.task is not None or not late.ready) and time.monotonic() - late.heard > clock_limit:
                        late.process.kill()
                continue
            if worker not in pool:
                continue  # it was dead when this call took it
            worker.heard = time.monotonic()
            if event is None:
                pool.discard(worker)
                _requeue(worker, comparisons, waiting, deaths)
                if waiting:
                    hire()
                continue
            finished = _record(worker, event, comparisons)
            if finished is not None:
                left -= 1
                yield finished
            begin(worker)
    finally:
        for worker in pool:
            kept.give_back(worker)


def _record(worker: _Worker, event: list[Any], comparisons: Sequence[Comparison]) -> int | None:
    """Record an event of a process; return the index of its task if that is finished."""
    kind, *rest = event
    if kind == "verdict" and worker.task is not None:
        comparisons[worker.task].known[rest[0], rest[1]] = rest[2]
        worker.step = None
    elif kind == "done":
        finished, worker.task, worker.step = worker.task, None, None
        return finished
    elif kind not in ("ready", "failed"):
        worker.step = (kind, rest)
    return None


def _requeue(worker: _Worker, comparisons: Sequence[Comparison], waiting: deque[int], deaths: dict[int, int]) -> None:
    """Requeue a dead worker's task, minus the step that killed it."""
    worker.end()
    if not worker.ready:
        why = worker.failure or f"exit code {worker.process.returncode}"
        raise RuntimeError(f"group_answers: a process with math-verify could not be started ({why})")
    if worker.task is None:
        return
    waiting.appendleft(worker.task)
    if worker.step is not None:
        comparisons[worker.task].blame(*worker.step)
        return
    deaths[worker.task] += 1
    if deaths[worker.task] > 2:
        why = f"exit code {worker.process.returncode}"
        raise RuntimeError(f"group_answers: a process with math-verify died before it began to compare ({why})")
