"""The nvcc gate: it reads the output of ptxas, and a spill, a warning or growth fails it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))  # a script, not a package

import nvcc_gate as gate  # noqa: E402

NVCC = gate.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine: CUDA sources cannot be compiled")

LOG = """
ptxas info    : Compiling entry function '_ZN1a1kEPf' for 'sm_90a'
ptxas info    : Function properties for _ZN1a1kEPf
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN1a1kEPf' for 'sm_80'
ptxas info    : Function properties for _ZN1a1kEPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers
"""

SPILLS = """
__global__ void __launch_bounds__(1024) spills(const float* x, float* out) {
  float v[96];
  for (int i = 0; i < 96; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int r = 0; r < 3; ++r)
    for (int i = 0; i < 96; ++i) v[i] = v[i] * v[(i * 7 + 1) % 96] + v[(i + 5) % 96];
  float sum = 0;
  for (int i = 0; i < 96; ++i) out[i * 1024 + threadIdx.x] = v[i], sum += v[i];
  out[threadIdx.x] = sum;
}
"""


def test_ptxas_output_is_read():
    found = gate.parse(LOG)
    assert found[("a::k", "90a")] == {"registers": 40, "shared": 1024, "stack": 16, "spills": 32}
    assert found[("a::k", "80")] == {"registers": 30, "shared": 0, "stack": 0, "spills": 0}


def test_growth_beyond_the_slack_is_named():
    then = {"registers": 40, "shared": 1024, "stack": 0}
    assert gate.growth({**then, "registers": 48}, then) == []
    assert gate.growth({**then, "registers": 49}, then) == ["registers grew from 40 to 49"]
    assert gate.growth({**then, "shared": 1040}, then) == ["shared grew from 1024 to 1040"]
    assert "not in the golden record" in gate.growth(then, None)[0]


def test_the_record_holds_every_kernel_source():
    """An unrecorded kernel could grow on another machine without failing the gate."""
    records = sorted(gate.GOLDEN.glob("cuda-*.json"))
    assert records
    for path in records:
        names = json.loads(path.read_text())
        for source in gate.sources():
            op = source.parent.name
            assert any(f"calm_fast::{op}::" in name for name in names), f"{path.name} has no kernel of {op}"
        assert all(set(rows) == set(gate.ARCHITECTURES) for rows in names.values())
        assert all(sizes["stack"] == 0 for rows in names.values() for sizes in rows.values())


def test_without_nvcc_it_says_so_and_returns_0(monkeypatch, capsys):
    monkeypatch.setattr(gate, "find_nvcc", lambda: None)
    assert gate.main([]) == 0
    assert "not run: no nvcc" in capsys.readouterr().out


@needs_nvcc
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SPILLS, "spill"),
        ("__global__ void k(float* x) { x[0] = no_such_name; }", "no_such_name"),
        ("__global__ void k(float* x) { int unused; x[0] = 1.0f; }", "unused"),
        ("int host_only() { return 1; }", "no kernel was compiled"),
    ],
)
def test_a_bad_source_fails(tmp_path, text, expected):
    source = tmp_path / "bad_cuda.cu"
    source.write_text(text)
    outcome = gate.examine(NVCC, ["90a"], source)
    assert any(expected in problem for problem in gate.judge(outcome, None)), outcome


@needs_nvcc
def test_a_good_source_passes_until_it_grows(tmp_path):
    source = tmp_path / "good_cuda.cu"
    source.write_text("__global__ void good(float* x) { x[threadIdx.x] *= 2.0f; }")
    outcome = gate.examine(NVCC, ["80", "90a"], source)
    assert gate.judge(outcome, None) == []
    record = {"good": {arch: dict(outcome.sizes[("good", arch)]) for arch in ("80", "90a")}}
    assert gate.judge(outcome, record) == []
    record["good"]["80"]["registers"] -= gate.REGISTER_SLACK + 1
    assert ["good sm_80: registers grew" in problem for problem in gate.judge(outcome, record)] == [True]
