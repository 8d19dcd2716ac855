"""`pytest benchmarks --benchmark-only`: the registry through pytest-benchmark."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from calm_fast.benchmarks import memory

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = '''
"""A registry with one case of three contestants: correct, wrong, absent."""

import sys

import torch

from calm_fast.benchmarks import registry
from calm_fast.benchmarks.registry import CannotRunError, Case, Contestant

registry.REGISTRY.clear()
registry.REGISTRY["tiny"] = __name__


def product(inputs, dtype=torch.float32):
    return {"out": inputs["a"].to(dtype) @ inputs["a"].to(dtype)}


def absent(inputs):
    raise CannotRunError("no such hardware")


def cases(device, suite):
    contestants = [
        Contestant("right", lambda inputs: lambda: product(inputs), ours=True),
        Contestant("wrong", lambda inputs: lambda: {"out": product(inputs)["out"] * 1.01}),
        Contestant("absent", absent),
    ]
    make = lambda seed: {"a": torch.randn(16, 16, generator=torch.Generator().manual_seed(seed))}
    return [Case("tiny", f"tiny_{suite}", {"N": 16}, torch.float32, 8192, 2048, make, contestants, product, "right")]
'''


@pytest.fixture
def run_pytest(forked):
    """run_pytest(arguments, path) runs pytest in a process of its own."""

    def run(*args: str, path: str | Path = "") -> subprocess.CompletedProcess[str]:
        return forked.run("-m", "pytest", *args, "-p", "no:cacheprovider", "-p", "no:xdist", cwd=ROOT, path=path)

    return run


@pytest.fixture
def tiny(tmp_path, run_pytest):
    (tmp_path / "tiny_registry.py").write_text(PLUGIN)
    return lambda *args: run_pytest("benchmarks", "-p", "tiny_registry", "-q", *args, path=tmp_path)


def test_right_is_timed_wrong_fails_absent_is_skipped(tiny, tmp_path):
    saved = tmp_path / "saved.json"
    done = tiny("--benchmark-only", "--benchmark-max-time", "0.01", "--benchmark-json", str(saved), "--suite", "full")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"1 failed, 1 passed, 1 skipped", done.stdout)
    assert "wrong: error 0.01 against float64" in done.stdout and "cannot run: no such hardware" in done.stdout
    (timed,) = json.loads(saved.read_text())["benchmarks"]
    assert timed["extra_info"]["impl"] == "right" and timed["group"] == "tiny_full: N 16"
    assert timed["extra_info"]["flops"] == 8192 and timed["stats"]["rounds"] >= 5


@pytest.mark.parametrize(("options", "said"), [((), False), (("--memory", "system"), True)])
def test_where_memory_comes_from_is_chosen_and_said(options, said, tiny, tmp_path):
    saved = tmp_path / "saved.json"
    done = tiny(
        "--benchmark-only", "--benchmark-max-time", "0.01", "--benchmark-json", str(saved), "-k", "right", *options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (timed,) = json.loads(saved.read_text())["benchmarks"]
    expected = said or memory.obstacle() is not None
    assert timed["extra_info"]["device"].endswith(", memory from the system") == expected


def test_without_the_option_nothing_is_timed(tiny):
    done = tiny("-k", "right")
    assert done.returncode == 0 and "1 passed" in done.stdout and "Median" not in done.stdout


@pytest.mark.slow
def test_a_case_of_the_registry_runs(run_pytest):
    arguments = ("-k", "v1_vote_weighted-numpy", "--bench-device", "cpu", "--benchmark-max-time", "0.05")
    done = run_pytest("benchmarks", "--benchmark-only", "-q", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout and "benchmark 'v1_vote_weighted: Q 5000, K 64': 1 tests" in done.stdout


def test_collects_every_contestant_but_not_in_the_normal_run(run_pytest):
    listed = run_pytest("benchmarks", "--collect-only", "-q", "--bench-device", "cpu").stdout
    for name in ("x4_layer_inference-unfolded_sdpa", "d1_added_paper-formula", "n1-calm_fast", "v1_vote-counter"):
        assert f"test_benchmarks.py::test_case[{name}]" in listed
    config = (ROOT / "pyproject.toml").read_text()
    assert 'testpaths = ["tests"]' in config and "--benchmark-disable" in config
