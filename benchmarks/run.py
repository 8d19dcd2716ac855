"""Measure ops against strong baselines on this machine: `python -m calm_fast.benchmarks.run --op cross_attention`.

Writes results.jsonl (one row per case and implementation), report.md and report.html, and prints a table with ratios.
The exit code is 1 if an implementation computes wrong values; such an implementation has no time. With --compare REV
the same cases run on another revision side by side.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from calm_fast.benchmarks import lanes, machine, memory, never_slower
from calm_fast.benchmarks.measure import Setting, is_red, measure
from calm_fast.benchmarks.registry import REGISTRY, SUITES, Case, cases
from calm_fast.benchmarks.timing import Budget, Ceilings

_SECONDS = {"quick": 4.0, "full": 40.0}
_SUMMARY = "Measure ops against strong baselines on this machine."


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; `calm-fast bench` passes its options on to it."""
    p = argparse.ArgumentParser(prog="python -m calm_fast.benchmarks.run", description=_SUMMARY)
    p.add_argument("--op", action="append", choices=list(REGISTRY), help="an op; repeat for several (default: all)")
    p.add_argument(
        "--suite", choices=(*SUITES, never_slower.SUITE), default="quick",
        help="quick: minutes; full: more cases and baselines; never-slower: a few hundred shapes on a CPU, to find one "
        "where `auto` is slower than the best baseline (about twelve minutes, rows in never_slower.jsonl)",
    )  # fmt: skip
    p.add_argument("--case", action="append", help="only cases whose name contains this; repeat for several")
    p.add_argument("--out", type=Path, default=Path("bench_out"), help="folder for results (default: bench_out)")
    p.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default: 1)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument(
        "--lane", choices=lanes.CHOICES, default=lanes.AUTO,
        help="measure as on a CPU whose widest SIMD instructions these are: calm_fast, torch and numpy (default: this "
        "CPU's own)",
    )  # fmt: skip
    usual = ", ".join(f"{seconds:g} {suite}" for suite, seconds in _SECONDS.items())
    p.add_argument(
        "--seconds", type=float, help=f"timing budget per case; close results may take twice as long (default: {usual})"
    )
    p.add_argument("--cold", action="store_true", help="overwrite a CPU's caches before each call (a GPU's always are)")
    p.add_argument(
        "--memory", choices=memory.CHOICES,
        help="keep the CPU memory that a call releases for the next call, or return it to the system (default: kept "
        "where the C library is glibc)",
    )  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="seed of the random inputs (default: 0)")
    p.add_argument(
        "--compare", metavar="REV",
        help="time this checkout and git revision REV side by side, with this checkout's cases; REV may have the older "
        "layout (calm_fast/ops/<op>.py, kernels/fused); exit 3 if this checkout is slower, 2 if nothing was compared",
    )  # fmt: skip
    p.add_argument("--commit", help="commit to record in the rows if the files are not a git checkout")
    p.add_argument("--list", action="store_true", help="print the cases and exit")
    return p


def select(ops: Sequence[str] | None, device: torch.device, suite: str, words: Sequence[str] | None) -> list[Case]:
    """Return the cases of `ops` (None: all) whose name contains one of `words` (None: all)."""
    of = never_slower.cases if suite == never_slower.SUITE else partial(cases, device=device, suite=suite)
    found = [case for op in ops or REGISTRY for case in of(op)]
    return [case for case in found if not words or any(word in case.name for word in words)]


def run(chosen: Sequence[Case], setting: Setting, out: Path) -> tuple[list[dict[str, Any]], dict[str, Ceilings]]:
    """Measure `chosen`; each case's rows are written as soon as it is done, so a run may be interrupted.

    Returns:
        all rows, and each case's ceilings.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from calm_fast.benchmarks import report

    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    ceilings: dict[str, Ceilings] = {}
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with (
        contextlib.ExitStack() as last,
        (out / "results.jsonl").open("w") as sink,
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
    ):
        last.callback(lambda: report.write(out, rows, ceilings, chosen))  # after an interruption too
        bar = progress.add_task("", total=len(chosen))
        for case in chosen:
            fresh, ceilings[case.name] = measure(
                case, setting, lambda text: progress.update(bar, description=text, refresh=True)
            )
            for row in fresh:
                sink.write(json.dumps(row, allow_nan=False) + "\n")
            sink.flush()
            rows += fresh
            report.write(out, rows, ceilings, chosen, plots=False)  # drawing takes seconds
            progress.advance(bar)
    return rows, ceilings


def _compare(args: argparse.Namespace, chosen: Sequence[Case], device: torch.device) -> int:
    """Run `--compare`. Return 3 if this checkout is slower, 1 if it is wrong, 2 if nothing could be compared."""
    from calm_fast.benchmarks import compare
    from calm_fast.benchmarks.report import comparison

    seconds = args.seconds if args.seconds is not None else _SECONDS[args.suite]
    worker = {
        "device": device.type,
        "threads": args.threads,
        "cold": args.cold,
        "seed": args.seed,
        "memory": args.memory,
        "lane": args.lane,
    }
    try:
        pairs, rows = compare.compare(
            chosen, args.suite, args.compare, Budget(seconds, min_rounds=7), worker, args.out,
            lambda text: print(f"[compare] {text}", file=sys.stderr, flush=True),
        )  # fmt: skip
    except compare.CompareError as problem:
        print(f"bench: {problem}", file=sys.stderr)
        return 2
    comparison.show(pairs)
    print(f"rows: {args.out / 'results.jsonl'}   report: {args.out / 'report.html'}")
    if any(is_red(row) for row in rows if row["commit"] == rows[0]["commit"]):
        return 1
    ours = [p for p in pairs if not p.control]
    if ours and all(p.ratio is None for p in ours):
        print(f"bench: --compare {args.compare}: no implementation ran on both sides", file=sys.stderr)
        return 2
    return 3 if any(p.verdict == compare.SLOWER for p in ours) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: sys.argv) and return the exit code."""
    args = parser().parse_args(argv)
    if lanes.must_start_again(args.lane):
        return lanes.start_again(args.lane, sys.argv[1:] if argv is None else argv)
    has_gpu = torch.cuda.is_available()
    if args.device == "cuda" and not has_gpu:
        print(f"bench: --device cuda: torch {torch.__version__} sees no GPU", file=sys.stderr)
        return 2
    sweep = args.suite == never_slower.SUITE
    if sweep and (args.device == "cuda" or args.compare):
        print(f"bench: --suite {args.suite} sweeps a CPU: leave out --device cuda and --compare", file=sys.stderr)
        return 2
    device = torch.device("cuda" if has_gpu and args.device != "cpu" and not sweep else "cpu")
    torch.set_num_threads(args.threads)
    chosen = select(args.op, device, args.suite, args.case)
    if args.list or not chosen:
        for case in chosen:
            print(f"{case.op}  {case.name}  {dict(case.shape)}  {', '.join(c.name for c in case.contestants)}")
        if not chosen:
            print(f"bench: no case matches --case {args.case} on {device.type}; --list prints them", file=sys.stderr)
        return 0 if chosen else 2
    if args.memory == memory.KEPT and device.type == "cpu" and (reason := memory.obstacle()):
        print(f"bench: --memory kept: {reason}", file=sys.stderr)
        return 2
    lane = None
    if device.type == "cpu":
        try:
            lane = lanes.settle(args.lane)
        except lanes.LaneError as problem:
            print(f"bench: --lane {args.lane}: {problem}", file=sys.stderr)
            return 2
    if args.compare:
        return _compare(args, chosen, device)
    source = memory.settle(device, args.memory)
    if source and args.memory is None:
        print(f"bench: {source}: {memory.obstacle()}", file=sys.stderr)
    seconds = args.seconds if args.seconds is not None else _SECONDS.get(args.suite, 0.0)
    budget = Budget(seconds, warmup=3 if device.type == "cuda" else 0)  # all ran once already, for their peak memory
    forced = f"lane {lane}" if args.lane != lanes.AUTO else ""
    name = machine.device_name(device, source, "cold cache" if args.cold and device.type == "cpu" else "", forced)
    commit = args.commit or machine.commit()
    setting = Setting(device, name, machine.versions(), commit, budget, args.seed, args.cold or None, lane)
    if sweep:
        return never_slower.run(chosen, setting, args.out)
    rows, ceilings = run(chosen, setting, args.out)

    from calm_fast.benchmarks import report

    report.show(rows, ceilings, chosen)
    print(f"rows: {args.out / 'results.jsonl'}   report: {args.out / 'report.html'}")
    red = [row for row in rows if is_red(row)]
    for row in red:
        print(f"RED {row['case']} {row['impl']}: {row['failure']}", file=sys.stderr)
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
