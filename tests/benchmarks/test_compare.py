"""`bench --compare`: two revisions side by side, in a temporary checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from calm_fast.benchmarks import compare, machine, older_layout, registry, timing
from calm_fast.benchmarks.compare import FASTER, SAME, SLOWER, CompareError, Pair, judge
from calm_fast.benchmarks.compare_worker import Worker, rivals
from calm_fast.benchmarks.report import comparison
from calm_fast.benchmarks.run import main
from calm_fast.benchmarks.timing import Times

ROOT = Path(__file__).resolve().parents[2]
SLOWED = """
_fast_vote = vote


def vote(*args, **kwargs):
    import time

    time.sleep(0.03)
    return _fast_vote(*args, **kwargs)
"""


def git(repo: Path, *args: str) -> str:
    named = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *named, *args], cwd=repo, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repo(tmp_path):
    """Return a git checkout with the library and the benchmarks, without the compiled library."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    made = tmp_path / "repo"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "results")
    for folder in ("calm_fast", "kernels", "benchmarks"):
        shutil.copytree(ROOT / folder, made / folder, ignore=ignore)
    git(made, "init", "-q")
    git(made, "add", "-A")
    git(made, "commit", "-q", "-m", "before")
    return made


def bench(repo: Path, *args: str) -> subprocess.CompletedProcess[str]:
    site = repo.parent / "site"
    if not site.exists():
        compare.stage(repo, repo / "benchmarks", site)
    command = [sys.executable, "-m", "calm_fast.benchmarks.run", "--device", "cpu", "--out", str(repo.parent / "out")]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run([*command, *args], cwd=site, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_slowed_checkout_is_flagged_and_exits_3(repo):
    before = git(repo, "rev-parse", "HEAD")
    with (repo / "calm_fast/_ops/vote/api.py").open("a") as source:
        source.write(SLOWED)
    arguments = ("--op", "vote", "--case", "v1_vote_weighted", "--seconds", "0", "--compare", "HEAD")
    done = bench(repo, *arguments)
    assert done.returncode == 3, done.stdout + done.stderr
    report = (repo.parent / "out/report.md").read_text()
    (line,) = (line for line in report.splitlines() if line.startswith("| v1_vote_weighted | calm_fast |"))
    assert line.endswith("| SLOWER |")
    assert "counter (control)" in report and "the other revision has no compiled library" in report
    rows = [json.loads(line) for line in (repo.parent / "out/results.jsonl").read_text().splitlines()]
    mine, theirs = (row for row in rows if row["impl"] == "calm_fast")
    assert (mine["commit"], theirs["commit"]) == (f"{before}-dirty", before)
    assert mine["ms"] >= 30 > theirs["ms"] and mine["failure"] is None
    assert all(row["ms"] is None and row["failure"].startswith("cannot run") for row in rows if "native" in row["impl"])
    assert git(repo, "worktree", "list").count("\n") == 0  # nothing is left behind


def test_an_unknown_revision_is_named(repo, monkeypatch, capsys, tmp_path):
    def in_repo(*args):
        done = subprocess.run(["git", *args], cwd=repo, capture_output=True, text=True)
        return None if done.returncode else done.stdout.strip()

    monkeypatch.setattr(machine, "git", in_repo)
    monkeypatch.setattr(machine, "checkout", lambda: repo)
    assert compare.revision("HEAD") == (repo, git(repo, "rev-parse", "HEAD"))
    for name in ("no-such-revision", "--help"):
        assert main(["--device", "cpu", "--op", "vote", f"--compare={name}", "--out", str(tmp_path)]) == 2
        assert f"`--compare` must be a revision of the checkout {repo}, got '{name}'" in capsys.readouterr().err


def test_outside_a_checkout_there_is_nothing_to_compare_with(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(machine, "checkout", lambda: None)
    code = main(["--device", "cpu", "--op", "vote", "--compare", "HEAD", "--out", str(tmp_path)])
    assert code == 2 and "`--compare` needs a git checkout" in capsys.readouterr().err
    with pytest.raises(CompareError):
        compare.revision("HEAD")


@pytest.mark.parametrize(
    ("pairs", "verdict"),
    [
        ([(1.0, 1.0)] * 7, SAME),
        ([(1.2, 1.0)] * 7, SLOWER),
        ([(1.0, 1.2)] * 7, FASTER),
        ([(1.04, 1.0)] * 7, SAME),  # within the threshold
        ([(1.2, 1.0)] * 4 + [(0.9, 1.0)] * 3, SAME),  # the pairs disagree
        ([(1.2, 1.0)] * 9 + [(0.5, 1.0)], SLOWER),
    ],
)
def test_a_change_is_large_and_most_pairs_agree(pairs, verdict):
    ratio = judge(pairs)
    assert Pair("op", "case", "impl", False, ratio, ratio, ratio).verdict == verdict


class Recorder:
    """A side that records its commands."""

    def __init__(self, name, log, ms):
        self.name, self.log, self.ms = name, log, ms

    def ask(self, do, impl, calls):
        self.log.append((self.name, calls))
        return [self.ms] * calls


def test_sides_take_turns_in_short_runs():
    log = []
    now, other = Recorder("now", log, 10.0), Recorder("other", log, 20.0)
    pairs = compare.take_turns(now, other, ["a"], timing.Budget(seconds=0.0, min_rounds=3))
    assert pairs == {"a": [(10.0, 20.0)] * 3}
    assert [name for name, _ in log] == ["now", "other", "now", "other", "other", "now", "now", "other"]
    assert {calls for _, calls in log[2:]} == {2}  # about 40 ms of the slower one


def test_worker_checks_before_it_times(monkeypatch):
    monkeypatch.setitem(timing._CEILING_SIZES, "cpu", (128, 1 << 16))
    worker = Worker("cpu", torch.get_num_threads(), False, 0, "abc", "system")
    assert worker.setting.device_name.endswith(", memory from the system")
    (case,) = (c for c in registry.cases("vote", torch.device("cpu"), "quick") if c.name == "v1_vote")
    assert rivals(case) == ["calm_fast", "calm_fast_native", "calm_fast_torch", "counter"]
    opened = worker.open("vote", "v1_vote", "quick")
    assert {"calm_fast", "calm_fast_torch", "counter"} <= set(opened["can"])
    samples = {"calm_fast": worker.time("calm_fast", 3), "counter": worker.time("counter", 1)}
    rows = {row["impl"]: row for row in worker.rows(samples, worker.ceilings())}
    assert rows["calm_fast"]["ms"] > 0 and rows["calm_fast"]["rounds"] == 3 and rows["counter"]["ms"] > 0
    assert rows["calm_fast"]["commit"] == "abc" and rows["calm_fast_torch"]["ms"] is None


@pytest.mark.parametrize(("ratio", "code"), [(None, 2), (Times(1.0, 1.0, 1.0, 7), 0)])
def test_nothing_compared_exits_2(ratio, code, monkeypatch, capsys, tmp_path):
    always = Times(1.0, 1.0, 1.0, 7)  # the control runs on every revision
    pairs = [
        Pair("vote", "v1_vote", "calm_fast", False, ratio, ratio, ratio, None if ratio else "other: failed"),
        Pair("vote", "v1_vote", "counter", True, always, always, always, None),
    ]
    rows = [{"commit": "now", "ours": True, "failure": None}]
    monkeypatch.setattr(compare, "compare", lambda *args: (pairs, rows))
    assert main(["--device", "cpu", "--op", "vote", "--compare", "HEAD", "--out", str(tmp_path)]) == code
    assert ("no implementation ran on both sides" in capsys.readouterr().err) == (code == 2)


def test_an_older_library_answers_to_todays_module_names(tmp_path):
    """A library whose ops are files of `calm_fast/ops`, in a fresh process."""
    library = tmp_path / "calm_fast"
    for older in set(older_layout.MODULES.values()):
        file = tmp_path / f"{older.replace('.', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(f"def where():\n    return {older!r}\n")
    (library / "benchmarks").symlink_to(ROOT / "benchmarks")
    script = (
        "from calm_fast.benchmarks import compare_worker, older_layout\n"
        "compare_worker.only_staged()\nolder_layout.bridge()\n"
        "from calm_fast._ops.vote.api import where\nfrom calm_fast._ops.vote.reference import where as reference\n"
        "from calm_fast.core import native_library\nprint(where(), reference(), native_library.where())"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["calm_fast.ops.vote", "calm_fast.reference.vote", "calm_fast._native"], done.stderr


def test_todays_library_is_left_alone():
    before = {name: module for name, module in sys.modules.items() if name.startswith("calm_fast")}
    older_layout.bridge()
    assert {name: module for name, module in sys.modules.items() if name.startswith("calm_fast")} == before


def test_internal_modules_that_cases_import_have_an_older_name():
    imported = re.compile(r"from (calm_fast\.(?:_ops|core)[\w.]*) import (\w+)")
    for file in sorted((ROOT / "benchmarks").glob("*/*.py")):
        for module, name in imported.findall(file.read_text()):
            assert {module, f"{module}.{name}"} & set(older_layout.MODULES), f"{file.name} imports {module}"


@pytest.mark.parametrize(("failure", "code"), [("wrong: error 1 exceeds", 1), (None, 0)])
def test_wrong_values_of_this_checkout_exit_1(failure, code, monkeypatch, tmp_path):
    rows = [
        {"commit": "now", "ours": True, "failure": failure},
        {"commit": "other", "ours": True, "failure": "wrong: error 2 exceeds"},  # the other revision does not count
    ]
    monkeypatch.setattr(compare, "compare", lambda *args: ([], rows))
    assert main(["--device", "cpu", "--op", "vote", "--compare", "HEAD", "--out", str(tmp_path)]) == code


@pytest.mark.parametrize(("options", "handed_on"), [((), None), (("--memory", "system"), "system")])
def test_both_sides_are_told_where_memory_comes_from(options, handed_on, monkeypatch, tmp_path):
    seen = []
    rows = [{"commit": "now", "ours": True, "failure": None}]
    monkeypatch.setattr(compare, "compare", lambda *args: seen.append(args[4]["memory"]) or ([], rows))
    arguments = ["--device", "cpu", "--op", "vote", "--compare", "HEAD", "--out", str(tmp_path), *options]
    assert main(arguments) == 0 and seen == [handed_on]


def test_report_marks_what_became_slower(tmp_path):
    half, one = Times(0.5, 0.45, 0.55, 7), Times(1.0, 0.99, 1.01, 7)
    pairs = [
        Pair("op", "case", "calm_fast", False, Times(2.0, 2.0, 2.0, 7), one, half),
        Pair("op", "case", "eager", True, one, one, Times(1.2, 1.1, 1.3, 7)),
        Pair("op", "case", "native", False, None, None, None, "other: cannot run: <absent>"),
    ]
    comparison.write(tmp_path, pairs, [], "v1", "built")
    html, text = ((tmp_path / name).read_text() for name in ("report.html", "report.md"))
    assert '<td class="why wrong">SLOWER</td>' in html and "&lt;absent&gt;" in html and "<svg" in html
    assert "| case | calm_fast | 2 | 1 | 0.50x | 0.45 - 0.55 | SLOWER |" in text
    assert "| case | eager (control) | 1 | 1 | 1.20x | 1.10 - 1.30 | the machine was unsteady |" in text
    assert "1 SLOWER, 0 faster, 0 same, 1 without a ratio" in text
