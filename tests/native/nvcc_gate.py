"""Compile every CUDA source of csrc/ with nvcc, without a GPU, and check the sizes that ptxas reports for each kernel.

    python tests/native/nvcc_gate.py                 all of csrc/*/*_cuda.cu, sm_80 sm_90a sm_100a
    python tests/native/nvcc_gate.py --only vote     only files whose path contains a word
    python tests/native/nvcc_gate.py --update        record the current sizes for the installed CUDA

The files are compiled whole but not linked, including the host code against torch's stable headers, which a CPU build
of torch has. Errors are any warning of the compiler or ptxas, hence every spill, a stack frame, and more registers or
shared memory than golden/cuda-<version>.json allows. Without nvcc nothing is checked; the script says so and returns 0.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).resolve().parent / "golden"
ARCHITECTURES = ("80", "90a", "100a")
REGISTER_SLACK = 8  # one allocation granule per thread
PROCESSES = 2

Sizes = dict[str, int]
Record = dict[str, dict[str, Sizes]]  # kernel -> architecture -> registers, shared, stack

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_PROBLEM = re.compile(r"\b(?:error|warning|fatal)\b", re.IGNORECASE)


@dataclass
class Outcome:
    """The result of compiling one file: sizes by (kernel, architecture), and problems."""

    file: Path
    sizes: dict[tuple[str, str], Sizes] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def find_nvcc() -> str | None:
    """Return nvcc of CUDA_HOME, of PATH or of /usr/local/cuda, or None if there is none."""
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] if home else []
    candidates += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    return next((c for c in candidates if c and os.access(c, os.X_OK)), None)


def cuda_version(nvcc: str) -> str:
    """Return the release of nvcc, e.g. "13.0"."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release ([\d.]+)", text)
    return found.group(1) if found else "unknown"


def known_architectures(nvcc: str) -> list[str]:
    """Return those of ARCHITECTURES that this nvcc can compile for."""
    codes = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    # lists of older releases leave out the "a" targets
    return [arch for arch in ARCHITECTURES if f"sm_{arch}" in codes or f"sm_{arch.rstrip('a')}" in codes]


def command(nvcc: str, architectures: list[str], source: Path, output: Path) -> list[str]:
    """The nvcc call: setup.py's flags for device code, with every warning of ptxas an error."""
    import torch

    includes = [f"-I{ROOT / 'csrc'}", "-isystem", str(Path(torch.__file__).parent / "include")]
    defines = ["-DUSE_CUDA", "-DCALM_FAST_CUDA_MODULE", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"]
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    strict = ["-Xptxas=-v,-warn-spills,-warn-lmem-usage,-Werror", "-Werror=all-warnings", "-Xcompiler=-Wall"]
    flags = ["-c", "-O3", "-std=c++20", "--expt-relaxed-constexpr"]
    return [nvcc, *flags, *defines, *includes, *targets, *strict, str(source), "-o", str(output)]


def demangled(names: list[str]) -> dict[str, str]:
    """Return readable names, or the mangled ones if c++filt is missing."""
    if not names or shutil.which("c++filt") is None:
        return {name: name for name in names}
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    readable = [re.sub(r"^void |\(.*\)$", "", line) for line in done.stdout.splitlines()]
    return dict(zip(names, readable, strict=True))


def parse(log: str) -> dict[tuple[str, str], Sizes]:
    """Read ptxas -v: (kernel, architecture) -> registers, and shared memory, stack and spills in bytes."""
    found: dict[tuple[str, str], Sizes] = {}
    entry = None
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            entry = (match.group(1), match.group(2))
            found[entry] = {"registers": 0, "shared": 0, "stack": 0, "spills": 0}
        elif entry and (match := _STACK.search(line)):
            found[entry]["stack"] = int(match.group(1))
            found[entry]["spills"] = int(match.group(2)) + int(match.group(3))
        elif entry and (match := _USED.search(line)):
            shared = _SHARED.search(line)
            found[entry] |= {"registers": int(match.group(1)), "shared": int(shared.group(1)) if shared else 0}
    names = demangled(sorted({name for name, _ in found}))
    return {(names[name], arch): sizes for (name, arch), sizes in found.items()}


def examine(nvcc: str, architectures: list[str], source: Path) -> Outcome:
    """Compile one file for all architectures."""
    begin, outcome = time.perf_counter(), Outcome(source)
    with tempfile.TemporaryDirectory() as folder:
        call = command(nvcc, architectures, source, Path(folder) / "object.o")
        done = subprocess.run(call, capture_output=True, text=True)
    log = done.stdout + done.stderr
    outcome.sizes = parse(log)
    outcome.seconds = time.perf_counter() - begin
    said = [line.strip() for line in log.splitlines() if _PROBLEM.search(line) and "ptxas info" not in line]
    if done.returncode or said:
        outcome.problems += said[:20] or [f"nvcc ended with exit code {done.returncode}: {log.strip()[-400:]}"]
    for (name, arch), sizes in outcome.sizes.items():
        if sizes["spills"] or sizes["stack"]:
            outcome.problems.append(
                f"{name} sm_{arch}: {sizes['spills']} bytes spilled, {sizes['stack']} bytes of stack"
            )
    if not done.returncode:
        missing = [arch for arch in architectures if not any(arch == own for _, own in outcome.sizes)]
        if missing:
            outcome.problems.append(f"no kernel was compiled for {', '.join(missing)}")
    return outcome


def growth(now: Sizes, then: Sizes | None) -> list[str]:
    """Return what has grown beyond the record."""
    if then is None:
        return ["not in the golden record; look at the numbers, then run with --update"]
    limits = {"registers": then["registers"] + REGISTER_SLACK, "shared": then["shared"]}
    return [f"{key} grew from {then[key]} to {now[key]}" for key, limit in limits.items() if now[key] > limit]


def load(version: str) -> Record | None:
    """Return the record of this CUDA version, or None if there is none."""
    path = GOLDEN / f"cuda-{version}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def save(version: str, record: Record) -> Path:
    """Write the record, one sorted line per kernel and architecture, so that a diff shows what changed."""
    blocks = []
    for name in sorted(record):
        rows = [f"  {json.dumps(arch)}: {json.dumps(record[name][arch])}" for arch in sorted(record[name])]
        blocks.append(f"{json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n}")
    GOLDEN.mkdir(exist_ok=True)
    path = GOLDEN / f"cuda-{version}.json"
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n")
    return path


def judge(outcome: Outcome, record: Record | None) -> list[str]:
    """Return the outcome's problems and its growth against the record."""
    grown = []
    for (name, arch), sizes in outcome.sizes.items() if record is not None else ():
        grown += [f"{name} sm_{arch}: {text}" for text in growth(sizes, record.get(name, {}).get(arch))]
    return outcome.problems + grown


def sources(only: str = "") -> list[Path]:
    """Return the CUDA sources whose path contains `only`."""
    return sorted(path for path in (ROOT / "csrc").glob("*/*_cuda.cu") if only in path.relative_to(ROOT).as_posix())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument("--update", action="store_true")
    args = parser.parse_args(argv)
    nvcc = find_nvcc()
    if nvcc is None:
        print("not run: no nvcc (CUDA_HOME, PATH, /usr/local/cuda): the CUDA sources are not compiled on this machine")
        return 0
    begin, version, architectures = time.perf_counter(), cuda_version(nvcc), known_architectures(nvcc)
    for arch in set(ARCHITECTURES) - set(architectures):
        print(f"CUDA {version} cannot compile for sm_{arch}: not checked")
    record = load(version)
    if record is None:
        print(f"no record for CUDA {version}: sizes are not compared (--update makes one)")
    today, failed, files = record or {}, 0, sources(args.only)
    if not args.only:
        today = {}  # kernels that left csrc/ leave the record
    with ThreadPoolExecutor(PROCESSES) as pool:
        for outcome in pool.map(lambda file: examine(nvcc, architectures, file), files):
            problems = judge(outcome, None if args.update else record)
            failed += bool(problems)
            print(f"{outcome.file.relative_to(ROOT)}: {outcome.seconds:.1f} s", flush=True)
            for (name, arch), sizes in sorted(outcome.sizes.items()):
                kept = {key: sizes[key] for key in ("registers", "shared", "stack")}
                today.setdefault(name, {})[arch] = kept
                print(f"  {sizes['registers']:4d} registers {sizes['shared']:6d} B shared  sm_{arch:<5s} {name}")
            for problem in problems:
                print(f"  PROBLEM {problem}", flush=True)
    if args.update and not failed:
        print(f"recorded in {save(version, today).relative_to(ROOT)}")
    elif args.update:
        print("not recorded: a record is made only when nothing is wrong")
    print(f"{len(files)} files, CUDA {version}, {time.perf_counter() - begin:.0f} s: {failed or 'none'} failed")
    return 1 if failed or not files else 0


if __name__ == "__main__":
    sys.exit(main())
