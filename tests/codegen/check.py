"""Compile every Triton kernel for several GPU architectures, without a GPU, and check the machine code.

    python tests/codegen/check.py                 what changed since the record, and a sixteenth of the rest
    python tests/codegen/check.py --all           all kernels, sm_80 sm_90 sm_100; large ones for sm_86 sm_89 sm_120
    python tests/codegen/check.py --arch 90       one architecture
    python tests/codegen/check.py --only decode   kernels whose name contains a word, or all kernels of an op
    python tests/codegen/check.py --update        record today's numbers for the installed Triton, and write the table
    python tests/codegen/check.py --peers         compare with FlexAttention by a model, write docs/ops/peers.md
    python tests/codegen/check.py --table         only write docs/ops/machine_code.md from the record

Each op's `calm_fast.kernels.<op>.codegen.codegen_specs()` names the kernels and representative arguments. Hard facts
(no spills, no float64, tensor cores where promised, shared memory within the limit) hold for every Triton;
registers, SASS size and shared memory are compared with golden/triton-<version>.json if that exists. A kernel whose
source, arguments, Triton and rules are those of its row in the record would compile to the same numbers, so it is
skipped; the sixteenth that is compiled all the same would show a compiler that changed under an unchanged version.
Exit 1 on any problem.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from types import ModuleType
from typing import Any

import golden
import peers

from calm_fast.benchmarks.machine_code import (
    SHARED_LIMIT,
    SMALL_SHARED,
    Facts,
    compile_cubin,
    hard_problems,
    read_facts,
    serialised,
)

PROCESSES = 2
ARCHS = (80, 90, 100)


def clean_environment(cache: str) -> None:
    """Clear the caller's Triton settings, which facts must not depend on: interpreter, old cache, another ptxas."""
    if "triton" in sys.modules:
        raise RuntimeError("Triton was imported before its settings could be cleared")
    for name in [name for name in os.environ if name.startswith("TRITON_")]:
        del os.environ[name]
    os.environ["TRITON_CACHE_DIR"] = cache


def import_specs_module(source: str) -> ModuleType:
    """Import a module by dotted name, or by path if `source` ends in .py."""
    if not source.endswith(".py"):
        return importlib.import_module(source)
    spec = importlib.util.spec_from_file_location(Path(source).stem, source)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def kernel_modules() -> Iterator[str]:
    """Yield the codegen module of every registered op that has Triton kernels."""
    from calm_fast.ops import OPS

    for stem in OPS:
        if importlib.util.find_spec(f"calm_fast.kernels.{stem}") is None:
            print(f"{stem}: no Triton kernels")
        else:
            yield f"calm_fast.kernels.{stem}.codegen"


def named_specs(source: str) -> dict[str, Any]:
    """Return name -> spec of one module. Two specs of one name are an error: one would hide the other."""
    module = import_specs_module(source)
    specs = list(module.codegen_specs())
    by_name = {spec.name: spec for spec in specs}
    if not specs or len(by_name) != len(specs):
        raise ValueError(f"{source}.codegen_specs() must return at least one spec, with distinct names")
    return by_name


def jobs_of(source: str) -> list[tuple[str, str, int]]:
    """Return (module, kernel name, architecture) for each architecture in a spec's `archs`, by default ARCHS.

    Consumer GPUs take the configs of sm_80, so only kernels that might not fit their shared memory are compiled for
    them.
    """
    large = golden.large_kernels()
    jobs = []
    for name, spec in named_specs(source).items():
        archs = getattr(spec, "archs", ARCHS)
        jobs += [(source, name, arch) for arch in (*archs, *(SMALL_SHARED if name in large else ()))]
    return jobs


def examine(source: str, name: str, arch: int) -> tuple[Facts | None, dict[str, Any], list[str], float]:
    """Compile one kernel for one architecture in a worker process: returns facts, numbers, problems and seconds."""
    begin = time.perf_counter()
    spec = named_specs(source)[name]
    try:
        compiled = compile_cubin(spec, arch)
    except Exception as error:  # a kernel that does not compile is a finding, not a crash of the tool
        text = str(error).strip() or repr(error)
        return None, {}, [f"does not compile: {type(error).__name__}: {text[-400:]}"], time.perf_counter() - begin
    facts = read_facts(compiled.cubin, arch, *compiled[1:])
    problems = hard_problems(facts, spec.expectations["tensor_core"]) + serialised(facts)
    now = golden.numbers(facts, spec) | {"source": golden.source(spec, arch)}
    return facts, now, problems, time.perf_counter() - begin


def describe(facts: Facts) -> str:
    matrix = ",".join(sorted({op.split(".")[0] for op in facts.tensor_core})) or "-"
    size = f"{facts.registers:4d} registers {facts.instructions:6d} instructions {facts.shared:7d} B shared"
    return f"{size}  {matrix}"


def compare(name: str, arch: int, now: dict[str, Any], record: golden.Golden) -> list[str]:
    then = record.get(name, {}).get(str(arch))
    if then is None:
        return ["not in the golden record; check the numbers, then run with --update"]
    return golden.growth(now, then)


def run_all(jobs: list[tuple[str, str, int]], record: golden.Golden | None) -> tuple[golden.Golden, int]:
    """Examine all jobs in parallel and print a line for each. Returns today's numbers and the number of failed jobs."""
    today: golden.Golden = {}
    failed = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        futures = {pool.submit(examine, *job): job for job in jobs}
        for done, future in enumerate(as_completed(futures), 1):
            _, name, arch = futures[future]
            facts, now, problems, seconds = future.result()
            if facts:
                today.setdefault(name, {})[str(arch)] = now
                problems = problems + (compare(name, arch, now, record) if record is not None else [])
            failed += bool(problems)
            text = describe(facts) if facts else ""
            print(f"[{done}/{len(jobs)}] {name} sm_{arch} {seconds:5.1f} s {text}", flush=True)
            for problem in problems:
                print(f"    PROBLEM {name} sm_{arch}: {problem}", flush=True)
    return today, failed


def update_record(version: str, today: golden.Golden, kept: golden.Golden, failed: int) -> None:
    """Write today's numbers over those in `kept`, unless a hard fact is broken."""
    if failed:
        print("not recorded: a record is made only when all hard facts hold")
        return
    for name, rows in today.items():
        kept[name] = kept.get(name, {}) | rows
    print(f"recorded in {golden.save(version, kept).name}")
    write_table(version, kept)


def write_table(version: str, record: golden.Golden) -> None:
    golden.PAGE.write_text(golden.page(version, record))
    print(f"written: {golden.PAGE.relative_to(golden.FOLDER.parents[2])}")


def changed(jobs: list[tuple[str, str, int]], record: golden.Golden) -> list[tuple[str, str, int]]:
    """Return the jobs whose row is missing or of another source, and a fixed sixteenth of the others."""
    specs = {source: named_specs(source) for source in dict.fromkeys(job[0] for job in jobs)}
    chosen = []
    for source, name, arch in jobs:
        now = golden.source(specs[source][name], arch)
        if record.get(name, {}).get(str(arch), {}).get("source") != now or now.startswith("0"):
            chosen.append((source, name, arch))
    return chosen


def report_stale(record: golden.Golden, jobs: list[tuple[str, str, int]]) -> int:
    known = {(name, str(arch)) for _, name, arch in jobs}
    stale = sorted(f"{name} sm_{arch}" for name in record for arch in record[name] if (name, arch) not in known)
    for kernel in stale:
        print(f"    PROBLEM {kernel}: in the golden record but no longer compiled; run with --update")
    return len(stale)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED_LIMIT), default=sorted(SHARED_LIMIT))
    parser.add_argument("--only", metavar="WORD", help="kernels whose name contains WORD, or those of the op WORD")
    parser.add_argument("--all", action="store_true", help="compile unchanged kernels too")
    parser.add_argument("--update", action="store_true", help="record today's numbers instead of comparing")
    parser.add_argument("--table", action="store_true", help="write the table from the record and stop")
    parser.add_argument("--peers", action="store_true", help="compare with FlexAttention and write docs/ops/peers.md")
    parser.add_argument("--list", action="store_true", help="print the kernels' names and stop")
    parser.add_argument("--specs", metavar="MODULE", help="take codegen_specs() from this module or .py file only")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="calm-fast-codegen-") as cache:
        clean_environment(cache)
        import triton

        if arguments.peers:
            return 1 if peers.write_page(PROCESSES) else 0
        if arguments.table:
            record = golden.load(triton.__version__)
            if record is None:
                print(f"no table: nothing recorded for Triton {triton.__version__}")
                return 1
            write_table(triton.__version__, record)
            return 0
        sources = [arguments.specs] if arguments.specs else list(kernel_modules())
        every = [job for source in sources for job in jobs_of(source)]
        if arguments.list:
            print("\n".join(f"{name} {arch}" for _, name, arch in every))
            return 0
        word = arguments.only or ""
        jobs = [job for job in every if (word in job[1] or word in job[0].split(".")) and job[2] in arguments.arch]
        full = jobs == every
        own = arguments.specs is None  # kernels from --specs have no record
        record = golden.load(triton.__version__) if own else None
        found = len(jobs)
        if record is not None and not (arguments.all or arguments.update):
            jobs = changed(jobs, record)
            print(f"{found - len(jobs)} of {found} are as recorded and not compiled again (--all compiles them)")
        print(f"{len(jobs)} compilations, Triton {triton.__version__}, {PROCESSES} processes", flush=True)
        today, failed = run_all(jobs, None if arguments.update else record)

    if own and arguments.update:
        update_record(triton.__version__, today, {} if full else record or {}, failed)
    elif own and record is None:
        print(f"golden comparison not available: nothing recorded for Triton {triton.__version__}")
    elif own and full:
        failed += report_stale(record, every)
    verdict = "all facts hold" if not failed else f"{failed} with problems"
    if not found:
        verdict = f"nothing to compile: no kernel or op matches {word!r}, see --list"
    print(f"codegen: {len(jobs)} compilations in {time.perf_counter() - begin:.0f} s, {verdict}")
    return 1 if failed or not found else 0


if __name__ == "__main__":
    raise SystemExit(main())
