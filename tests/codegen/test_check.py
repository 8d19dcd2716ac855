"""The codegen tool itself: it must catch every fault it claims to, whatever the caller's Triton settings are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # the tool is a script with helpers beside it, not a package

import check  # noqa: E402
import golden  # noqa: E402

from calm_fast.benchmarks.machine_code import (  # noqa: E402
    SHARED_LIMIT,
    SMALL_SHARED,
    VERDICT,
    Facts,
    blocks_per_multiprocessor,
    hard_problems,
    serialised,
)
from calm_fast.benchmarks.sass import Instruction, Loop  # noqa: E402
from calm_fast.kernels.common.config_table import target  # noqa: E402

SPEC = SimpleNamespace(num_warps=4, num_stages=3, constexprs={"BLOCK_M": 64, "BLOCK_N": 32, "CAUSAL": True})
GOOD = Facts(90, 100, 240, 24576, 0, 0, 0, (), ("HGMMA.64x64x16.F32.BF16",))


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / "check.py"), *arguments]
    settings = {"TRITON_INTERPRET": "1", "TRITON_PTXAS_PATH": "/nonexistent", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | settings, timeout=300)


@pytest.fixture(scope="module")
def bad_run() -> subprocess.CompletedProcess[str]:
    pytest.importorskip("triton", reason="the machine-code checks need Triton, which is not installed")
    return run_tool("--specs", str(HERE / "bad_kernels.py"), "--arch", "90")


def problems_of(output: str, name: str) -> list[str]:
    mark = f"PROBLEM {name} sm_90: "
    return [line.split(mark)[1] for line in output.splitlines() if mark in line]


def test_tool_fails_on_bad_kernels(bad_run):
    assert bad_run.returncode == 1, bad_run.stdout + bad_run.stderr
    assert "7 with problems" in bad_run.stdout


def test_tool_passes_a_good_kernel(bad_run):
    assert problems_of(bad_run.stdout, "good") == []
    assert "good sm_90" in bad_run.stdout


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("spilling", "spills:"),
        ("float64", "float64 instructions: D"),
        ("too_much_shared", "shared memory 327680 bytes > 232448"),
        ("tf32_unasked", "unexpected tensor-core instructions: HGMMA"),
        ("serialised", "serialised products: (C7515)"),
        ("uncompilable", "does not compile: CompileTimeAssertionFailure"),
    ],
)
def test_tool_catches_each_fault_alone(bad_run, name, problem):
    found = problems_of(bad_run.stdout, name)
    assert len(found) == 1 and found[0].startswith(problem), bad_run.stdout


def test_tool_catches_a_missing_matrix_instruction(bad_run):
    assert any("no HGMMA instruction" in p for p in problems_of(bad_run.stdout, "no_tensor_core"))


def test_no_kernels_is_a_failure(bad_run):
    run = run_tool("--specs", str(HERE / "bad_kernels.py"), "--arch", "90", "--only", "no such kernel")
    assert run.returncode == 1, run.stdout


def test_hard_problems_of_good_facts_is_empty():
    assert hard_problems(GOOD, True) == hard_problems(GOOD, "warp") == []


@pytest.mark.parametrize(
    ("change", "tensor_core", "word"),
    [
        ({"stack": 8}, True, "spills"),
        ({"local_accesses": 1}, True, "spills"),
        ({"float64": ("DFMA",)}, True, "float64"),
        ({"shared": 227 * 1024 + 1}, True, "shared memory"),
        ({"arch": 80, "tensor_core": ("HMMA.16816.F32",), "shared": 163 * 1024 + 1}, True, "shared memory"),
        ({"arch": 120, "tensor_core": ("HMMA.16816.F32",), "shared": 99 * 1024 + 1}, True, "shared memory"),
        ({"arch": 100, "tensor_core": ("UTCHMMA",), "tensor_memory": 513}, True, "tensor memory"),
        ({"tensor_core": ("HMMA.16816.F32",)}, True, "no HGMMA"),
        ({"tensor_core": ()}, "warp", "no tensor-core"),
        ({}, False, "unexpected tensor-core"),
    ],
)
def test_hard_problems_names_the_one_that_is_wrong(change, tensor_core, word):
    facts = Facts(**{**GOOD.__dict__, **change})
    (problem,) = hard_problems(facts, tensor_core)
    assert word in problem


def test_serialised_by_the_words_of_ptxas():
    log = """ptxas-blackwell info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : Used 186 registers, used 1 barriers
"""
    (line,) = VERDICT.findall(log)
    assert "C7515" in line
    assert VERDICT.findall("ptxas info : wgmma is serialized") and VERDICT.findall("info : (C7510) something else")
    assert "C7515" in serialised(replace(GOOD, verdicts=(line,)))[0]


def test_serialised_by_the_number_of_waits():
    chain = replace(GOOD, matrix_instructions=12, warpgroup_waits=24, chained=True)
    assert "24 WARPGROUP instructions for 12 products" in serialised(chain)[0]
    assert serialised(replace(chain, warpgroup_waits=23)) == []
    assert serialised(replace(chain, chained=False)) == []  # lone products wait for themselves


def test_consumer_gpus_take_the_configs_of_sm_80():
    """So a kernel's sm_80 spec is what they launch, and `jobs_of` compiles it for them."""
    for arch in SMALL_SHARED:
        assert target(arch, torch.bfloat16) == "sm_80"
        assert SHARED_LIMIT[arch] == 99 * 1024
    assert golden.large_kernels(), "no kernel is compiled for them"


def test_growth_is_reported_beyond_the_slack_only():
    then = {"registers": 100, "instructions": 1000, "shared": 4096}
    assert golden.growth(then, then) == []
    assert golden.growth({"registers": 108, "instructions": 1100, "shared": 4096}, then) == []
    assert golden.growth({"registers": 60, "instructions": 10, "shared": 0}, then) == []
    grown = golden.growth({"registers": 109, "instructions": 1101, "shared": 4097}, then)
    assert [text.split()[0] for text in grown] == ["registers", "instructions", "shared"]


def test_record_survives_a_round_trip(tmp_path, monkeypatch):
    monkeypatch.setattr(golden, "FOLDER", tmp_path / "golden")
    assert golden.load("0.0.0") is None
    row = golden.numbers(GOOD, SPEC)
    record = {"b": {"90": row, "100": row}, "a": {"80": row}}
    path = golden.save("0.0.0", record)
    assert golden.load("0.0.0") == record
    assert path.read_text().index('"a"') < path.read_text().index('"b"')


def test_blocks_of_a_multiprocessor_follow_the_scarcest_resource():
    assert blocks_per_multiprocessor(GOOD, 4) == 4  # 104 registers of 128 threads
    assert blocks_per_multiprocessor(replace(GOOD, registers=24), 4) == 9  # 25 KiB of 228 each
    assert blocks_per_multiprocessor(replace(GOOD, registers=24, shared=0), 4) == 16  # warps
    assert blocks_per_multiprocessor(replace(GOOD, registers=24, shared=0), 1) == 32  # blocks
    assert blocks_per_multiprocessor(replace(GOOD, arch=120, registers=24, shared=0), 8) == 6  # 48 warps
    assert blocks_per_multiprocessor(replace(GOOD, registers=255, shared=227 * 1024), 8) == 1
    assert blocks_per_multiprocessor(replace(GOOD, arch=100, tensor_memory=256), 4) == 2


def test_numbers_and_page_show_the_compiled_kernel():
    facts = replace(GOOD, matrix_instructions=12, async_copies=7)
    row = golden.numbers(facts, SPEC)
    assert (row["matrix"], row["async"], row["tile"], row["blocks"]) == ("12 HGMMA", 7, "M 64, N 32", 4)
    text = golden.page("0.0.0", {"fwd_sm90": {"90": row}, "other_sm80": {"80": row}})
    assert "\n| `fwd` | M 64, N 32 | 3 | 100 | 0 | 24.0 | 12 HGMMA | 7 | 4 | 16 |\n" in text


def test_page_shows_a_step_of_the_main_loop():
    product = Instruction("HGMMA.64x64x16.F32.BF16", "R8, gdesc[UR8], R8, gsb0")
    step = Loop((product, product, *[Instruction("MUFU.EX2")] * 4, *[Instruction("FADD")] * 60))
    row = golden.numbers(replace(GOOD, loops=(step,)), SPEC)
    assert row["step"] == {"all": 66, "HGMMA.64x64x16": 2, "EX2": 4, "ADD/MAX": 60}
    text = golden.page("0.0.0", {"fwd_sm90": {"90": row}})
    # 2 products of 32 cycles, 64 other instructions of 4 warps
    assert text.splitlines()[-1] == "| `fwd` | 2 HGMMA.64x64x16 | 66 | 4 |  |  | 60 |  |  |  |  |  | 50% |"


def test_the_page_matches_the_record():
    version = re.search(r"record of Triton (\S+);", golden.PAGE.read_text())[1]
    assert golden.PAGE.read_text() == golden.page(version, golden.load(version)), "run: make codegen ARGS=--table"


def test_record_covers_every_kernel(bad_run):
    """A new kernel needs recorded numbers, if a record for this Triton exists."""
    import triton

    record = golden.load(triton.__version__)
    if record is None:
        pytest.skip(f"no golden record for Triton {triton.__version__}")
    run = run_tool("--list")
    assert run.returncode == 0, run.stderr
    kernels = [line for line in run.stdout.splitlines() if ": no Triton" not in line]
    assert sorted(kernels) == sorted(f"{name} {arch}" for name in record for arch in record[name])


def test_only_what_changed_since_the_record_is_compiled_again(monkeypatch):
    sources = {("a", 90): "1111", ("b", 90): "2222", ("c", 90): "0333", ("new", 90): "4444"}
    monkeypatch.setattr(check, "named_specs", lambda module: {name: name for name, _ in sources})
    monkeypatch.setattr(golden, "source", lambda spec, arch: sources[spec, arch])
    record = {"a": {"90": {"source": "1111"}}, "b": {"90": {"source": "old"}}, "c": {"90": {"source": "0333"}}}
    record["without"] = {"90": {}}
    jobs = [("module", name, arch) for name, arch in sources]
    # a is as recorded; so is c, but it belongs to the sixteenth that is compiled all the same
    assert [name for _, name, _ in check.changed(jobs, record)] == ["b", "c", "new"]


def test_recorded_sources_are_those_of_todays_kernels():
    triton = pytest.importorskip("triton")
    record = golden.load(triton.__version__)
    if record is None:
        pytest.skip(f"nothing recorded for Triton {triton.__version__}")
    done = run_tool("--only", "combine", "--arch", "90")
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = re.search(r"^(\d+) of (\d+) are as recorded", done.stdout, re.MULTILINE)
    assert skipped and int(skipped[1]) >= int(skipped[2]) // 2 > 0
