"""Processes that compare answers by math-verify; one that gets stuck is killed and replaced."""

from __future__ import annotations

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
_MODULE = "calm_fast.consistency.math_worker"


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

    def __init__(self, events: queue.Queue) -> None:
        self.task: int | None = None
        self.step: tuple[str, list[int]] | None = None
        self.ready = False
        self.failure = ""
        self.heard = time.monotonic()
        code = _START.format(module=_MODULE)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # sympy's answers may depend on the order of a set, and that on the hash seed
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def _listen(self, events: queue.Queue) -> None:
        with self.process.stdout as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break  # killed in the middle of a line
                events.put((self, json.loads(line)))
        events.put((self, None))

    def give(self, number: int, message: bytes) -> None:
        self.task, self.step, self.heard = number, None, time.monotonic()
        try:
            self.process.stdin.write(message)
            self.process.stdin.flush()
        except OSError:
            pass  # it has died; its last event says so

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        try:
            self.process.stdin.close()
        except OSError:
            pass


def compare(comparisons: Sequence[Comparison], workers: int, timeout: float) -> Iterator[int]:
    """Fill `known` of every comparison; yields the number of each one when it is finished, in any order.

    Args:
        timeout: CPU seconds for each reading of an answer and each comparison of two.
    Raises:
        RuntimeError: the processes cannot be started, or die without having begun anything.
    """
    waiting = deque(range(len(comparisons)))
    deaths = dict.fromkeys(waiting, 0)
    events: queue.Queue = queue.Queue()
    pool: set[_Worker] = set()
    by_the_clock = timeout * _PATIENCE + _PATIENCE_MORE if hasattr(signal, "setitimer") else timeout + 1
    try:
        left = len(waiting)
        for _ in range(min(workers, left)):
            pool.add(_Worker(events))
        while left:
            try:
                worker, event = events.get(timeout=1)
            except queue.Empty:
                for late in pool:
                    if (late.task is not None or not late.ready) and time.monotonic() - late.heard > by_the_clock:
                        late.process.kill()
                continue
            worker.heard = time.monotonic()
            if event is None:
                _bury(worker, comparisons, waiting, deaths)
                pool.discard(worker)
                if waiting:
                    pool.add(_Worker(events))
                continue
            finished = _note(worker, event, comparisons)
            if finished is not None:
                left -= 1
                yield finished
            if worker.ready and worker.task is None and waiting:
                number = waiting.popleft()
                worker.give(number, comparisons[number].message(timeout))
    finally:
        for worker in pool:
            worker.end()


def _note(worker: _Worker, event: list, comparisons: Sequence[Comparison]) -> int | None:
    """Take in what a process said; the number of its task if that is done."""
    kind, *rest = event
    if kind == "ready":
        worker.ready = True
    elif kind == "failed":
        worker.failure = rest[0]
    elif kind == "verdict":
        comparisons[worker.task].known[rest[0], rest[1]] = rest[2]
        worker.step = None
    elif kind == "done":
        finished, worker.task, worker.step = worker.task, None, None
        return finished
    else:
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
