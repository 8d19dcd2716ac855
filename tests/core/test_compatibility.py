"""Statements about other packages match recorded runs: ranges, record, page, constraints and error messages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from calm_fast import env_report
from calm_fast.core import compatibility
from calm_fast.core.compatibility import IncompatibleRelease, importing, newer_than_tried, require, tried, tried_range

ROOT = Path(__file__).resolve().parents[2]


def load_lanes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("contract_lanes", ROOT / "tests" / "contract" / "lanes.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


lanes = load_lanes()
ROWS = json.loads(lanes.RECORD.read_text(encoding="utf-8"))["lanes"]


# ---- what is stated is what was run ---------------------------------------------------------------------------------


def test_the_lowest_lane_ran_every_lower_bound() -> None:
    (row,) = [row for row in ROWS if row["lane"] == "lowest"]
    assert not row["failed"] and row["passed"] > 100 and len(lanes.requirements()) > 10
    for name, requirement in lanes.requirements().items():
        assert Version(row["versions"][name]) == Version(lanes.lower_bound(requirement)), name


def test_a_major_release_of_transformers_is_not_claimed() -> None:
    assert "6.0.0" not in lanes.requirements()["transformers"].specifier
    assert "5.99.0" in lanes.requirements()["transformers"].specifier


def test_no_recorded_run_failed_and_every_lane_is_there() -> None:
    assert not [row for row in ROWS if row["failed"]]
    assert {row["lane"] for row in ROWS} >= set(lanes.LANES)
    assert [row["versions"]["transformers"] for row in ROWS if row["lane"] == "5.17"] == ["5.17.0"]


def test_the_page_is_written_from_the_record() -> None:
    text = lanes.PAGE.read_text(encoding="utf-8")
    assert lanes.page(text, ROWS) == text
    assert all(f"transformers {v}" in text or f"| {v} |" in text for v in ("5.17.0", "5.24.0"))


def test_constraints_satisfy_every_requirement() -> None:
    pinned = lanes.read_constraints(lanes.CONSTRAINTS.read_text(encoding="utf-8"))
    for name, requirement in lanes.requirements().items():
        assert pinned[name] in requirement.specifier, name
    assert {"torch", "tokenizers", "ruff"} <= pinned.keys()
    # each release of torch on the package index requires another triton
    assert not {"calm-fast", "triton"} & pinned.keys()
    assert pinned["transformers"] == tried_range("transformers")[1]


def test_the_record_is_installed_with_the_package() -> None:
    assert compatibility.RECORD == lanes.RECORD
    assert compatibility.lanes() == tuple(ROWS)


# ---- the lanes ------------------------------------------------------------------------------------------------------


def test_what_each_lane_installs() -> None:
    def asked(lane: str, *pins: str) -> dict[str, Requirement]:
        found = [Requirement(text) for text in lanes.wanted(lane, pins)]
        assert len({r.name for r in found}) == len(found)
        return {r.name: r for r in found}

    assert all(len(r.specifier) == 1 and str(r.specifier).startswith("==") for r in asked("lowest").values())
    assert str(asked("5.17")["transformers"].specifier) == "==5.17.0"
    assert str(asked("newest")["transformers"].specifier) == "<6,>=5.17"
    pinned = asked("pinned", "math-verify==0.9.0", "hf-xet==1.2")
    assert (
        str(pinned["math-verify"]) == "math-verify[antlr4_13_2]==0.9.0" and str(pinned["hf-xet"].specifier) == "==1.2"
    )
    import torch

    for lane in lanes.LANES:  # torch stays what it is, with its triton
        held = str(asked(lane)["torch"].specifier).removeprefix("==")
        assert Version(held).public == Version(torch.__version__).public and "triton" not in asked(lane)
    assert str(asked("pinned", "torch==2.0")["torch"].specifier) == "==2.0"


def test_other_tools_are_no_part_of_the_lanes() -> None:
    """CI installs the newest of the extra `integrations` in its last stage."""
    declared = [Requirement(text) for text in importlib.metadata.requires("calm-fast") or []]
    extra = {r.name for r in declared if r.marker is not None and r.marker.evaluate({"extra": "integrations"})}
    extra -= {r.name for r in declared if r.marker is None or r.marker.evaluate({"extra": ""})}
    assert "lm-eval" in extra and not extra & lanes.requirements().keys()
    assert all(lanes.lower_bound(r) for r in declared if r.name in extra)
    assert not extra & {Requirement(text).name for lane in lanes.LANES for text in lanes.wanted(lane)}


def test_differences_are_named_with_both_versions() -> None:
    before = {"transformers": "5.23.0", "torch": "2.13.0", "gone": "1"}
    now = {"transformers": "5.24.0", "torch": "2.13.0+cpu", "new": "2"}
    assert lanes.differences(now, before) == ["transformers 5.23.0 -> 5.24.0"]


def test_constraints_are_read_as_they_are_written() -> None:
    text = lanes.constraints({"torch": "2.13.0+cpu", "numpy": "2.4.6"})
    assert lanes.read_constraints(text) == {"torch": "2.13.0", "numpy": "2.4.6"}


def outcome(lane: str, failed: int, **versions: str) -> object:
    known = dict.fromkeys((*lanes.COLUMNS, *lanes.requirements(), "triton"), "1.0")
    return lanes.Outcome(lane, known | versions, 5, failed, 0, 1.0, "E  what broke")


def test_the_release_that_broke_the_suite_is_named(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("transformers==5.23.0\npeft==0.21.1\nnumpy==1.0\n", encoding="utf-8")
    monkeypatch.setattr(lanes, "CONSTRAINTS", constraints)
    tries = []

    def put_back(lane: str, packages: list[str]) -> object:
        tries.append(lane)
        return outcome(lane, failed=int("transformers==5.23.0" not in packages))

    monkeypatch.setattr(lanes, "try_lane", put_back)
    lanes.explain(outcome("newest", 3, transformers="5.24.0", peft="0.21.2"))
    told = capsys.readouterr().out
    assert tries == ["newest, but peft 0.21.1", "newest, but transformers 5.23.0"]
    assert "E  what broke" in told and "peft 0.21.1 -> 0.21.2, transformers 5.23.0 -> 5.24.0" in told
    assert "transformers 5.24.0 broke it: with transformers 5.23.0" in told and "peft 0.21.2 broke it" not in told
    monkeypatch.setattr(lanes, "try_lane", lambda lane, packages: outcome(lane, failed=1))
    lanes.explain(outcome("newest", 3, transformers="5.24.0", peft="0.21.2"))
    assert "none of them alone broke it" in capsys.readouterr().out


def test_a_lane_that_pip_cannot_install_fails_and_the_others_run(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def refuse(folder: Path, packages: list[str]) -> None:
        raise RuntimeError("pip could not")

    monkeypatch.setattr(lanes, "make_environment", refuse)
    found = lanes.try_lane("5.17", ["transformers==5.17.0"])
    assert (found.failed, found.versions, found.output) == (1, {}, "pip could not")
    lanes.explain(found)
    assert "pip could not" in capsys.readouterr().out


def test_constraints_are_written_only_for_what_the_whole_suite_saw(monkeypatch, capsys, tmp_path: Path) -> None:
    for name in ("RECORD", "PAGE", "CONSTRAINTS"):
        copy = tmp_path / getattr(lanes, name).name
        copy.write_text(getattr(lanes, name).read_text(encoding="utf-8"), encoding="utf-8")
        monkeypatch.setattr(lanes, name, copy)
    here = lanes.versions_of(sys.executable)
    other = lanes.Outcome("newest", here | {"tqdm": "99.0"}, 5, 0, 0, 1.0, "")
    lanes.CONSTRAINTS.write_text("tqdm==1.0\n", encoding="utf-8")
    lanes.record([other])
    assert f"constraints.txt stays: tqdm {here['tqdm']} -> 99.0" in capsys.readouterr().out
    lanes.record([lanes.Outcome("newest", here, 5, 0, 0, 1.0, "")])
    pinned = lanes.read_constraints(lanes.CONSTRAINTS.read_text(encoding="utf-8"))
    assert pinned["tqdm"] == here["tqdm"] and not {"triton", "pip", "calm-fast", "python"} & pinned.keys()
    assert {"huggingface-hub", "peft", "pytest"} <= pinned.keys()


def test_a_failing_lane_ends_with_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(lanes, "try_lane", lambda lane, packages: outcome(lane, failed=int(lane == "5.17")))
    assert lanes.main(["--lane", "lowest"]) == 0
    assert lanes.main([]) == 1


def test_the_record_keeps_one_row_for_each_lane_and_release() -> None:
    rows = [outcome("newest", 0, transformers=v, torch="2.13.0").row() for v in ("5.24.0", "5.9.0", "5.24.0")]
    kept = lanes.merged(rows[:2], rows[2:])
    assert [row["versions"]["transformers"] for row in kept] == ["5.9.0", "5.24.0"]
    lowest = [outcome("lowest", 0, transformers=v).row() for v in ("5.17.0", "5.18.0")]
    assert [row["versions"]["transformers"] for row in lanes.merged(lowest[:1], lowest[1:])] == ["5.18.0"]
    assert lanes.table(kept).count("\n") == 3 and "5 passed" in lanes.table(kept)


def test_a_suite_that_does_not_start_counts_as_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho broken >&2\nexit 3\n", encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(lanes, "versions_of", lambda python: {})
    found = lanes.run_suite("newest", python, tmp_path)
    assert (found.passed, found.failed, found.output) == (0, 1, "broken\n")


# ---- what errors and the report say ---------------------------------------------------------------------------------


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the installed transformers newer than any that was tried."""
    tested = {"lane": "newest", "failed": 0, "versions": {"transformers": "5.2.0", "torch": "2.13.0+cpu"}}
    older = {"lane": "lowest", "failed": 0, "versions": {"transformers": "5.1.0"}}
    broken = {"lane": "newest", "failed": 4, "versions": {"transformers": "7.0.0"}}
    monkeypatch.setattr(compatibility, "lanes", lambda: (older, tested, broken))


def test_env_says_what_is_newer_than_tested(newer: None) -> None:
    assert tried_range("transformers") == ("5.1.0", "5.2.0") and tried_range("numpy") is None
    report = env_report.collect()
    assert report["newer than tested"]["transformers"] == "5.2.0" and "numpy" not in report["newer than tested"]
    (line,) = [line for line in env_report.lines(report) if line.strip().startswith("transformers")]
    assert line.endswith(f"{report['versions']['transformers']}, newer than tested (5.2.0)")
    assert report["versions"]["transformers"].count(",") == 0


@pytest.mark.parametrize(
    ("version", "expected"),
    [("5.2.0", ""), ("5.2.1", "5.2.0"), ("5.10.0", "5.2.0"), ("5.1.9", ""), ("not installed", "")],
)
def test_versions_are_compared_as_versions(newer: None, version: str, expected: str) -> None:
    assert newer_than_tried("transformers", version) == expected
    assert newer_than_tried("torch", "2.13.0+cu130") == ""  # another build, not a newer one


def test_without_a_record_nothing_is_newer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compatibility, "RECORD", tmp_path / "absent.json")
    compatibility.lanes.cache_clear()
    try:
        assert newer_than_tried("transformers", "99.0") == "" and "was tried with" not in tried("transformers")
    finally:
        monkeypatch.undo()
        compatibility.lanes.cache_clear()


def test_a_missing_name_says_what_is_installed_and_what_was_tried(newer: None) -> None:
    import transformers

    told = f"transformers {transformers.__version__} is installed; calm_fast was tried with transformers 5.1.0 to 5.2.0"
    with pytest.raises(IncompatibleRelease, match=f"NoSuchName.*{told}") as caught, importing("transformers"):
        exec("from transformers.cache_utils import NoSuchName")
    assert isinstance(caught.value, ImportError)
    with pytest.raises(IncompatibleRelease, match=f"dict: expected the name no_such_method, got none. {told}"):
        require("transformers", dict, "keys", "no_such_method")
    with pytest.raises(ModuleNotFoundError, match="no_such_module") as other, importing("transformers"):
        importlib.import_module("no_such_module")
    assert not isinstance(other.value, IncompatibleRelease)


@pytest.mark.parametrize("door", ["calm_fast.compose", "calm_fast.score_sequences", "calm_fast.nat.run"])
def test_every_door_says_so(door: str, tmp_path: Path, forked) -> None:
    """In a process of its own, with a transformers that lacks a name which calm_fast imports."""
    code = (
        "import transformers.cache_utils, transformers.trainer_utils\n"
        "del transformers.cache_utils.CacheLayerMixin, transformers.trainer_utils.get_last_checkpoint\n"
        f"import calm_fast\n{door}\n"
    )
    done = forked.run("-c", code, cwd=tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("calm_fast.core.compatibility.IncompatibleRelease: cannot import name '")
    assert "is installed; calm_fast was tried with transformers {} to {}".format(*tried_range("transformers")) in last


def test_importing_with_a_newer_release_is_silent(tmp_path: Path) -> None:
    code = "import transformers; transformers.__version__ = '5.99.0'; import calm_fast; calm_fast.compose"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
