"""One side of `bench --compare`: a process that holds one revision's contestants and times them when it is told to.

Commands and answers are JSON, one a line, on stdin and stdout; `compare` is the other end.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

import torch

from calm_fast.benchmarks import machine
from calm_fast.benchmarks.measure import Ready, Setting, ready, row
from calm_fast.benchmarks.memory import settle
from calm_fast.benchmarks.registry import Case, cases
from calm_fast.benchmarks.timing import Budget, Ceilings, Timer, ceiling_work, interleave, summarise


def rivals(case: Case) -> list[str]:
    """Who is compared: ours, and the first baseline as a control: it is the same code on both sides."""
    ours = [c.name for c in case.contestants if c.ours]
    return ours + [c.name for c in case.contestants if not c.ours and not c.yardstick][:1]


class Worker:
    """Answers commands; holds one case at a time."""

    def __init__(
        self, device: str, threads: int, cold: bool, seed: int, commit: str, memory: str | None = None
    ) -> None:
        torch.set_num_threads(threads)
        self.device = torch.device(device)
        source = settle(self.device, memory)
        name = machine.device_name(self.device, source, "cold cache" if cold and device == "cpu" else "")
        self.setting = Setting(self.device, name, machine.versions(), commit, Budget(), seed, cold or None)
        self.timer = Timer(self.device, cold or None)
        self.case: Case | None = None
        self.ready: Ready | None = None

    def open(self, op: str, name: str, suite: str) -> dict[str, Any]:
        """Check and prepare a case; who can be timed, and why the others cannot."""
        self.case = self.ready = None
        gc.collect()
        (found,) = (case for case in cases(op, self.device, suite) if case.name == name)
        keep = rivals(found)
        parts = {field: getattr(found, field) for field in found.__dataclass_fields__}
        self.case = Case(**parts | {"contestants": [c for c in found.contestants if c.name in keep]})
        self.ready = ready(self.case, self.setting)
        return {"can": list(self.ready.thunks), "failures": self.ready.failures}

    def time(self, impl: str, calls: int) -> list[float]:
        """Milliseconds of `calls` calls in a row."""
        thunk = self.ready.thunks[impl]
        return [self.timer(thunk) for _ in range(calls)]

    def ceilings(self) -> list[float]:
        """FLOP/s of a product, bytes/s of a copy."""
        plain = ceiling_work(self.device, self.case.dtype)
        found = plain.ceilings(interleave(plain.thunks, self.device, Budget(0.0, warmup=1), self.setting.cold))
        return [found.flops_per_s, found.bytes_per_s]

    def rows(self, samples: dict[str, list[float]], ceilings: list[float]) -> list[dict[str, Any]]:
        """Rows of results.jsonl from what this side was found to need."""
        times = {impl: summarise(values) for impl, values in samples.items() if values}
        c = Ceilings(*ceilings)
        return [row(self.case, self.setting, one, self.ready, times.get(one.name), c) for one in self.case.contestants]


def only_staged() -> None:
    """Let an editable install of calm_fast not lend this process what its own revision lacks, e.g. a library."""
    sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]


def main() -> int:
    """Serve until stdin ends. The first line holds Worker's arguments."""
    only_staged()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed must not look like an answer
    worker: Worker | None = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if worker is None:
                worker = Worker(**command)
                answer: Any = {"import": sys.modules["calm_fast"].__file__}
            else:
                answer = getattr(worker, command.pop("do"))(**command)
            text = json.dumps({"ok": answer}, allow_nan=False)
        except Exception as failure:  # noqa: BLE001 - another revision may fail in any way
            text = json.dumps({"failed": f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"})
        answers.write(text + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
