"""README's tables of results: the newest committed rows of every case, and the cases without rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from calm_fast.benchmarks import machine, results_table
from calm_fast.benchmarks.registry import REGISTRY, cases
from calm_fast.benchmarks.results_table import BEGIN, END, insert, kind, listed, main, newest, read, render

ROOT = Path(__file__).resolve().parents[2]
CPU, GPU = "AMD EPYC, 1 thread", "NVIDIA H200"


def row(impl, ms, case="v1_vote", device=CPU, date="2026-01-01", commit="aaaaaaabbb", failure=None, ours=None):
    return {
        "op": "vote", "case": case, "impl": impl, "device": device, "dtype": "float32", "shape": {"Q": 5000, "K": 64},
        "ms": ms, "p20": ms, "p80": ms, "peak_bytes": 1000, "flops": 1, "bytes": 1, "floor_ms": 0.5, "error": 0.0,
        "versions": {"torch": "2.13"}, "commit": commit, "date": f"{date}T00:00:00+00:00",
        "ours": impl.startswith("calm_fast") if ours is None else ours, "bound": 1.0, "failure": failure, "rounds": 5,
    }  # fmt: skip


def written(folder, *files):
    for i, rows in enumerate(files):
        (folder / f"{i}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return read(sorted(folder.glob("*.jsonl")))


def line_of(text, name):
    (line,) = (line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
    return line


def test_readme_is_up_to_date():
    assert main(["--check"]) == 0, "run `make results`"


def test_gpu_cases_without_rows_share_one_line_with_their_targets():
    text = "\n".join(results_table.section([], "cuda"))
    wanted = [c for op in REGISTRY for c in cases(op, torch.device("cuda"), "quick") if c.targets and c.series is None]
    assert len(wanted) > 15
    (line,) = (line for line in text.splitlines() if line.startswith("Not measured on a GPU yet"))
    goals = sum(len(case.targets) for case in wanted)
    assert f"({goals} targets of {len(wanted)} cases)" in line and "| `" not in text
    groups = line.split(": ", 1)[1].split("; ")  # cases with the same targets stand together
    for case in wanted:
        (group,) = (g for g in groups if f"`{case.name}`" in g.split(": ")[0].split(", "))
        assert len(group.split(": ")[1].split(", ")) == len(case.targets)
    assert ">= 1.5x compiled_eager, >= 1.2x compiled_unfolded_sdpa, >= 2x less memory than eager" in line


def test_the_newest_rows_of_a_case_win_whatever_their_file(tmp_path):
    old = [row("calm_fast", 4.0), row("counter", 8.0)]
    new = [row("calm_fast", 1.0, date="2026-03-01"), row("counter", 30.0, date="2026-03-01")]
    other = [row("calm_fast", 1.0, "v1_vote_weighted"), row("counter", 5.0, "v1_vote_weighted")]
    text = render(written(tmp_path, new, [*old, *other]))
    assert "**30.0x** counter" in line_of(text.split("### GPU")[0], "v1_vote")
    assert "**5.00x** counter" in line_of(text.split("### GPU")[0], "v1_vote_weighted")
    assert "2026-03-01." in text and "aaaaaaa |" in text


def test_two_runs_in_one_file_are_not_mixed(tmp_path):
    first = [row("calm_fast", 4.0), row("counter", 8.0), row("numpy", 6.0)]
    second = [row("calm_fast", 1.0, date="2026-02-01"), row("counter", 30.0, date="2026-02-01")]
    groups = written(tmp_path, [*first, *second])
    assert [len(group) for group in groups] == [3, 2]
    assert [r["impl"] for r in newest(groups, "cpu")["v1_vote"]] == [
        "calm_fast",
        "counter",
    ]  # numpy: another run


def test_cpu_and_gpu_are_apart_and_absolute_times_are_the_gpus(tmp_path):
    gpu = [row("calm_fast", 2.0, device=GPU), row("counter", 80.0, device=GPU)]
    cpu = [row("calm_fast", 1.0), row("counter", 30.0)]
    above, below = render(written(tmp_path, [*gpu, *cpu])).split("### GPU")
    assert "| **30.0x** counter |" in line_of(above, "v1_vote") and "ms" not in line_of(above, "v1_vote")
    assert "| 2 ms, **40.0x** counter |" in line_of(below, "v1_vote")
    assert CPU in above and GPU not in above and GPU in below


def test_cold_runs_and_unknown_cases_are_left_out(tmp_path):
    cold = [row("calm_fast", 1.0, device=f"{CPU}, cold cache"), row("counter", 30.0, device=f"{CPU}, cold cache")]
    text = render(written(tmp_path, [*cold, row("calm_fast", 1.0, case="retired")]))
    assert "30.0x" not in text and "retired" not in text


def test_memory_from_the_system_counts_where_there_are_no_other_rows(tmp_path):
    system = f"{CPU}, memory from the system"
    late = [row("calm_fast", 1.0, device=system, date="2026-05-01"), row("counter", 9.0, device=system)]
    alone = [row("calm_fast", 1.0, "v1_vote_weighted", system), row("counter", 5.0, "v1_vote_weighted", system)]
    kept = [row("calm_fast", 1.0), row("counter", 30.0), row("numpy", 40.0)]
    text = render(written(tmp_path, late, [*alone, *kept])).split("### GPU")[0]
    assert "| **30.0x** counter, 40.0x numpy |" in line_of(text, "v1_vote")
    assert "**5.00x** counter" in line_of(text, "v1_vote_weighted")
    assert f"{CPU}; torch" in text and f"{system}; torch" in text


def test_a_narrower_lane_counts_where_there_are_no_other_rows(tmp_path):
    narrow = f"{CPU}, lane avx2"
    late = [row("calm_fast", 1.0, device=narrow, date="2026-05-01"), row("counter", 9.0, device=narrow)]
    alone = [row("calm_fast", 1.0, "v1_vote_weighted", narrow), row("counter", 5.0, "v1_vote_weighted", narrow)]
    own = [row("calm_fast", 1.0), row("counter", 30.0)]
    text = render(written(tmp_path, late, [*alone, *own])).split("### GPU")[0]
    assert "| **30.0x** counter |" in line_of(text, "v1_vote")
    assert "**5.00x** counter" in line_of(text, "v1_vote_weighted")


def test_wrong_rows_are_named(tmp_path):
    bad = row("calm_fast", None, failure="wrong: error 1 against float64 exceeds the bound 0")
    line = line_of(render(written(tmp_path, [bad, row("counter", 30.0)])).split("### GPU")[0], "v1_vote")
    assert "**wrong**" in line and "met" not in line


def test_writing_twice_changes_nothing_and_keeps_the_rest(tmp_path, capsys):
    written(tmp_path, [row("calm_fast", 1.0), row("counter", 30.0)])
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nstale words\n{END}\nafter\n")
    arguments = ["--readme", str(readme), "--results", str(tmp_path)]
    assert main([*arguments, "--check"]) == 1 and "stale words" in readme.read_text()
    assert main(arguments) == 0
    once = readme.read_text()
    assert once.startswith(f"before\n{BEGIN}\n") and once.endswith(f"{END}\nafter\n") and "stale words" not in once
    assert main([*arguments, "--check"]) == 0 and main(arguments) == 0 and readme.read_text() == once
    assert "unchanged" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["nothing", BEGIN, f"{END} {BEGIN}", f"{BEGIN} {END} {BEGIN} {END}"])
def test_missing_markers_are_an_error(text, tmp_path, capsys):
    with pytest.raises(ValueError, match="README.md needs one line"):
        insert(text, "block")
    (tmp_path / "README.md").write_text(text)
    assert main(["--readme", str(tmp_path / "README.md"), "--results", str(tmp_path)]) == 2
    assert "README.md needs" in capsys.readouterr().err


def test_a_line_that_is_no_row_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(row("calm_fast", 1.0)) + '\n{"case": 1}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not a row"):
        read([tmp_path / "a.jsonl"])


def test_kind_follows_from_the_device_name():
    assert kind({"device": machine.device_name(torch.device("cpu"))}) == "cpu"
    assert kind({"device": GPU}) == "cuda"


def test_a_measured_case_of_the_full_suite_is_listed_too():
    quick = [c.name for c in listed("cpu", [])]
    assert "x4_layer_inference_causal" not in quick
    assert "x4_layer_inference_causal" in [c.name for c in listed("cpu", ["x4_layer_inference_causal"])]
