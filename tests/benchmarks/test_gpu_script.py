"""benchmarks/gpu.sh and what it starts, as far as a machine without a GPU can say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from calm_fast._tuning import LaunchConfig
from calm_fast.benchmarks import sanitize, tune

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
PARTS = ("tests", "sanitizer", "core", "layer", "tune")


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
    for word in ("-m gpu", "memcheck", "racecheck", "initcheck", "x1_", "x5_", "calm_fast.benchmarks.tune"):
        assert word in done.stdout


def test_time_limits_end_well_inside_ten_minutes():
    done = gpu_sh("--dry-run")
    limits = [int(s) for s in re.findall(r"at most (\d+) s", done.stdout)]
    assert len(limits) == 7 and sum(limits) <= 540


def test_part_selects():
    done = gpu_sh("--dry-run", "--part", "layer", "--commit", "abc123")
    assert [p for p in PARTS if f"=== {p}: " in done.stdout] == ["layer"]
    assert "--commit abc123" in done.stdout and "x4_" in done.stdout and "x1_" not in done.stdout


@pytest.mark.parametrize("args", [["--part", "everything"], ["--part"], ["--fast"]])
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
    assert sanitize.run_call(name, torch.device("cuda")) < 1e-2


@pytest.mark.parametrize("part", ["fwd", "dkdv", "dq", "decode"])
@pytest.mark.parametrize("head_dim", tune.HEAD_DIMS)
def test_tuning_candidates_are_valid_and_distinct(part, head_dim):
    found = tune.candidates(part, head_dim)
    assert 4 <= len(found) == len(set(found))
    assert all(bool(config.split_keys) == (part == "decode") for config in found)


def test_tuning_takes_the_fastest_that_agrees():
    import time

    present, fast, wrong, broken = (LaunchConfig(16, n, 4, 1) for n in (16, 32, 64, 128))

    def run(config):
        if config == broken:
            raise RuntimeError("out of shared memory")
        if config == present:
            time.sleep(0.01)
        return {"out": torch.full((4,), 2.0 if config == wrong else 1.0)}

    found, ms, before = tune.best_config(
        run, present, [broken, wrong, fast], torch.device("cpu"), time.monotonic() + 60
    )
    assert found == fast and ms < before and before >= 10


def test_tuning_keeps_the_present_config_when_out_of_time():
    present, other = LaunchConfig(16, 16, 4, 1), LaunchConfig(16, 32, 4, 1)
    seen = []

    def run(config):
        seen.append(config)
        return {"out": torch.ones(1)}

    assert tune.best_config(run, present, [other], torch.device("cpu"), 0.0)[0] == present
    assert other not in seen


def test_merging_tuned_entries_replaces_the_same_shape():
    def entry(part, m, block):
        return {
            "part": part, "dtype": "bfloat16", "head_dim": 64, "shape": {"M": m, "N": 64}, "config": {"block_m": block}
        }  # fmt: skip

    merged = tune.merge([entry("fwd", 64, 16), entry("dq", 64, 16)], [entry("fwd", 64, 32), entry("fwd", 128, 16)])
    assert sorted((e["part"], e["shape"]["M"], e["config"]["block_m"]) for e in merged) == [
        ("dq", 64, 16),
        ("fwd", 64, 32),
        ("fwd", 128, 16),
    ]
