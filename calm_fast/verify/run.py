"""The runner of `calm-fast verify`: every op and every implementation that can run here against float64.

Without a GPU, Triton's part runs in a fresh process with TRITON_INTERPRET=1, because Triton reads that variable when it
is imported. That process sends its rows back as JSON lines.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from calm_fast.core.dispatch import triton_obstacle
from calm_fast.core.files import write_json
from calm_fast.core.numerics import Case, OpCases, Row, judge, truth_of
from calm_fast.ops import INTERNAL_OPS, OPS
from calm_fast.verify import emulation
from calm_fast.verify.cases import op_cases

EMULATED = "cuda, emulated on the CPU"
ALL_OPS = (*OPS, *INTERNAL_OPS)


@dataclass(frozen=True)
class Part:
    """One op with one implementation on one device. `skipped` is the reason why it does not run, or ""."""

    op: str
    impl: str
    device: str
    skipped: str = ""
    interpreted: bool = False

    @property
    def emulated(self) -> bool:
        """True if the CPU emulation runs the CUDA kernels (calm_fast/verify/emulation.py)."""
        return self.device == EMULATED

    def __str__(self) -> str:
        return f"{self.op} x {self.impl} ({self.device}{', Triton interpreter' if self.interpreted else ''})"


def plan(ops: Sequence[str] = ALL_OPS, impls: Sequence[str] = ()) -> list[Part]:
    """Return the parts to verify on this machine, including those that cannot run.

    Args:
        ops: names of ops.
        impls: names of implementations; () = all that the cases of an op name.
    Raises:
        ValueError: an unknown name.
    """
    for op in ops:
        if op not in ALL_OPS:
            raise ValueError(f"verify: `op` must be one of {', '.join(map(repr, ALL_OPS))}, got {op!r}")
    known = sorted({name for op in ops for name in op_cases(op).impls} | {"reference"})
    for impl in impls:
        if impl not in known:
            raise ValueError(f"verify: `impl` must be one of {', '.join(map(repr, known))}, got {impl!r}")
    gpu = torch.cuda.is_available()
    devices = ["cpu", "cuda"] if gpu else ["cpu"]
    parts = []
    for op in ops:
        for impl in impls or op_cases(op).impls:
            if impl == "triton":
                parts.append(_triton_part(op, gpu))
            elif impl == "native":
                parts += [Part(op, impl, device, _native_obstacle(op, device) or "") for device in devices]
                if emulation.has_kernels(op):
                    parts.append(Part(op, impl, EMULATED, emulation.obstacle(op) or ""))
            else:
                parts += [Part(op, impl, device) for device in devices]
    return parts


def _native_obstacle(op: str, device: str) -> str | None:
    from calm_fast.core import native_library

    own = getattr(op_cases(op), "obstacle", None)
    return native_library.obstacle(op, device) or (own("native", device) if own else None)


def _triton_part(op: str, gpu: bool) -> Part:
    why = triton_obstacle(torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")) or ""
    if not gpu and "TRITON_INTERPRET" in why:
        why = ""  # the fresh process sets it
    return Part(op, "triton", "cuda" if gpu else "cpu", why, interpreted=not gpu)


def cases_of(part: Part) -> list[Case]:
    """Return the cases that the part's implementation should run."""
    ops = op_cases(part.op)
    fits = getattr(ops, "fits", None)
    device = "cuda" if part.emulated else part.device
    return [case for case in ops.cases() if fits is None or fits(case, part.impl, device)]


def case_count(part: Part) -> int:
    """Return the number of cases that the part runs."""
    return 0 if part.skipped else len(cases_of(part))


def run_part(part: Part) -> Iterator[Row]:
    """Yield the rows of one part as they are computed. A crash of the implementation is a failed row."""
    if part.skipped:
        return
    if part.interpreted and os.environ.get("TRITON_INTERPRET") != "1":
        yield from _in_fresh_process(part)
        return
    if part.emulated:
        yield from _emulated_rows(part)
        return
    ops, device = op_cases(part.op), torch.device(part.device)
    for case in cases_of(part):
        yield from _run_case(ops, case, part.impl, device)


def _emulated_rows(part: Part) -> Iterator[Row]:
    """Run each case on one of the schedules, in turn. A case that the kernels do not serve gives no row."""
    ops, run = op_cases(part.op), emulation.adapter(part.op).run
    for i, case in enumerate(cases_of(part)):
        inputs = ops.build(case, torch.device("cpu"))
        truth = truth_of(ops, inputs, case.dtype)
        note = ""
        try:
            actual = run(inputs, emulation.SCHEDULES[i % len(emulation.SCHEDULES)])
        except emulation.EmulationError as problem:
            actual, note = {}, str(problem)[:300]
        if actual is None:
            continue
        if actual:  # the kernels may compute the forward only
            truth = replace(truth, values={name: truth.values[name] for name in actual})
        rows = judge(case, part.impl, torch.device("cpu"), actual, truth)
        yield from (replace(row, device=part.device, note=note or row.note) for row in rows)


def _run_case(ops: OpCases, case: Case, impl: str, device: torch.device) -> list[Row]:
    inputs = ops.build(case, device)
    truth = truth_of(ops, inputs, case.dtype)
    try:
        actual = ops.run(inputs, impl)
    except Exception as problem:  # any exception of an implementation counts as its failure
        rows = judge(case, impl, device, {}, truth)
        return [replace(row, note=f"{type(problem).__name__}: {str(problem)[:200]}") for row in rows]
    return judge(case, impl, device, actual, truth)


def _in_fresh_process(part: Part) -> Iterator[Row]:
    command = [sys.executable, "-m", "calm_fast.verify.run", part.op, part.impl]
    # one thread: the interpreter works on tiny tensors, where a second thread only waits
    env = {"OMP_NUM_THREADS": "1", **os.environ, "TRITON_INTERPRET": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env) as process:
            assert process.stdout is not None  # it is a pipe
            for line in process.stdout:
                if line.startswith("{"):
                    yield Row(**json.loads(line))
        if process.returncode != 0:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["no message"])[-1]
            note = f"the fresh process ended with exit code {process.returncode}: {last}"
            yield Row(part.op, "-", part.impl, part.device, "-", "-", math.inf, 0.0, False, note)


def worker(op: str, impl: str) -> None:
    """Run one part in the fresh process; print one JSON line per row."""
    for row in run_part(Part(op, impl, "cpu", interpreted=impl == "triton")):
        print(json.dumps(asdict(row)), flush=True)


def summary(parts: Sequence[Part], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return one record per part: verdict, cases, failures, and the row closest to its bound or farthest above it."""
    records = []
    for part in parts:
        own = [r for r in rows if (r.op, r.impl, r.device) == (part.op, part.impl, part.device)]
        worst = max(own, key=lambda r: (not r.ok, r.ratio), default=None)
        failed = sum(not r.ok for r in own)
        # a part that ran without giving a row has verified nothing
        verdict = "not run" if part.skipped else "FAIL" if failed or not own else "ok"
        records.append(
            {"op": part.op, "impl": part.impl, "device": part.device, "verdict": verdict, "why": part.skipped,
             "cases": len({(r.case, r.dtype) for r in own}), "rows": len(own), "failed": failed, "worst": worst}
        )  # fmt: skip
    return records


def verify(
    ops: Sequence[str] = ALL_OPS, impls: Sequence[str] = (), json_file: Path | None = None, every_row: bool = True
) -> int:
    """Run every part, print the tables, and return the exit code: 0 if all rows are within their bounds, else 1."""
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from calm_fast.verify.report import console, print_rows, print_summary

    begin = time.perf_counter()
    parts, rows = plan(ops, impls), []
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(), transient=True) as progress:
        for part in parts:
            task, seen = progress.add_task(str(part), total=case_count(part)), set()
            for row in run_part(part):
                rows.append(row)
                seen.add((row.case, row.dtype))
                progress.update(task, completed=len(seen))
    records = summary(parts, rows)
    if json_file is not None:
        write_rows(json_file, rows)
    print_rows(rows if every_row else [r for r in rows if not r.ok])
    print_summary(records, time.perf_counter() - begin)
    ran = [r for r in records if r["verdict"] != "not run"]
    if not ran:
        console().print("[red]nothing ran, so nothing is verified[/red]")
    return 0 if ran and all(r["verdict"] == "ok" for r in ran) else 1


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    """Write all rows as a JSON list. An infinite error is null, because JSON has no infinity."""
    plain = [{k: None if v == math.inf else v for k, v in asdict(row).items()} for row in rows]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, plain)


if __name__ == "__main__":
    worker(*sys.argv[1:3])
