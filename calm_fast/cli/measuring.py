"""`calm-fast verify | bench`: how right and how fast the ops are on this machine."""

from __future__ import annotations

import contextlib
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from calm_fast.cli.common import folder


class Suite(str, Enum):
    """The suites of `bench`."""

    quick = "quick"
    full = "full"
    never_slower = "never-slower"


class Memory(str, Enum):
    """The source of memory for CPU tensors in `bench`: kept from earlier calls, or from the system."""

    kept = "kept"
    system = "system"


class Lane(str, Enum):
    """The widest SIMD instructions that `bench` measures with; auto: this CPU's own."""

    auto = "auto"
    scalar = "scalar"
    avx2 = "avx2"
    avx512 = "avx512"
    avx512_bf16 = "avx512_bf16"


def verify(
    impl: Annotated[list[str] | None, typer.Option(help="An implementation; repeat for several. Default: all.")] = None,
    op: Annotated[list[str] | None, typer.Option(help="An op; repeat for several. Default: all.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Also write every row to this file.")
    ] = None,
    brief: Annotated[bool, typer.Option("--brief", help="Print only failed rows and the summary.")] = False,
) -> None:
    """Check every op with every implementation that can run here against the float64 reference.

    Exit code 1 if any quantity exceeds its bound. Without a GPU, Triton kernels run in Triton's CPU interpreter, in a
    fresh process. From a source checkout with g++, CUDA kernels run in the CPU emulation.
    """
    with contextlib.nullcontext() if json_file is None else folder(json_file.parent):
        from calm_fast.verify import run

        ops, impls = op or run.ALL_OPS, impl or ()
        try:
            run.plan(ops, impls)
        except ValueError as problem:
            raise typer.BadParameter(str(problem)) from problem
        raise typer.Exit(run.verify(ops, impls, json_file, every_row=not brief))


def bench(
    suite: Annotated[
        Suite, typer.Option(help="quick: minutes; full: more cases; never-slower: hundreds of shapes.")
    ] = Suite.quick,
    op: Annotated[list[str] | None, typer.Option(help="An op; repeat for several. Default: all.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl, report.md and report.html.")] = Path("bench_out"),
    compare: Annotated[str | None, typer.Option(metavar="REV", help="A git revision to time beside this one.")] = None,
    memory: Annotated[
        Memory | None,
        typer.Option(help="CPU: keep released memory for the next call, or give it back. Default: kept with glibc."),
    ] = None,
    lane: Annotated[
        Lane,
        typer.Option(help="CPU: measure as with no wider SIMD instructions than these, in torch too."),
    ] = Lane.auto,
) -> None:
    """Measure speed and memory against strong baselines on this machine.

    More options: python -m calm_fast.benchmarks.run --help. Exit code 1 if an implementation gives a wrong result; with
    --compare, exit code 3 if this checkout is slower than REV.
    """
    with folder(out):
        from calm_fast.benchmarks.run import main as run_main

        chosen = [word for name in op or () for word in ("--op", name)]
        chosen += ["--compare", compare] if compare is not None else []
        chosen += ["--memory", memory.value] if memory is not None else []
        raise typer.Exit(run_main(["--suite", suite.value, "--out", str(out), "--lane", lane.value, *chosen]))
