"""Run the native code under AddressSanitizer and UndefinedBehaviorSanitizer, without a GPU.

    python tests/native/sanitize.py                     both lanes, every op
    python tests/native/sanitize.py --lane library      calm_fast._cpu, built with sanitizers into a folder of its own
    python tests/native/sanitize.py --lane kernels      the emulated CUDA kernels and the emulation itself
    python tests/native/sanitize.py --op vote           one op

library runs the cases of `calm-fast verify` for every op that it serves, then the tests that force each SIMD lane.
kernels runs a few cases on every schedule. The sanitizers' runtime is preloaded into Python. A report ends the process
and fails the lane.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1")
LANES = ("library", "kernels")
LANE_TESTS = ("tests/ops",)
PROCESSES = 2


def runtime(name: str) -> str:
    """Return the path of one of g++'s shared libraries, or an empty string if g++ has none of that name."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return str(Path(found).resolve()) if os.path.isabs(found) else ""


def obstacle() -> str | None:
    """Return why nothing can be sanitized here, or None."""
    try:
        missing = [name for name in ("libasan.so", "libubsan.so", "libstdc++.so.6") if not runtime(name)]
    except OSError:
        return "g++ is not on the PATH"
    return f"g++ has no {', '.join(missing)}" if missing else None


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a sanitized process: the sanitizers are preloaded, with libstdc++, without which they
    cannot intercept exceptions."""
    preload = [runtime("libasan.so"), runtime("libstdc++.so.6")]
    settings = {
        "LD_PRELOAD": " ".join(preload),
        # Python and torch free much only at exit, or never: their leaks would bury all other reports
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:exitcode=99",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1:exitcode=99",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        "PYTHONSAFEPATH": "1",  # the folder of links must win over the checkout's calm_fast/
    }
    return {**os.environ, **settings, **more}


def compile_library(csrc: Path, output: Path) -> None:
    """Compile calm_fast._cpu from `csrc` with sanitizers and -O1, with the sources and defines of setup.py.

    Raises:
        RuntimeError: with the compiler's messages.
    """
    import torch

    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", *FLAGS]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000ULL", "-DPy_LIMITED_API=0x030a0000"]
    flags += [f"-DCALM_FAST_TORCH={torch.__version__}"]
    flags += [f"-I{csrc}", "-isystem", str(include), "-isystem", sysconfig.get_paths()["include"]]
    sources = [csrc / "bindings.cpp", *sorted(csrc.glob("*/*_cpu.cpp"))]

    def compile_one(source: Path) -> tuple[Path, str]:
        target = output.parent / f"{source.parent.name}_{source.stem}.o"
        done = subprocess.run(["g++", *flags, "-c", str(source), "-o", str(target)], capture_output=True, text=True)
        return target, done.stderr if done.returncode else ""

    with ThreadPoolExecutor(PROCESSES) as pool:
        objects, messages = zip(*pool.map(compile_one, sources), strict=True)
    if any(messages):
        raise RuntimeError("\n".join(filter(None, messages)))
    libraries = Path(torch.__file__).parent / "lib"
    link = ["g++", "-shared", *FLAGS, *map(str, objects), f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-o", str(output)]
    done = subprocess.run(link, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)


def stage(site: Path) -> Path:
    """Make a folder of links that imports as calm_fast, without the compiled library. Return its calm_fast/."""
    package = site / "calm_fast"
    package.mkdir(parents=True)
    for entry in (ROOT / "calm_fast").iterdir():
        if entry.suffix != ".so" and entry.name not in ("__pycache__", "kernels"):
            (package / entry.name).symlink_to(entry)
    (package / "kernels").mkdir()
    for entry in (ROOT / "calm_fast" / "kernels" / "__init__.py", *(ROOT / "kernels").iterdir()):
        (package / "kernels" / entry.name).symlink_to(entry)
    (package / "benchmarks").symlink_to(ROOT / "benchmarks")
    return package


def library_lane(ops: list[str], csrc: Path, lane_tests: bool = True) -> int:
    """Build the library, then run verify's cases and the lane tests. Returns the first nonzero exit code."""
    with tempfile.TemporaryDirectory() as folder:
        package = stage(Path(folder) / "site")
        begin = time.perf_counter()
        compile_library(csrc, package / "_cpu.abi3.so")
        print(f"[sanitize] calm_fast._cpu built in {time.perf_counter() - begin:.0f} s", flush=True)
        env = environment(PYTHONPATH=str(package.parent))
        chosen = [word for op in ops for word in ("--op", op)]
        calls = [[sys.executable, str(Path(__file__).resolve()), "--child", "library", *chosen]]
        if lane_tests:
            call = [sys.executable, "-m", "pytest", *LANE_TESTS, "-k", "lane", "-q", "-x", "-p", "no:cacheprovider"]
            calls.append(call)
        for call in calls:
            if code := subprocess.run(call, env=env, cwd=ROOT).returncode:
                return code
    return 0


def kernels_lane(ops: list[str], csrc: Path) -> int:
    """Run the emulated kernels in a sanitized process. Returns its exit code."""
    chosen = [word for op in ops for word in ("--op", op)]
    call = [sys.executable, str(Path(__file__).resolve()), "--child", "kernels", "--csrc", str(csrc), *chosen]
    return subprocess.run(call, env=environment(), cwd=ROOT).returncode


def child(lane: str, ops: list[str], csrc: Path) -> int:
    """Run one lane inside the sanitized process. Returns its exit code."""
    from calm_fast.ops import OPS
    from calm_fast.verify import emulation, run

    failed = 0
    if lane == "library":
        from calm_fast.core import native_library

        for part in run.plan(ops or OPS, ["native"]):
            if part.device != "cpu" or part.skipped:
                continue
            rows = list(run.run_part(part))
            failed += sum(not row.ok for row in rows)
            print(f"[sanitize] {part}: {len(rows)} rows, {failed} failed", flush=True)
        print(f"[sanitize] library: {native_library._load('_cpu').__file__}")
        return 1 if failed else 0
    emulation.FLAGS = (*emulation.FLAGS, *FLAGS)
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import emulated_cases
    import mutate

    for op in ops or emulated_cases.emulated_ops():
        prepared = mutate.with_truth(op, emulated_cases.FEW[op]())
        wrong = mutate.first_problem(op, prepared, csrc, emulation.SCHEDULES)
        failed += wrong is not None
        print(f"[sanitize] {op} emulated, {len(prepared)} cases on every schedule: {wrong or 'ok'}", flush=True)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lane", choices=LANES, action="append")
    parser.add_argument("--op", action="append", default=[])
    parser.add_argument("--csrc", type=Path, default=ROOT / "csrc")
    parser.add_argument("--child", choices=LANES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return child(args.child, args.op, args.csrc)
    if why := obstacle():
        print(f"not run: {why}")
        return 0
    for lane in args.lane or LANES:
        begin = time.perf_counter()
        code = (library_lane if lane == "library" else kernels_lane)(args.op, args.csrc)
        print(f"[sanitize] {lane}: {'ok' if code == 0 else f'FAILED ({code})'} in {time.perf_counter() - begin:.0f} s")
        if code:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
