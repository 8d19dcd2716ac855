"""One side of `bench --compare`: a process that holds one revision's contestants and times them on command.

Commands and answers are JSON, one per line, on stdin and stdout. `compare` is the other end.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import replace
from typing import Any

import torch

from calm_fast.benchmarks import lanes, machine, older_layout
from calm_fast.benchmarks.measure import Ready, Setting, ready, row
from calm_fast.benchmarks.memory import settle
from calm_fast.benchmarks.registry import Case, cases
from calm_fast.benchmarks.timing import Budget, Ceilings, Timer, ceiling_work, interleave, summarise


def rivals(case: Case) -> list[str]:
    """Return the names compared: ours, and the first baseline as a control, which is the same code on both sides."""
    ours = [c.name for c in case.contestants if c.ours]
    return ours + [c.name for c in case.contestants if not c.ours and not c.yardstick][:1]


class Worker:
    """Answers commands and holds one case at a time."""

    def __init__(
        self, device: str, threads: int, cold: bool, seed: int, commit: str, memory: str | None = None,
        lane: str = lanes.AUTO,
    ) -> None:  # fmt: skip
        torch.set_num_threads(threads)
        self.device = torch.device(device)
        own_lane = lanes.settle(lane) if device == "cpu" else None
        source = settle(self.device, memory)
        name = machine.device_name(self.device, source, "cold cache" if cold and device == "cpu" else "")
        self.setting = Setting(self.device, name, machine.versions(), commit, Budget(), seed, cold or None, own_lane)
        self.timer = Timer(self.device, cold or None)
        self.case: Case | None = None
        self.ready: Ready | None = None

    def open(self, op: str, name: str, suite: str) -> dict[str, Any]:
        """Check and prepare a case. Return the contestants that can be timed, and the failures of the others."""
        self.case = self.ready = None
        gc.collect()
        (found,) = (case for case in cases(op, self.device, suite) if case.name == name)
        keep = rivals(found)
        self.case = replace(found, contestants=[c for c in found.contestants if c.name in keep])
        self.ready = ready(self.case, self.setting)
        return {"can": list(self.ready.thunks), "failures": self.ready.failures}

    def opened(self) -> tuple[Case, Ready]:
        """Return the open case.

        Raises:
            RuntimeError: no case is open.
        """
        if self.case is None or self.ready is None:
            raise RuntimeError("compare: no case is open: send `open` first")
        return self.case, self.ready

    def time(self, impl: str, calls: int) -> list[float]:
        """Return the milliseconds of `calls` calls in a row."""
        thunk = self.opened()[1].thunks[impl]
        return [self.timer(thunk) for _ in range(calls)]

    def ceilings(self) -> list[float]:
        """Return the FLOP/s of a product and the bytes/s of a copy."""
        plain = ceiling_work(self.device, self.opened()[0].dtype)
        found = plain.ceilings(interleave(plain.thunks, self.device, Budget(0.0, warmup=1), self.setting.cold))
        return [found.flops_per_s, found.bytes_per_s]

    def rows(self, samples: dict[str, list[float]], ceilings: list[float]) -> list[dict[str, Any]]:
        """Return the rows of results.jsonl for this side's measured milliseconds."""
        case, prepared = self.opened()
        times = {impl: summarise(values) for impl, values in samples.items() if values}
        c = Ceilings(ceilings[0], ceilings[1])
        return [row(case, self.setting, one, prepared, times.get(one.name), c) for one in case.contestants]


def only_staged() -> None:
    """Keep an editable install of calm_fast from lending this process files that its own revision lacks."""
    sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]


def main() -> int:
    """Serve until stdin ends. The first line holds Worker's arguments."""
    only_staged()
    older_layout.bridge()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # other output must not look like an answer
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
