"""benchmarks/gpu.sh and the programs it starts, as far as they can be tested without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from calm_fast.benchmarks import run, sanitize
from calm_fast.benchmarks.registry import REGISTRY, cases
from calm_fast.ops import OPS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
PARTS = (
    *("tests", "core", "profile", "decode", "model", "nce", "memcheck", "lora", "tune", "core_heads", "layer"),
    *("logprob", "sanitizer", "lora_step", "vote", "generate", "lora_ranks", "scaling", "generate_long"),
)
FILES = {"results.jsonl", "summary.txt", "logs.tar.gz"}  # and native.tar.gz if the library was compiled


def gpu_sh(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *args],
        cwd=ROOT.parent,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_dry_run_explains_every_part_and_runs_nothing(tmp_path):
    out = tmp_path / "results"
    done = gpu_sh("--dry-run", OUT=str(out))
    assert done.returncode == 0, done.stderr
    assert not out.exists()
    for part in PARTS:
        assert f"=== {part}: " in done.stdout
    for word in (
        "-m gpu",
        "memcheck",
        "racecheck",
        "initcheck",
        "synccheck",
        "setup.py build_ext",
        "x1_",
        "x5_",
        "calm_fast.benchmarks.tune",
    ):
        assert word in done.stdout


def test_parts_are_in_order_of_value_and_each_fits_into_a_call():
    done = gpu_sh("--dry-run")
    order = re.findall(r"^=== (\w+): ", done.stdout, re.MULTILINE)
    assert order == ["native", *PARTS]
    assert " ".join(
        re.findall(r"^# (?:Parts, by value:|  +)((?: \w+)+)$", SCRIPT.read_text(), re.MULTILINE)
    ).split() == [*PARTS]
    native = 100
    for call in re.split(r"^--- call \d+$", done.stdout, flags=re.MULTILINE):
        limits = [int(s) for s in re.findall(r"at most (\d+) s\)", call.split("=== native")[-1])]
        assert sum(limits) + native * ("setup.py" not in call) <= 540
        assert limits, call


def test_all_before_tuning_fits_into_three_calls():
    before = gpu_sh("--dry-run").stdout.split("=== tune")[0]
    assert before.count("--- call") <= 2
    assert "(at most 150 s): env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck" in before
    assert "ncu --clock-control none" in before


@pytest.mark.parametrize("ncu", ["", "echo ERR_NVGPUCTRPERM; exit 1", "echo a driver fault; exit 1"])
def test_a_profile_that_the_machine_refuses_is_no_failure(tmp_path, ncu):
    """Missing, or without permission, ncu is a line of the summary; another failure of it is one."""
    script = SCRIPT.read_text()
    functions = "\n".join(
        re.search(rf"^{name}\(\) \{{\n.*?^\}}$", script, re.MULTILINE | re.DOTALL)[0]
        for name in ("step", "cuda_tool", "part_profile")
    )
    tools = tmp_path / "bin"
    tools.mkdir()
    if ncu:
        (tools / "ncu").write_text(f"#!/bin/bash\n{ncu}\n")
        (tools / "ncu").chmod(0o755)
    program = f"dry=0 work={tmp_path} python=true failed=() summary=()\n{functions}\npart_profile 20\n"
    program += 'printf \'SUMMARY %s\\n\' "${summary[@]}"; echo "FAILED ${failed[*]-}"'
    path = f"{tools}:/usr/bin:/bin"
    done = subprocess.run(["bash", "-euc", program], capture_output=True, text=True, env={"PATH": path}, timeout=60)
    assert done.returncode == 0, done.stderr
    refused = ncu != "echo a driver fault; exit 1"
    assert ("SUMMARY profile: not run" in done.stdout) == refused
    assert ("FAILED profile" in done.stdout) == (not refused)


def test_benchmark_parts_measure_every_gpu_case_of_every_op():
    done = gpu_sh("--dry-run")
    measured = set()
    for line in re.findall(r"benchmarks\.run (.*)", done.stdout):
        args = run.parser().parse_args(line.split())
        found = run.select(args.op, torch.device("cuda"), args.suite, args.case)
        assert found, line
        assert not measured & {(c.op, c.name) for c in found}
        measured |= {(c.op, c.name) for c in found}
    assert {op for op, _ in measured} == set(REGISTRY)
    for op in REGISTRY:
        suite = "quick" if op == "cross_attention" else "full"
        assert {(c.op, c.name) for c in cases(op, torch.device("cuda"), suite)} <= measured


FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  -) exit 0 ;;
  *setup.py*)
    [[ -e csrc/source.cu ]] || exit 4
    [[ -z "${BROKEN_COMPILER:-}" ]] || exit 3
    mkdir -p "$4/calm_fast"
    touch "$4/calm_fast/_cuda.abi3.so"
    ;;
  *native_library*) readlink "${PYTHONPATH%%:*}/calm_fast/_cuda.abi3.so" || echo "no library" ;;
  *benchmarks.run*)
    mkdir -p "${@: -1}"
    echo "| case a | 1.0 |" >"${@: -1}/report.md"
    echo "{}" >"${@: -1}/results.jsonl"
    exec sleep 30
    ;;
  *) echo "ran $*" ;;
esac
"""


@pytest.fixture
def stopped_early(tmp_path):
    """A copy of the script whose parts get 2 seconds, and a python that measures one case, then hangs."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "calm_fast").mkdir()
    (tmp_path / "calm_fast" / "_cuda.abi3.so").touch()  # compiled for another torch
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "source.cu").write_text("one")
    (tmp_path / "setup.py").touch()
    text = re.sub(r"\]=\d+", "]=2", SCRIPT.read_text())
    (tmp_path / "benchmarks" / "gpu.sh").write_text(text)
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)

    def call(*args: str, **more: str) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "benchmarks" / "gpu.sh"
        env = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out"), **more}
        return subprocess.run(["bash", str(script), *args], env=env, capture_output=True, text=True, timeout=120)

    return call


def test_rows_of_a_stopped_part_are_shown_and_later_parts_still_run(stopped_early, tmp_path):
    done = stopped_early("--part", "nce", "--part", "tests")
    assert done.returncode == 1 and "gpu.sh: failed: bench-nce" in done.stderr
    assert "bench-nce: STOPPED at its limit of 2 s" in done.stdout
    assert "tests: ok" in done.stdout and "| case a | 1.0 |" in done.stdout
    assert (tmp_path / "out" / "results.jsonl").read_text() == "{}\n"
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES | {"native.tar.gz"}
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as logs:
        assert {"./tests.log", "./bench-nce.log", "./nce/report.md", "./needs.log"} <= set(logs.getnames())
    with tarfile.open(tmp_path / "out" / "native.tar.gz") as library:
        names = library.getnames()
        assert re.fullmatch(r"build/gpu-native/[0-9a-f]{16}", names[0])
        assert {name.removeprefix(names[0]) for name in names} >= {"/done", "/calm_fast/_cuda.abi3.so"}


def test_a_part_that_does_not_fit_is_not_started_and_named_in_the_last_line(stopped_early, tmp_path):
    done = stopped_early("--part", "nce", "--part", "tests", "--part", "vote", "--seconds", "3", "--commit", "abc")
    assert done.returncode == 1 and "bench-nce: STOPPED" in done.stdout
    assert "tests: not run, no time left" in done.stdout and "tests: ok" not in done.stdout
    last = "continue with: benchmarks/gpu.sh --part tests --part vote --commit abc"
    assert done.stdout.splitlines()[-1] == last
    assert last in (tmp_path / "out" / "summary.txt").read_text()
    assert re.search(r"^--- bench-nce: .* --commit abc --out", done.stdout, re.MULTILINE)


def test_an_earlier_call_leaves_nothing_in_the_results_of_a_later_one(stopped_early, tmp_path):
    stopped_early("--part", "nce")
    done = stopped_early("--part", "tests")
    assert done.returncode == 0 and "all requested parts have run" in done.stdout
    assert (tmp_path / "out" / "results.jsonl").read_text() == ""
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES  # the library has been compiled already


def test_the_library_is_compiled_once_for_the_same_sources(stopped_early, tmp_path):
    first, second = (stopped_early("--part", "tests") for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "native: ok" in first.stdout and "native: already compiled" in second.stdout
    for done in (first, second):  # the fresh one is linked, not the one in the checkout
        assert re.search(r"build/gpu-native/[0-9a-f]{16}/calm_fast/_cuda\.abi3\.so", done.stdout)
    (tmp_path / "csrc" / "source.cu").write_text("two")
    assert "native: ok" in stopped_early("--part", "tests").stdout


def test_a_library_that_does_not_compile_fails_the_call_and_stops_nothing(stopped_early):
    done = stopped_early("--part", "tests", BROKEN_COMPILER="1")
    assert done.returncode == 1 and "gpu.sh: failed: native" in done.stderr
    assert "native: FAILED (exit 3)" in done.stdout and "tests: ok" in done.stdout and "no library" in done.stdout


BREAKING = """
import pytest

from calm_fast.benchmarks import broken_context

broke = []
broken_context.broken = lambda: "an illegal memory access" if broke else None


def test_breaks():
    broke.append(True)
    assert False


@pytest.mark.parametrize("i", range(8))
def test_next(i):
    assert not broke
"""


def run_breaking(forked, tmp_path: Path, *args: str) -> str:
    (tmp_path / "test_breaking.py").write_text(BREAKING)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = ("-m", "pytest", "-p", "calm_fast.benchmarks.broken_context", "-p", "no:cacheprovider")
    return forked.run(*command, *args, tmp_path, cwd=tmp_path).stdout


def test_a_broken_gpu_context_fails_one_test_not_all_that_follow(forked, tmp_path):
    out = run_breaking(forked, tmp_path, "-n", "1")
    assert "8 passed" in out and "FAILED test_breaking.py::test_breaks" in out and "test_next" not in out


def test_without_workers_a_broken_gpu_context_ends_the_run_and_says_where(forked, tmp_path):
    out = run_breaking(forked, tmp_path)
    assert "the GPU context broke in test_breaking.py::test_breaks: an illegal memory access" in out
    assert "1 failed" in out and "passed" not in out


def test_part_selects():
    done = gpu_sh("--dry-run", "--part", "layer", "--commit", "abc123")
    assert [p for p in PARTS if f"=== {p}: " in done.stdout] == ["layer"]
    assert "--commit abc123" in done.stdout and "x4_" in done.stdout and "x1_" not in done.stdout


@pytest.mark.parametrize("args", [["--part", "everything"], ["--part"], ["--fast"], ["--seconds", "soon"]])
def test_bad_arguments_exit_2(args):
    done = gpu_sh(*args)
    assert done.returncode == 2 and "gpu.sh:" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_ends(tmp_path):
    done = gpu_sh("--part", "tests", OUT=str(tmp_path / "out"), PYTHON=sys.executable)
    assert done.returncode != 0
    assert "sees no GPU" in done.stdout + done.stderr
    assert "=== tests" not in done.stdout


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_script_passes_shellcheck():
    subprocess.run(["shellcheck", str(SCRIPT)], check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", sanitize.CALLS)
def test_sanitizer_calls_are_right(name):
    assert sanitize.run_call(name, torch.device("cuda")) < sanitize.LIMIT


@pytest.mark.slow
def test_sanitizer_calls_reach_every_kernel_and_are_right(kernel_device):
    if kernel_device.type != "cpu":
        pytest.skip("the interpreter's part; test_sanitizer_calls_are_right runs on the GPU")
    from triton.runtime.interpreter import InterpretedFunction

    launched, launch = set(), InterpretedFunction.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            InterpretedFunction,
            "run",
            lambda self, *args, **options: (launched.add(self.fn.__name__), launch(self, *args, **options))[1],
        )
        errors = {name: sanitize.run_call(name, kernel_device) for name in sanitize.CALLS}
    assert max(errors.values()) < sanitize.LIMIT, errors
    assert {name.split(":")[0] for name in errors} == set(OPS)
    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("*/*.py"))
    kernels = set(re.findall(r"^def (_\w+_kernel)\(", sources, re.MULTILINE))
    assert len(kernels) >= 13 and launched == kernels


def test_sanitizer_compares_gradients_with_float64(monkeypatch):
    right = torch.ops.calm_fast.linear_logprob_triton_bwd
    assert sanitize.run_call("linear_logprob: plain", torch.device("cpu")) < sanitize.LIMIT

    def doubled(*args):
        return [2 * t for t in right(*args)]

    monkeypatch.setattr(torch.ops.calm_fast, "linear_logprob_triton_bwd", doubled)
    assert sanitize.run_call("linear_logprob: plain", torch.device("cpu")) > 0.5
