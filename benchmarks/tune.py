"""Measure launch configs on this GPU and write the best: `python -m calm_fast.benchmarks.tune`.

Candidates are compiled first, in several processes and without touching the GPU. Those that spill, do not fit into
shared memory or miss the tensor cores are ruled out (the checks of `make codegen`). A remaining candidate must agree
with the present config before its time counts. `calm_fast.core.launch_config` looks configs up in the written file.

    ... tune --dry-run              lists the candidates and the longest time they take; needs no GPU
    ... tune --dry-run --screen 90  also compiles them for sm_90 and says which are ruled out, and why
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from calm_fast.benchmarks import machine
from calm_fast.benchmarks.measure import relative_error
from calm_fast.benchmarks.timing import Budget, interleave
from calm_fast.benchmarks.tune_problems import OPS, Problem, Run, problems
from calm_fast.benchmarks.tune_screen import Screen
from calm_fast.core.launch_config import LaunchConfig, gpu_slug

_TOLERANCE = 1e-2  # bf16 results of two tilings differ by rounding, about 1e-3
_BUDGET = Budget(seconds=0.4, min_rounds=5, max_rounds=40)
_FIRST = (128, 4096, 32)  # the most common depths: of a head, of hidden states, of two adapters
# longest seconds, for the estimate: compiling and disassembling one candidate; timing one; inputs and finalists
_COMPILE, _TIME, _PROBLEM = 6.0, 0.5, 4.0
Job = tuple[str, int, Problem]  # op, number of its problem, the problem
Entry = dict[str, Any]  # an entry of a tuned file, see calm_fast.core.launch_config


def best_config(
    run: Run, present: LaunchConfig, tried: Iterable[LaunchConfig], device: torch.device, deadline: float
) -> tuple[LaunchConfig, float, float]:
    """Return the fastest of `present` and `tried` that agrees with `present`.

    Args:
        run: launches with a config and returns results.
        present: the config in use.
        tried: candidates.
        device: where `run` launches.
        deadline: time.monotonic() after which no new candidate is tried.
    Returns:
        config, its milliseconds, the present config's milliseconds (the finalists are measured in turns).
    """
    expected = {name: t.clone() for name, t in run(present).items()}
    survivors: dict[LaunchConfig, float] = {}
    for config in tried:
        if time.monotonic() > deadline:
            break
        if config == present:
            continue
        try:
            if relative_error(run(config), expected) > _TOLERANCE:
                print(f"  wrong result, ignored: {config}", file=sys.stderr)
                continue
            pair = {"present": partial(run, present), "new": partial(run, config)}
            times = interleave(pair, device, Budget(0.1, 3, 10))
        except Exception as failure:  # noqa: BLE001 - compilers and launches fail in many ways, each rules out one
            print(f"  {type(failure).__name__}, ignored: {config}", file=sys.stderr)
            continue
        survivors[config] = times["new"].ms / times["present"].ms
    finalists = [present, *sorted(survivors, key=lambda config: survivors[config])[:3]]
    times = interleave({str(c): partial(run, c) for c in finalists}, device, _BUDGET)
    winner = min(finalists, key=lambda c: times[str(c)].ms)
    return winner, times[str(winner)].ms, times[str(present)].ms


def jobs(ops: Sequence[str]) -> list[Job]:
    """Return every problem, the most used depth of every op first because the time may run out."""
    found = [(op, index, problem) for op in ops for index, problem in enumerate(problems((op,)))]
    return sorted(found, key=lambda job: job[2].depth not in _FIRST)  # stable: otherwise in the order of the ops


def candidates_beside(problem: Problem, present: LaunchConfig) -> list[LaunchConfig]:
    """Return the candidates other than the present config."""
    return [config for config in problem.candidates if config != present]


def estimate(todo: Sequence[Job], processes: int) -> float:
    """Return the longest seconds of measuring everything; compilation continues while earlier problems are timed."""
    candidates = sum(len(problem.candidates) for _, _, problem in todo)
    return max(candidates * _COMPILE / processes, candidates * _TIME) + len(todo) * _PROBLEM


def dry_run(todo: Sequence[Job], processes: int, seconds: float, arch: int | None) -> int:
    """Print the candidates; with `arch`, compile them and print which are ruled out. Returns 1 if none is left."""
    screen = Screen(arch, processes) if arch else None
    empty = total = 0
    if screen:
        _submit(screen, todo)
    for op, index, problem in todo:
        good = []
        print(f"{problem.name}: {len(problem.candidates)} candidates")
        for config in problem.candidates:
            wrong = screen.problems_of(op, index, config) if screen else []
            good += [] if wrong else [config]
            if wrong or not screen:
                print(f"  {config}" + (f"  out: {'; '.join(wrong)}" if wrong else ""), flush=True)
        if screen:
            print(f"  {len(good)} are worth timing: {'; '.join(map(str, good))}", flush=True)
        empty += not good
        total += len(problem.candidates)
    if screen:
        screen.close()
    most = estimate(todo, processes)
    print(f"{len(todo)} kernels and shapes, {total} candidates; at most {min(most, seconds):.0f} s", end="")
    print(f" ({most:.0f} s for all of them with {processes} processes, --seconds {seconds:.0f})")
    return 1 if empty else 0


def _submit(screen: Screen, todo: Sequence[Job]) -> None:
    for op, index, problem in todo:
        for config in problem.candidates:
            screen.submit(op, index, config)


def _survivors(
    screen: Screen, op: str, index: int, configs: Iterable[LaunchConfig], deadline: float
) -> Iterator[LaunchConfig]:
    """Yield the configs worth timing, as they are compiled; ends at the deadline."""
    for config in configs:
        try:
            wrong = screen.problems_of(op, index, config, max(0.0, deadline - time.monotonic()))
        except futures.TimeoutError:  # Python 3.10: not the built-in one
            return
        if not wrong:
            yield config


def tune(
    todo: Sequence[Job], device: torch.device, deadline: float, processes: int
) -> Iterator[tuple[str, list[Entry]]]:
    """Measure; yields (op, entries) of each complete group of problems.

    A group that the deadline cuts short is left out: of two numbers of tokens, the measured one would be used for the
    other as well.
    """
    from calm_fast.kernels.common import hardware
    from calm_fast.kernels.common.config_table import measured_config

    gpu = hardware.gpu(device)
    screen = Screen(gpu.arch, processes)
    _submit(screen, todo)
    groups: dict[tuple[str, str], list[Entry]] = {}
    for op, index, problem in todo:
        if time.monotonic() > deadline:
            print(f"out of time before {problem.name}", file=sys.stderr)
            break
        place = (op, problem.part, gpu, torch.bfloat16, problem.depth, problem.shape)
        found = measured_config(problem.kind, *place)
        present = found or problem.default(gpu.arch)
        run = problem.prepare(device)
        configs = _survivors(screen, op, index, candidates_beside(problem, present), deadline)
        config, ms, before = best_config(run, present, configs, device, deadline)
        print(f"{problem.name}: {before:.3f} ms -> {ms:.3f} ms  {config}", flush=True)
        entry: Entry = {"part": problem.part, "dtype": "bfloat16", "head_dim": problem.depth, "shape": problem.shape}
        entry |= {"config": asdict(config), "ms": round(ms, 4), "ms_before": round(before, 4)}
        key = (op, problem.group or problem.name)
        groups.setdefault(key, []).append(entry)
        if len(groups[key]) == sum((o, p.group or p.name) == key for o, _, p in todo):
            yield op, groups.pop(key)
    screen.close()


def merge(old: Sequence[Entry], new: Sequence[Entry]) -> list[Entry]:
    """Return the entries of a tuned file: new ones replace old ones of the same part, dtype, head dim and shape."""

    def key(entry: Entry) -> tuple[Any, ...]:
        return entry["part"], entry["dtype"], entry["head_dim"], tuple(sorted(entry["shape"].items()))

    merged = {key(entry): entry for entry in (*old, *new)}
    return [merged[k] for k in sorted(merged)]


def write(folder: Path, op: str, gpu: str, entries: Sequence[Entry]) -> Path:
    """Merge entries into folder/<op>/tuned/<gpu>.json; returns its path."""
    path = folder / op / "tuned" / f"{gpu_slug(gpu)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text())["entries"] if path.is_file() else []
    document = {"op": op, "gpu": gpu, "versions": machine.versions(), "entries": merge(old, entries)}
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Tune `--op` within `--seconds` and merge into OUT/<op>/tuned/<gpu>.json; returns the exit code."""
    p = argparse.ArgumentParser(prog="python -m calm_fast.benchmarks.tune", description=__doc__.splitlines()[0])
    p.add_argument("--op", action="append", choices=OPS, help="an op; repeat for several (default: all)")
    p.add_argument("--seconds", type=float, default=270.0, help="after this long no new candidate is tried")
    p.add_argument("--out", type=Path, default=Path("kernels"), help="folder that holds <op>/tuned/<gpu>.json")
    p.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="processes that compile")
    p.add_argument("--dry-run", action="store_true", help="list the candidates and the longest time they take")
    p.add_argument("--screen", type=int, metavar="ARCH", choices=(80, 90, 100), help="with --dry-run: compile for it")
    args = p.parse_args(argv)
    todo = jobs(args.op or OPS)
    if args.dry_run:
        return dry_run(todo, args.processes, args.seconds, args.screen)
    if not torch.cuda.is_available():
        print(f"tune: torch {torch.__version__} sees no GPU", file=sys.stderr)
        return 2
    device, written = torch.device("cuda"), 0
    for op, entries in tune(todo, device, time.monotonic() + args.seconds, args.processes):
        path = write(args.out, op, torch.cuda.get_device_name(device), entries)  # at once: a run may be stopped
        print(f"  written to {path}", flush=True)
        written += len(entries)
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
