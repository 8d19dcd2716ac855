"""Measuring launch configs, as far as it can be tested without a GPU: candidates, screening, the written file."""

from __future__ import annotations

import importlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from calm_fast.benchmarks import tune
from calm_fast.benchmarks.tune_problems import OPS, Problem, problems
from calm_fast.benchmarks.tune_screen import Screen
from calm_fast.core.launch_config import LaunchConfig

H200 = "NVIDIA H200"


@dataclass(frozen=True, kw_only=True)
class TileConfig(LaunchConfig):
    block_m: int


def tile(block_m: int) -> TileConfig:
    return TileConfig(block_m=block_m, num_warps=4, num_stages=1)


def forget() -> None:
    """Drop the choices that kernels keep."""
    from calm_fast.kernels.common import config_table

    config_table._chosen.cache_clear()
    config_table._measured.cache_clear()


@pytest.fixture
def faked_gpu(monkeypatch, tmp_path):
    """fake(arch): kernels take the device for an H200 of that architecture, with tuned files in tmp_path."""
    from calm_fast.kernels.common import config_table, hardware

    def fake(arch: int) -> Path:
        monkeypatch.setattr(hardware, "gpu", lambda device: hardware.Gpu(H200, arch, 132))
        monkeypatch.setattr(config_table, "KERNELS", tmp_path)
        forget()
        return tmp_path

    yield fake
    forget()


def looked_up(problem: Problem) -> LaunchConfig:
    """The config that the op's launcher takes for the problem's shape."""
    configs = importlib.import_module(f"calm_fast.kernels.{problem.op}.configs")
    sizes = {
        "cross_attention": lambda: configs.table_size(problem.depth),
        "dual_lora": lambda: configs.table_size(problem.shape["T"], problem.depth),
    }
    size = sizes.get(problem.op, lambda: "plain")()
    device = torch.device("cuda", 0)
    return configs.TABLES[problem.part].pick(device, torch.bfloat16, size, problem.depth, problem.shape, False)


@pytest.mark.parametrize("op", OPS)
def test_every_problem_has_distinct_measured_and_its_own_place_in_the_file(op):
    found = problems((op,))
    places = [(p.part, p.depth, tuple(p.shape.items())) for p in found]
    assert len(places) == len(set(places)) > 1
    for problem in found:
        assert 4 <= len(problem.candidates) == len(set(problem.candidates)), problem.name
        for arch in (80, 90, 100):
            assert {type(c) for c in (*problem.candidates, problem.default(arch))} == {problem.kind}


def test_the_split_of_a_sweep_is_never_tuned():
    """It decides a token's bits, which must not depend on whether a measured file exists."""
    for problem in problems(("linear_nce", "linear_logprob")):
        if problem.part == "sweep":
            assert {c.split_v for c in problem.candidates} == {problem.default(90).split_v}


def test_dry_run_names_every_kernel_every_candidate_and_the_time(capsys):
    assert tune.main(["--dry-run", "--seconds", "100", "--processes", "14"]) == 0
    out = capsys.readouterr().out
    every = problems()
    assert all(f"{p.name}: {len(p.candidates)} candidates" in out for p in every)
    assert out.count(" stages") == sum(len(p.candidates) for p in every)
    assert f"{len(every)} kernels and shapes" in out and "at most 100 s (" in out
    names = [line.split(":")[0] for line in out.splitlines() if line.endswith(" candidates")]
    first = [name for name in names if any(f"depth {d} " in name for d in (128, 4096, 32))]
    assert names[: len(first)] == first  # the most common depths come first


def test_dry_run_of_one_op_takes_less(capsys):
    times = []
    for args in ([], ["--op", "linear_nce"]):
        tune.main(["--dry-run", "--seconds", "1e6", "--processes", "8", *args])
        times.append(int(capsys.readouterr().out.rsplit("at most ")[1].split()[0]))
    assert 0 < times[1] < times[0] / 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(capsys, tmp_path):
    assert tune.main(["--out", str(tmp_path)]) == 2
    assert "sees no GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_without_a_file_the_defaults_of_the_architecture_are_taken(faked_gpu, arch):
    faked_gpu(arch)
    for problem in problems():
        assert looked_up(problem) == problem.default(arch), problem.name


def test_what_tune_writes_is_what_the_launchers_take(faked_gpu, capsys):
    folder = faked_gpu(90)
    chosen = {}
    for op in OPS:
        entries = []
        for problem in problems((op,)):
            config = next(c for c in problem.candidates if c != problem.default(90))
            chosen[problem.name] = config
            place = {"part": problem.part, "dtype": "bfloat16", "head_dim": problem.depth, "shape": problem.shape}
            entries.append(place | {"config": tune.asdict(config), "ms": 1.0, "ms_before": 2.0})
        path = tune.write(folder, op, H200, entries)
        assert path == folder / op / "tuned" / "nvidia_h200.json"
        document = json.loads(path.read_text())
        assert document["op"] == op and document["gpu"] == H200 and "torch" in document["versions"]
        assert len(document["entries"]) == len(entries)
    for problem in problems():
        assert looked_up(problem) == chosen[problem.name], problem.name


def test_a_second_run_replaces_what_it_measured_and_keeps_the_rest(tmp_path):
    def entry(part: str, block: int) -> dict:
        config = tune.asdict(tile(block))
        return {"part": part, "dtype": "bfloat16", "head_dim": 64, "shape": {"M": 1, "N": 2}, "config": config}

    tune.write(tmp_path, "cross_attention", H200, [entry("fwd", 16), entry("dq", 16)])
    path = tune.write(tmp_path, "cross_attention", H200, [entry("fwd", 32)])
    found = {e["part"]: e["config"]["block_m"] for e in json.loads(path.read_text())["entries"]}
    assert found == {"dq": 16, "fwd": 32}


def test_a_group_that_the_deadline_cuts_short_is_not_written(monkeypatch, faked_gpu):
    """With the config of many tokens alone, decoding would be launched with it as well."""
    faked_gpu(90)
    todo = [job for job in tune.jobs(("dual_lora",)) if job[2].depth == 32]
    measured = []

    class NoScreen:
        def __init__(self, *args):
            pass

        def submit(self, *args):
            pass

        close = submit

    def best(run, present, configs, device, deadline):
        measured.append(present)
        if len(measured) == 3:
            monkeypatch.setattr(time, "monotonic", lambda: deadline + 1)
        return present, 1.0, 1.0

    monkeypatch.setattr(tune, "Screen", NoScreen)
    monkeypatch.setattr(tune, "best_config", best)
    found = list(tune.tune(todo, torch.device("meta"), time.monotonic() + 600, 1))
    assert len(measured) == 3 and len(found) == 1  # both of update; of mix only one
    ((op, entries),) = found
    assert op == "dual_lora" and [e["part"] for e in entries] == ["update", "update"]
    assert sorted(e["shape"]["T"] for e in entries) == [16, 8192]


@pytest.mark.slow
def test_screening_lets_the_defaults_through_and_stops_what_cannot_run():
    pytest.importorskip("triton")
    from calm_fast.kernels.dual_lora.configs import tile as dual_lora_tile

    index, update = next((i, p) for i, p in enumerate(problems(("dual_lora",))) if p.part == "update")
    spilling, wide = dual_lora_tile(128, 256, 4, 2), dual_lora_tile(256, 256, 8, 8)
    screen = Screen(90, 1)
    for config in (update.default(90), spilling, wide):
        screen.submit("dual_lora", index, config)
    answers = [screen.problems_of("dual_lora", index, c, 300) for c in (update.default(90), spilling, wide)]
    screen.close()
    assert answers[0] == []
    assert any("spills" in text for text in answers[1]), answers
    assert answers[2]


def test_tuning_takes_the_fastest_that_agrees():
    present, fast, wrong, broken = (tile(m) for m in (16, 32, 64, 128))

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
    present, other = tile(16), tile(32)
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
