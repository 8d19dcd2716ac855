"""The error rule and `calm-fast verify`: right results pass, slightly wrong ones fail, and so does the exit code."""

from __future__ import annotations

import importlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from calm_fast.cli import app
from calm_fast.core import native_library, numerics
from calm_fast.verify import run
from calm_fast.verify.cases import op_cases

OPS_MODULE = importlib.import_module("calm_fast._ops.cross_attention.api")
TRUE = OPS_MODULE.cross_attention_torch
CASES = op_cases("cross_attention")


class _Tf32(torch.autograd.Function):
    """Rounds to TF32's 10 fraction bits; passes gradients through."""

    @staticmethod
    def forward(ctx, x):
        bits = x.detach().contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)

    @staticmethod
    def backward(ctx, g):
        return g


def tf32_operands(q, k, v, *rest):
    return TRUE(*(_Tf32.apply(t) for t in (q, k, v)), *rest)


def scale_slightly_off(q, k, v, lo, hi, causal, scale, return_lse):
    return TRUE(q, k, v, lo, hi, causal, scale * (1 + 1e-4), return_lse)


def one_key_too_many(q, k, v, lo, hi, causal, scale, return_lse):
    hi = None if hi is None else (hi + 1).clamp(max=k.shape[1])
    return TRUE(q, k, v, lo, hi, causal, scale, return_lse)


def lse_without_gradient(*args):
    out, lse = TRUE(*args)
    return out, None if lse is None else lse.detach() + 0 * out.sum()


def empty_rows_not_quite_zero(*args):
    out, lse = TRUE(*args)
    return out + 1e-30, lse


def nan_somewhere(*args):
    out, lse = TRUE(*args)
    return out.masked_fill(torch.arange(out.numel()).view(out.shape) == 3, math.nan), lse


def raises(*args):
    raise RuntimeError("no kernel image is available")


WRONG = {  # implementation -> quantities that must be caught
    tf32_operands: {"out", "lse", "dq", "dk", "dv"},
    scale_slightly_off: {"out", "lse", "dq", "dk", "dv"},
    one_key_too_many: {"out", "lse", "dq", "dk", "dv"},
    lse_without_gradient: {"dq", "dk"},
    empty_rows_not_quite_zero: {"out"},
    nan_somewhere: {"out", "dq", "dk", "dv"},
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_wrong_implementation_exceeds_its_bounds(wrong, monkeypatch):
    monkeypatch.setattr(OPS_MODULE, "cross_attention_torch", wrong)
    rows = numerics.check(CASES, CASES.case("scattered", torch.float32), "torch")
    assert {row.quantity for row in rows if not row.ok} == WRONG[wrong]


def test_low_precision_accumulation_is_caught(monkeypatch):
    """Summing in bfloat16, term by term, has more than twice the error of eager, which sums in float32."""

    def sloppy(q, k, v, lo, hi, causal, scale, return_lse):
        group = q.shape[2] // k.shape[2]
        k, v = (t.repeat_interleave(group, 2) for t in (k, v))
        p = (torch.einsum("bmhd,bnhd->bhmn", q, k) * scale).softmax(-1)
        out = torch.zeros_like(q.transpose(1, 2))
        for j in range(k.shape[1]):
            out = out + p[..., j : j + 1] * v[:, j : j + 1].transpose(1, 2)
        return out.transpose(1, 2), None

    monkeypatch.setattr(OPS_MODULE, "cross_attention_torch", sloppy)
    case = CASES.case("full", torch.bfloat16, n=400, lse=False)
    out = next(r for r in numerics.check(CASES, case, "torch") if r.quantity == "out")
    assert not out.ok and math.isfinite(out.error)


@pytest.mark.parametrize("op", run.OPS)
def test_bounds_are_close_to_what_good_implementations_reach(op):
    """The median error is at least 1 % of its bound: a bound a thousand times too wide would pass anything."""
    cases = [c for c in op_cases(op).cases() if c.dtype == torch.float32][:20]
    rows = [r for c in cases for r in numerics.check(op_cases(op), c, "torch")]
    ratios = [r.ratio for r in rows if r.bound > 0]  # a bound of 0 means equal bit for bit
    assert rows and (not ratios or torch.tensor(ratios).median() > 0.01)


def test_error_of_non_finite_and_misshapen_values():
    t = torch.tensor([1.0, -math.inf, 0.0], dtype=torch.float64)
    assert numerics.error(torch.tensor([1.5, -math.inf, 0.25]), t) == 0.5
    assert numerics.error(torch.tensor([1.0, math.inf, 0.0]), t) == math.inf
    assert numerics.error(torch.tensor([math.nan, -math.inf, 0.0]), t) == math.inf
    assert numerics.error(torch.tensor([1.0, -math.inf]), t) == math.inf
    assert numerics.error(torch.tensor([1.0, -math.inf, 1e-40]), t, torch.tensor([False, False, True])) == math.inf
    assert numerics.error(torch.zeros(0), torch.zeros(0, dtype=torch.float64)) == 0.0


def test_unit_roundoff_is_the_largest_relative_rounding_error():
    for dtype, bits in ((torch.float32, 24), (torch.float16, 11), (torch.bfloat16, 8)):
        u = numerics.unit_roundoff(dtype)
        assert u == 2.0**-bits
        x = 1 + torch.rand(10_000, dtype=torch.float64)
        assert 0.9 * u < float(((x.to(dtype).double() - x) / x).abs().max()) <= u


def test_missing_and_unexpected_quantities_fail():
    case = CASES.case("full", torch.float32)
    inputs = CASES.build(case, torch.device("cpu"))
    truth = numerics.truth_of(CASES, inputs, case.dtype)
    actual = CASES.run(inputs, "torch")
    actual["extra"] = actual.pop("dk")
    rows = {r.quantity: r for r in numerics.judge(case, "torch", torch.device("cpu"), actual, truth)}
    assert (rows["dk"].note, rows["extra"].note) == ("missing", "unexpected")
    assert [name for name, r in rows.items() if not r.ok] == ["dk", "extra"]


def test_cases_are_reproducible_and_cover_what_they_promise():
    cases = CASES.cases()
    assert len({(c.name, c.dtype) for c in cases}) == len(cases)
    one, two = (CASES.build(cases[5], torch.device("cpu")) for _ in range(2))
    assert all(torch.equal(one[n], two[n]) for n in ("q", "k", "v", "lo", "hi", "dout", "dlse"))
    scattered = CASES.build(CASES.case("scattered", torch.float32), torch.device("cpu"))
    empty = scattered["lo"] >= scattered["hi"]
    assert empty.any() and not empty.all() and (scattered["hi"].diff() < 0).any()
    strided = CASES.build(CASES.case("strided", torch.float32), torch.device("cpu"))
    assert not any(strided[n].is_contiguous() for n in "qkv")


# ---- the command ----------------------------------------------------------------------------------------------------


def invoke(*args):
    return CliRunner().invoke(app, ["verify", "--op", "cross_attention", *args])


def test_verify_torch_passes_and_writes_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(native_library, "obstacle", lambda op, device="cpu": "the compiled library is away")
    file = tmp_path / "deep" / "rows.json"
    result = invoke("--impl", "torch", "--impl", "native", "--json", str(file))
    assert result.exit_code == 0, result.output
    assert "not run: cross_attention x native" in result.output and "compiled library is away" in result.output
    rows = json.loads(file.read_text())
    assert {r["quantity"] for r in rows} == {"out", "lse", "dq", "dk", "dv"}
    assert {r["dtype"] for r in rows} == {"float32", "bfloat16", "float16"}
    assert all(r["ok"] and r["error"] <= r["bound"] for r in rows)
    assert "scattered" in result.output  # the table lists the cases


@pytest.mark.parametrize("wrong", [one_key_too_many, raises, nan_somewhere], ids=lambda f: f.__name__)
def test_verify_exits_1_on_a_wrong_implementation(wrong, monkeypatch, tmp_path):
    monkeypatch.setattr(OPS_MODULE, "cross_attention_torch", wrong)
    result = invoke("--impl", "torch", "--brief", "--json", str(tmp_path / "rows.json"))
    assert result.exit_code == 1
    assert "FAIL" in result.output
    if wrong is raises:
        assert "no kernel image is available" in result.output
    assert not all(r["ok"] for r in json.loads((tmp_path / "rows.json").read_text()))


def test_verify_exits_1_where_nothing_ran(monkeypatch):
    monkeypatch.setattr(native_library, "obstacle", lambda op, device="cpu": "it was not built")
    monkeypatch.setattr(run.emulation, "has_kernels", lambda op: False)
    result = invoke("--impl", "native")
    assert result.exit_code == 1 and "nothing is verified" in result.output


@pytest.mark.parametrize("args", [("--impl", "cuda"), ("--op", "attention"), ("--unknown",)])
def test_verify_bad_usage_exits_2(args):
    result = CliRunner().invoke(app, ["verify", *args])
    assert result.exit_code == 2
    assert args[-1] in result.output


def test_a_worker_that_dies_is_a_failure(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(run.sys, "executable", "/bin/false")
    part = run.Part("cross_attention", "triton", "cpu", interpreted=True)
    (row,) = run.run_part(part)
    assert not row.ok and "ended with exit code 1" in row.note
    assert run.summary([part], [row])[0]["verdict"] == "FAIL"


@pytest.mark.slow
def test_triton_runs_in_a_fresh_interpreter_process(monkeypatch):
    """Check the first rows only: the op's own tests run every case."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    part = run.Part("cross_attention", "triton", "cpu", interpreted=True)
    rows = run.run_part(part)
    first = [next(rows) for _ in range(10)]
    rows.close()
    assert all(r.ok and r.impl == "triton" for r in first), first
    assert {r.quantity for r in first} == {"out", "lse", "dq", "dk", "dv"}


# ---- CUDA kernels on a CPU -------------------------------------------------------------------------------------------


def emulated_part(op="vote"):
    return next(part for part in run.plan([op], ["native"]) if part.emulated)


def test_every_op_with_cuda_kernels_has_an_adapter():
    folder = Path(run.emulation.__file__).parent / "emulated"
    written = {file.parent.name for file in run.emulation.CSRC.glob("*/*_emulated.cpp")}
    assert written and {file.stem for file in folder.glob("*.py")} - {"__init__"} == written
    assert {op for op in run.ALL_OPS if run.emulation.has_kernels(op)} == written


def test_emulated_kernels_are_listed_as_such():
    assert str(emulated_part()) == "vote x native (cuda, emulated on the CPU)"
    assert not any(part.emulated for part in run.plan(["linear_nce"], ["native"]))


def test_emulated_kernels_without_sources_say_so(monkeypatch, tmp_path):
    monkeypatch.setattr(run.emulation, "CSRC", tmp_path / "csrc")
    part = emulated_part()
    assert "no csrc/ in this installation" in part.skipped
    assert list(run.run_part(part)) == [] and run.summary([part], [])[0]["verdict"] == "not run"


def test_what_the_emulation_finds_is_a_failed_row(monkeypatch):
    class Broken:
        @staticmethod
        def run(inputs, schedule):
            raise run.emulation.EmulationError("vote (reverse): race: reads what thread 3 of block 0 writes")

    monkeypatch.setattr(run.emulation, "obstacle", lambda op: None)
    monkeypatch.setattr(run.emulation, "adapter", lambda op: Broken)
    part = emulated_part()
    rows = list(run.run_part(part))
    assert rows and not any(row.ok for row in rows) and "race" in rows[0].note
    assert run.summary([part], rows)[0]["verdict"] == "FAIL"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: CUDA kernels cannot be emulated")
def test_emulated_kernels_pass():
    rows = list(run.run_part(emulated_part("maj_at_k")))
    assert rows and all(row.ok and row.device == run.EMULATED for row in rows)
    assert {row.quantity for row in rows} == {"accuracy", "stderr"}
