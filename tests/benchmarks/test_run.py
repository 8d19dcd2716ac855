"""The runner on a tiny op of its own: correct, wrong, slow, broken and missing contestants."""

from __future__ import annotations

import json
import re
import sys
import time
import types
from dataclasses import replace

import pytest
import torch

from calm_fast.benchmarks import measure as measure_module
from calm_fast.benchmarks import memory, registry, timing
from calm_fast.benchmarks.measure import ROW_FIELDS, Setting, error_bound, relative_error
from calm_fast.benchmarks.registry import CannotRunError, Case, Contestant, Target
from calm_fast.benchmarks.run import main, run
from calm_fast.benchmarks.timing import Budget

SPEC_FIELDS = {
    *("op", "case", "impl", "device", "dtype", "shape", "ms", "p20", "p80", "peak_bytes", "flops", "bytes"),
    *("floor_ms", "error", "versions", "commit", "date"),
}


def product(inputs, dtype=torch.float32):
    return {"out": inputs["a"].to(dtype) @ inputs["b"].to(dtype)}


def plain(inputs):
    return lambda: product(inputs)


def slowed(inputs):
    def thunk():
        time.sleep(0.05)
        return product(inputs)

    return thunk


def wrong(inputs):
    return lambda: {"out": product(inputs)["out"] * 1.001}


def not_a_number(inputs):
    return lambda: {"out": product(inputs)["out"].log()}


def missing_value(inputs):
    return lambda: {}


def broken(inputs):
    raise ValueError("deliberately broken")


def unavailable(inputs):
    raise CannotRunError("no such hardware")


def breaks_when_called(inputs):
    calls = []

    def thunk():
        calls.append(1)
        if inputs["a"].shape[0] > 32:
            raise MemoryError("too large")
        return product(inputs)

    return thunk


def make(seed, size=48):
    g = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(size, 32, generator=g), "b": torch.randn(32, 16, generator=g)}


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch):
    monkeypatch.setitem(timing._CEILING_SIZES, "cpu", (128, 1 << 16))  # test_timing tests the real ones


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    """Record calls of `keep` without changing the test process."""
    calls = []
    monkeypatch.setattr(memory, "keep", lambda: calls.append(1))
    return calls


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Return bench(contestants...), which runs the command line on one case: exit code, rows by impl, folder."""

    def run(*contestants, targets=(), check_make=None, name="product", options=()):
        def cases(device, suite):
            return [
                Case(
                    "tiny", name, {"M": 48, "K": 32, "N": 16}, torch.float32, 2 * 48 * 32 * 16, 4 * 2816, make,
                    contestants, product, contestants[0].name, check_make, targets,
                )
            ]  # fmt: skip

        module = types.ModuleType("tiny_cases")
        module.cases = cases
        monkeypatch.setitem(sys.modules, "tiny_cases", module)
        monkeypatch.setitem(registry.REGISTRY, "tiny", "tiny_cases")
        out = tmp_path / "out"
        code = main(["--op", "tiny", "--device", "cpu", "--seconds", "0", "--out", str(out), *options])
        rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        return code, {row["impl"]: row for row in rows}, out

    yield run
    torch.set_num_threads(1)


def test_row_has_the_fields_of_the_contract(bench):
    code, rows, _ = bench(Contestant("fast", plain, ours=True), Contestant("baseline", plain))
    assert code == 0
    assert set(rows) == {"fast", "baseline"}
    for row in rows.values():
        assert SPEC_FIELDS <= set(row) == set(ROW_FIELDS)
        assert row["op"] == "tiny" and row["case"] == "product" and row["dtype"] == "float32"
        assert row["shape"] == {"M": 48, "K": 32, "N": 16}
        assert 0 < row["p20"] <= row["ms"] <= row["p80"]
        assert row["peak_bytes"] >= 48 * 16 * 4
        assert row["flops"] == 49152 and row["bytes"] == 11264 and row["floor_ms"] > 0
        assert 0 <= row["error"] <= row["bound"]
        assert row["versions"]["torch"] == torch.__version__
        assert row["failure"] is None and row["rounds"] >= 5
        assert row["date"].startswith("20") and "thread" in row["device"]


@pytest.mark.parametrize("prepare", [wrong, not_a_number, missing_value])
@pytest.mark.parametrize("ours", [True, False])
def test_wrong_values_have_no_speed_and_exit_1(bench, capsys, prepare, ours):
    code, rows, out = bench(Contestant("fast", plain, ours=True), Contestant("suspect", prepare, ours=ours))
    assert code == 1
    suspect = rows["suspect"]
    assert suspect["ms"] is suspect["p20"] is suspect["p80"] is suspect["peak_bytes"] is None
    assert suspect["failure"].startswith("wrong: error")
    assert suspect["error"] is None or suspect["error"] > suspect["bound"]
    assert rows["fast"]["ms"] > 0
    assert "RED product suspect" in capsys.readouterr().err
    assert "no time" in (out / "report.md").read_text()
    assert "**WRONG** suspect: wrong: error" in (out / "report.md").read_text()
    assert '<span class="goal wrong">suspect: wrong: error' in (out / "report.html").read_text()


def test_slow_implementation_shows_in_the_ratio(bench, capsys):
    target = Target("fast", "slow", 10.0)
    code, rows, out = bench(Contestant("fast", plain, ours=True), Contestant("slow", slowed), targets=(target,))
    assert code == 0
    assert rows["slow"]["ms"] >= 50 and rows["slow"]["ms"] / rows["fast"]["ms"] > 10
    assert re.search(r">= 10x slow: \d+x, met", (out / "report.md").read_text())
    assert re.search(r">= 10x slow: \d+x, met", capsys.readouterr().out)


def test_a_hopeless_baseline_runs_once_or_twice(bench):
    """One that takes eight times as long and would alone spend the budget: its ratio is clear."""
    calls = []

    def hopeless(inputs):
        def thunk():
            calls.append(1)
            time.sleep(1.0)
            return product(inputs)

        return thunk

    contestants = Contestant("fast", plain, ours=True), Contestant("slow", slowed), Contestant("hopeless", hopeless)
    code, rows, _ = bench(*contestants, options=["--seconds", "1.5"])
    assert code == 0 and rows["fast"]["rounds"] > 5 and rows["slow"]["rounds"] >= 5
    assert (
        rows["hopeless"]["rounds"] == 2 and rows["hopeless"]["p20"] <= rows["hopeless"]["ms"] <= rows["hopeless"]["p80"]
    )
    assert len(calls) == 3, "the check, a call for time and memory, and one more"
    assert rows["hopeless"]["peak_bytes"] >= 48 * 16 * 4


def test_a_row_says_what_the_floor_is_derived_from(bench):
    _, rows, _ = bench(Contestant("fast", plain, ours=True), Contestant("baseline", plain))
    ceiling = rows["fast"]["ceiling"]
    assert set(ceiling) == {"flops_per_s", "bytes_per_s", "product"} and ceiling["product"].endswith("float32")
    floor = max(49152 / ceiling["flops_per_s"], 11264 / ceiling["bytes_per_s"])
    assert rows["fast"]["floor_ms"] == pytest.approx(1e3 * floor)


def test_missed_target_is_reported_but_no_failure(bench, capsys):
    target = Target("slow", "fast", 1.0)
    code, _, out = bench(Contestant("slow", slowed, ours=True), Contestant("fast", plain), targets=(target,))
    assert code == 0
    assert re.search(r">= 1x fast: 1/\d+x, missed", capsys.readouterr().out)
    assert "1 missed" in (out / "report.md").read_text()
    assert '<span class="goal missed">' in (out / "report.html").read_text()


def test_baseline_that_breaks_or_cannot_run_is_a_row_but_no_failure(bench):
    code, rows, _ = bench(
        Contestant("fast", plain, ours=True), Contestant("broken", broken), Contestant("elsewhere", unavailable)
    )
    assert code == 0
    assert rows["broken"]["failure"] == "failed: ValueError: deliberately broken"
    assert rows["elsewhere"]["failure"] == "cannot run: no such hardware"
    assert rows["broken"]["ms"] is None and rows["broken"]["error"] is None


def test_ours_that_breaks_exits_1(bench):
    assert bench(Contestant("fast", broken, ours=True), Contestant("baseline", plain))[0] == 1


def test_ours_that_breaks_at_full_size_only_exits_1(bench):
    code, rows, _ = bench(
        Contestant("fast", breaks_when_called, ours=True), check_make=lambda seed: make(seed, size=16)
    )
    assert code == 1
    assert rows["fast"]["ms"] is None and "MemoryError" in rows["fast"]["failure"]


def test_a_contestant_is_checked_against_its_own_definition(bench):
    def doubled(inputs, dtype):
        return {"out": 2 * product(inputs, dtype)["out"]}

    other = Contestant("double", lambda inputs: lambda: doubled(inputs, torch.float32), definition=doubled)
    code, rows, _ = bench(Contestant("fast", plain, ours=True), other)
    assert code == 0 and rows["double"]["ms"] > 0


def test_reports_are_written_and_need_no_other_file(bench):
    _, _, out = bench(
        Contestant("fast", plain, ours=True), Contestant("<baseline> & co", plain), name="product <of> two"
    )
    text = (out / "report.html").read_text()
    assert "<svg" in text and "&lt;baseline&gt; &amp; co" in text and "<baseline>" not in text
    for loads in ("<script", "<link", "@import", 'src="http', 'href="http'):
        assert loads not in text
    assert "| product <of> two | fast |" in (out / "report.md").read_text()


def test_a_stopped_run_keeps_the_cases_it_finished(tmp_path):
    def stopped(inputs):
        raise KeyboardInterrupt

    def case(name, prepare):
        return Case("tiny", name, {"M": 48}, torch.float32, 1, 1, make, [Contestant("ours", prepare)], product, "ours")

    setting = Setting(torch.device("cpu"), "cpu", {}, None, Budget(0.0, min_rounds=1, warmup=0))
    with pytest.raises(KeyboardInterrupt):
        run([case("first", plain), case("second", stopped)], setting, tmp_path)
    assert [json.loads(line)["case"] for line in (tmp_path / "results.jsonl").read_text().splitlines()] == ["first"]
    assert "| first | ours |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize("imported", [True, False])
def test_compiled_code_of_one_case_is_forgotten_before_the_next(imported, bench, monkeypatch):
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    if imported:
        monkeypatch.setitem(sys.modules, "torch._dynamo", types.ModuleType("torch._dynamo"))
    else:
        monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    bench(Contestant("ours", plain, ours=True))
    assert len(resets) == (2 if imported else 0)  # before the check and, as shapes differ, before timing


def test_relative_error_takes_the_worst_value():
    truth = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0])}
    actual = {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([1.0])}
    assert relative_error(actual, truth) == pytest.approx(0.1)
    assert relative_error({"a": truth["a"]}, truth) == float("inf")
    assert relative_error({**actual, "b": torch.tensor([float("nan")])}, truth) == float("inf")
    assert relative_error({**actual, "b": torch.tensor([1.0, 1.0])}, truth) == float("inf")


def test_relative_error_where_the_truth_is_zero():
    truth = {"a": torch.zeros(2)}
    assert relative_error({"a": torch.zeros(2)}, truth) == 0.0
    assert relative_error({"a": torch.tensor([0.0, 1e-30])}, truth) == float("inf")


def test_error_bound_grows_with_the_plain_error_and_the_dtype():
    assert error_bound(1e-3, torch.bfloat16) == pytest.approx(2e-3 + 2**-8)
    assert error_bound(0.0, torch.float32) == pytest.approx(2**-24)


def test_cold_is_said_in_every_row(bench):
    _, rows, _ = bench(Contestant("fast", plain, ours=True), Contestant("baseline", plain), options=["--cold"])
    assert all(row["device"].endswith(", cold cache") for row in rows.values())


@pytest.mark.skipif(memory.obstacle() is not None, reason=str(memory.obstacle()))
def test_memory_is_kept_unless_the_rows_say_otherwise(bench, kept):
    contestants = Contestant("fast", plain, ours=True), Contestant("baseline", plain)
    _, rows, _ = bench(*contestants)
    assert kept == [1] and not any("memory" in row["device"] for row in rows.values())
    _, rows, out = bench(*contestants, options=["--memory", "system"])
    assert kept == [1] and all(row["device"].endswith(", memory from the system") for row in rows.values())
    assert all(", memory from the system" in (out / f"report.{kind}").read_text() for kind in ("md", "html"))


def test_another_c_library_is_said_and_kept_is_refused_there(bench, kept, monkeypatch, capsys):
    monkeypatch.setattr(memory, "_c_library", object)
    contestants = Contestant("fast", plain, ours=True), Contestant("baseline", plain)
    _, rows, _ = bench(*contestants)
    assert all(row["device"].endswith(", memory from the system") for row in rows.values())
    assert "bench: memory from the system: only glibc can be told" in capsys.readouterr().err
    assert main(["--op", "tiny", "--device", "cpu", "--memory", "kept"]) == 2 and kept == []
    assert "bench: --memory kept: only glibc can be told" in capsys.readouterr().err


def test_a_case_takes_its_share_of_the_time():
    whole = Case("tiny", "a", {}, torch.float32, 1, 1, make, [], product, "")
    setting = Setting(torch.device("cpu"), "cpu", {}, None, Budget(10.0, min_rounds=3))
    assert setting.budget_of(whole) == setting.budget
    assert setting.budget_of(replace(whole, share=0.3)) == Budget(3.0, min_rounds=3)


def test_other_contestants_are_close_to_the_headline_of_the_case(bench, monkeypatch):
    given = []
    whole = measure_module.interleave

    def seen(thunks, device, budget, cold, headline, slow):
        given.append((headline, {name for name in thunks if not name.startswith(timing._CEILING)}))
        return whole(thunks, device, budget, cold, headline, slow)

    monkeypatch.setattr(measure_module, "interleave", seen)
    assert bench(Contestant("fast", plain, ours=True), Contestant("baseline", plain))[0] == 0
    assert given == [("fast", {"fast", "baseline"})]


def test_no_matching_case_is_a_usage_error(capsys):
    assert main(["--op", "cross_attention", "--device", "cpu", "--case", "no such case"]) == 2
    assert "no case matches" in capsys.readouterr().err


def test_list_names_cases_and_contestants(capsys):
    assert main(["--device", "cpu", "--list"]) == 0
    text = capsys.readouterr().out
    assert "x4_layer_inference" in text and "unfolded_sdpa" in text and "x3_intervals" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_asking_for_a_gpu_where_there_is_none(capsys):
    assert main(["--device", "cuda"]) == 2
    assert "sees no GPU" in capsys.readouterr().err


def test_unknown_op_and_suite_are_named():
    with pytest.raises(ValueError, match="`op` must be one of 'cross_attention'"):
        registry.cases("nothing", torch.device("cpu"), "quick")
    with pytest.raises(ValueError, match="`suite` must be one of 'quick', 'full', got 'huge'"):
        registry.cases("cross_attention", torch.device("cpu"), "huge")
