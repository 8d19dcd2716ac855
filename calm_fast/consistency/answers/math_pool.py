"""Processes that compare answers by math-verify; one that gets stuck is killed and replaced.

Starting one takes most of a second, so that a few that have nothing to do are kept for the next call.
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
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

# a process burns its CPU seconds slowly on a busy machine; by the clock it is given this many times as long, and more
_PATIENCE, _PATIENCE_MORE = 20, 60
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {module} import main; main()"
_MODULE = "calm_fast.consistency.answers.math_worker"
# processes without work that are kept (60 MB each at first), and how many questions one may have served to be kept:
# what sympy and the parser remember grows
_MOST_KEPT, _SERVED = 4, 5000


@dataclass
class Comparison:
    """Answers of one question and what is known of them; filled while it is worked on.

    known: (i, j), i < j -> same, or None where the time was over before it was known.
    """

    texts: list[str]
    known: dict[tuple[int, int], bool | None] = field(default_factory=dict)
    unreadable: set[int] = field(default_factory=set)
    no_value: set[int] = field(default_factory=set)

    def blame(self, step: str, answers: Sequence[int]) -> None:
        """Note what a process died of, so that the next one leaves it out."""
        if step == "read":
            self.unreadable.add(answers[0])
        elif step == "value":
            self.no_value.add(answers[0])
        else:
            self.known[answers[0], answers[1]] = None

    def message(self, timeout: float) -> bytes:
        known = [[i, j, verdict] for (i, j), verdict in self.known.items()]
        unreadable, no_value = sorted(self.unreadable), sorted(self.no_value)
        task = {"texts": self.texts, "known": known, "timeout": timeout}
        return json.dumps({**task, "unreadable": unreadable, "no_value": no_value}).encode() + b"\n"


class _Worker:
    """A child process, the task it has, and the step it is at."""

    def __init__(self, events: queue.Queue, command: tuple[str, ...]) -> None:
        self.task: int | None = None
        self.step: tuple[str, list[int]] | None = None
        self.ready = False
        self.failure = ""
        self.served = 0
        self.heard = time.monotonic()
        self.events, self.command, self.owner = events, command, os.getpid()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # sympy's answers may depend on the order of a set, and that on the hash seed
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        with self.process.stdout as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break  # killed in the middle of a line
                event = json.loads(line)
                # how it started is noted here: the event may come between two calls, when nobody reads any
                if event[0] == "ready":
                    self.ready = True
                elif event[0] == "failed":
                    self.failure = event[1]
                self.events.put((self, event))
        self.events.put((self, None))

    def give(self, number: int, message: bytes) -> None:
        self.task, self.step, self.heard = number, None, time.monotonic()
        self.served += 1
        try:
            self.process.stdin.write(message)
            self.process.stdin.flush()
        except OSError:
            pass  # it has died; its last event says so

    def end(self) -> None:
        if os.getpid() != self.owner:
            return  # a fork's copy: the process is its parent's
        self.process.kill()
        self.process.wait()
        self.listener.join(timeout=1)
        try:
            self.process.stdin.close()
        except OSError:
            pass


class _Kept:
    """Processes between two calls: each belongs to one call or lies here."""

    def __init__(self) -> None:
        self.lock, self.idle, self.hooked = threading.Lock(), [], False

    def take(self, events: queue.Queue) -> _Worker:
        """A process that reports to `events`: a kept one that is still alive, or a new one."""
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
                return _Worker(events, command)
            # in this order: if it dies after it was found alive, the news goes to these events
            worker.events, worker.heard = events, time.monotonic()
            if worker.process.poll() is None and worker.command == command:
                return worker
            worker.end()

    def give_back(self, worker: _Worker) -> None:
        """Keep it, or end it where it is busy, dead, old, or one too many."""
        if worker.owner != os.getpid():
            return
        with self.lock:
            usable = worker.task is None and not worker.failure and worker.process.poll() is None
            if usable and worker.served < _SERVED and len(self.idle) < _MOST_KEPT:
                self.idle.append(worker)
                return
        worker.end()

    def end_all(self) -> None:
        """End the kept processes; the next call starts new ones."""
        with self.lock:
            ending, self.idle = self.idle, []
        for worker in ending:
            worker.end()

    def _forget(self) -> None:
        """In a fork: the processes are the parent's, and another thread of it may have held the lock."""
        self.lock, self.idle, self.not_ours = threading.Lock(), [], self.idle


kept = _Kept()


def compare(comparisons: Sequence[Comparison], workers: int, timeout: float) -> Iterator[int]:
    """Fill `known` of every comparison; yields the number of each one when it is finished, in any order.

    Args:
        timeout: CPU seconds for each reading of an answer and each comparison of two.
    Works in threads, in forks and in daemonic processes. Processes that are free in the end are kept for the next call,
    a few of them, until `kept.end_all()` or the end of this process.
    Raises:
        RuntimeError: the processes cannot be started, or die without having begun anything.
    """
    waiting = deque(range(len(comparisons)))
    deaths = dict.fromkeys(waiting, 0)
    events: queue.Queue = queue.Queue()
    pool: set[_Worker] = set()
    by_the_clock = timeout * _PATIENCE + _PATIENCE_MORE if hasattr(signal, "setitimer") else timeout + 1

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
                    if (late.task is not None or not late.ready) and time.monotonic() - late.heard > by_the_clock:
                        late.process.kill()
                continue
            if worker not in pool:
                continue  # it was dead when it was taken
            worker.heard = time.monotonic()
            if event is None:
                pool.discard(worker)
                _bury(worker, comparisons, waiting, deaths)
                if waiting:
                    hire()
                continue
            finished = _note(worker, event, comparisons)
            if finished is not None:
                left -= 1
                yield finished
            begin(worker)
    finally:
        for worker in pool:
            kept.give_back(worker)


def _note(worker: _Worker, event: list, comparisons: Sequence[Comparison]) -> int | None:
    """Take in what a process said; the number of its task if that is done."""
    kind, *rest = event
    if kind == "verdict":
        comparisons[worker.task].known[rest[0], rest[1]] = rest[2]
        worker.step = None
    elif kind == "done":
        finished, worker.task, worker.step = worker.task, None, None
        return finished
    elif kind not in ("ready", "failed"):
        worker.step = (kind, rest)
    return None


def _bury(worker: _Worker, comparisons: Sequence[Comparison], waiting: deque[int], deaths: dict[int, int]) -> None:
    """A process has ended: its task goes back to the others, without what it died of."""
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
