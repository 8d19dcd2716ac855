"""`bench --lane`: the library, torch and numpy are held to a lane, and every row says which."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from calm_fast.benchmarks import lanes, run
from calm_fast.core import native_library

BUILT = not isinstance(native_library.build_info()["_cpu"], str)
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
needs_avx512 = pytest.mark.skipif(not (BUILT and AVX512), reason="needs the compiled library and a CPU with AVX-512")


def test_the_choices_are_the_lanes_of_the_library():
    assert lanes.CHOICES == ("auto", *native_library.LANES)


@needs_avx512
def test_a_run_with_avx2_measures_with_avx2_and_says_so(tmp_path):
    chosen = ["--op", "vote", "--case", "v1_vote", "--device", "cpu", "--seconds", "0", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "calm_fast.benchmarks.run", *chosen, "--lane", "avx2"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert rows and all(row["lane"] == "avx2" and row["device"].endswith(", lane avx2") for row in rows)


@needs_avx512
def test_torch_and_numpy_are_limited_in_the_environment_of_a_lane():
    code = (
        "import numpy, torch; from numpy._core._multiarray_umath import __cpu_features__ as f\n"
        "from calm_fast.benchmarks import lanes; assert not lanes.must_start_again('avx2')\n"
        "print(lanes.settle('avx2'), torch.backends.cpu.get_cpu_capability(), f['AVX512_SPR'], f['AVX2'])"
    )
    environment = {**lanes.os.environ, **lanes.environment("avx2")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["avx2", "AVX2", "False", "True"], done.stderr


@needs_avx512
def test_a_torch_that_is_not_limited_is_refused():
    with pytest.raises(lanes.LaneError, match="torch reports AVX512, expected AVX2"):
        lanes.settle("avx2")
    native_library.limit_lane(None)


@pytest.mark.skipif(not BUILT, reason="needs the compiled library")
def test_a_lane_that_the_cpu_does_not_have_is_refused(monkeypatch):
    monkeypatch.setattr(lanes, "_library_lane", lambda: "scalar")
    with pytest.raises(lanes.LaneError, match="the best lane of this CPU is scalar"):
        lanes.settle("avx512_bf16")


def test_auto_limits_nothing_and_names_this_cpu_s_lane():
    assert not lanes.must_start_again("auto")
    assert lanes.settle("auto")


def test_a_run_with_a_lane_starts_in_its_environment(monkeypatch):
    started = []
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    done = SimpleNamespace(returncode=3)
    monkeypatch.setattr(lanes.subprocess, "run", lambda command, env: started.append((command, env)) or done)
    assert run.main(["--lane", "avx2", "--list"]) == 3
    ((command, environment),) = started
    assert command[-3:] == ["--lane", "avx2", "--list"]
    assert environment["ATEN_CPU_CAPABILITY"] == "avx2" and environment["ONEDNN_MAX_CPU_ISA"] == "AVX2"
