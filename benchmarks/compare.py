"""`bench --compare REV`: this checkout against another revision, on the same cases, side by side.

Each side is a process of its own with the same Python. The cases and baselines are this checkout's; the library
(calm_fast, kernels) is each side's own. Short runs of both sides take turns, so a disturbance of the machine hits both.
The ratio is taken within each pair of runs. `older_layout` lets the cases run on revisions of the older layout.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from calm_fast.benchmarks import machine
from calm_fast.benchmarks.registry import Case
from calm_fast.benchmarks.timing import Budget, Times, summarise

THRESHOLD = 1.05  # smaller differences count as the same
BURST_MS = 40.0  # length of one side's turn
SLOWER, FASTER, SAME = "SLOWER", "faster", "same"
Say = Callable[[str], None]


class CompareError(ValueError):
    """There is nothing to compare with; the message gives the reason."""


@dataclass(frozen=True)
class Pair:
    """One implementation on both sides. ratio = other / now over the pairs of runs: below 1 this checkout is slower."""

    op: str
    case: str
    impl: str
    control: bool
    now: Times | None
    other: Times | None
    ratio: Times | None
    failure: str | None = None

    @property
    def verdict(self) -> str | None:
        """Return SLOWER or FASTER if the median is off by 5 % and four of five pairs agree, else SAME."""
        if self.ratio is None:
            return None
        if self.ratio.ms < 1 / THRESHOLD and self.ratio.p80 < 1:
            return SLOWER
        return FASTER if self.ratio.ms > THRESHOLD and self.ratio.p20 > 1 else SAME


def judge(pairs: Sequence[tuple[float, float]]) -> Times:
    """Return the median and quantiles of other / now."""
    return summarise([other / now for now, other in pairs])


def revision(name: str) -> tuple[Path, str]:
    """Return the checkout and the full id of revision `name`.

    Raises:
        CompareError: this is not a git checkout, or it has no such revision.
    """
    top = machine.checkout()
    if top is None:
        raise CompareError(
            "`--compare` needs a git checkout, but this calm_fast is installed or its files are not under git"
        )
    found = machine.git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    if not found:
        raise CompareError(f"`--compare` must be a revision of the checkout {top}, got {name!r}")
    return top, found


def stage(tree: Path, benchmarks: Path, site: Path) -> Path:
    """Fill `site` with a `calm_fast` to import: the library of `tree`, with `benchmarks` in place of its own."""
    package = site / "calm_fast"
    package.mkdir(parents=True)
    for entry in (tree / "calm_fast").iterdir():
        if entry.name not in ("__pycache__", "benchmarks", "kernels"):
            (package / entry.name).symlink_to(entry)
    older = tree / "kernels" / "fused"  # the older layout: all kernels in one folder
    if (older / "__init__.py").is_file():  # an update of the checkout may leave the empty folder
        (package / "kernels").symlink_to(older)
    else:
        (package / "kernels").mkdir()
        for entry in (tree / "calm_fast" / "kernels" / "__init__.py", *(tree / "kernels").iterdir()):
            (package / "kernels" / entry.name).symlink_to(entry)
    (package / "benchmarks").symlink_to(benchmarks)
    return site


def native(top: Path, commit: str, tree: Path, say: Say) -> str:
    """Give `tree` its compiled library, and describe it in words."""
    if not (tree / "csrc").is_dir():
        return "the other revision has no compiled library"
    if machine.git("diff", "--quiet", commit, "--", ":/csrc", ":/setup.py") is not None:
        built = list((top / "calm_fast").glob("_c*.so"))
        for library in built:
            shutil.copy2(library, tree / "calm_fast")
        return "the same sources on both sides: " + (", ".join(sorted(b.name for b in built)) or "not built here")
    say("building the other revision's compiled library")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    found = sorted(path.name for path in (tree / "calm_fast").glob("_c*.so"))
    if found:
        return f"the other revision's was built: {', '.join(found)}"
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}, no message"])[-1]
    return f"ABSENT on the other side, building it failed: {last}"


@contextlib.contextmanager
def other_tree(commit: str) -> Iterator[Path]:
    """Check out `commit` into a temporary worktree."""
    with tempfile.TemporaryDirectory(prefix="calm-fast-compare-") as folder:
        tree = Path(folder) / "tree"
        if machine.git("worktree", "add", "--detach", str(tree), commit) is None:
            raise CompareError(f"`--compare`: `git worktree add` failed for {commit}")
        try:
            yield tree
        finally:
            machine.git("worktree", "remove", "--force", str(tree))


class Side:
    """The process of one side."""

    def __init__(self, site: Path, arguments: dict[str, Any]) -> None:
        # PYTHONPATH and the working folder, where `python -m` looks first, keep any other calm_fast out
        environment = {**os.environ, "PYTHONPATH": str(site)}
        command = [sys.executable, "-m", "calm_fast.benchmarks.compare_worker"]
        self.process = subprocess.Popen(
            command, cwd=site, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        where = Path(self.ask(**arguments)["import"])
        if site not in where.parents:
            raise RuntimeError(f"compare: {where} was imported, not {site}")

    def ask(self, **command: Any) -> Any:
        """Send a command and return the answer.

        Raises:
            RuntimeError: the command failed there, with the reason.
        """
        commands, answers = self._pipes()
        try:
            commands.write(json.dumps(command) + "\n")
            commands.flush()
            line = answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"its process ended with exit code {self.process.wait()}")
        answer = json.loads(line)
        if "failed" in answer:
            raise RuntimeError(answer["failed"])
        return answer["ok"]

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self.process.stdin is not None and self.process.stdout is not None  # both are PIPE
        return self.process.stdin, self.process.stdout

    def close(self) -> None:
        self._pipes()[0].close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def take_turns(now: Side, other: Side, impls: Sequence[str], budget: Budget) -> dict[str, list[tuple[float, float]]]:
    """Return (now, other) milliseconds of each implementation, one pair per round; the sides begin alternately."""
    calls = {}
    for impl in impls:
        first = max(side.ask(do="time", impl=impl, calls=1)[0] for side in (now, other))
        calls[impl] = max(1, min(50, round(BURST_MS / max(first, 1e-3))))
    pairs: dict[str, list[tuple[float, float]]] = {impl: [] for impl in impls}
    begin, done = time.perf_counter(), 0
    while impls and (done < budget.min_rounds or time.perf_counter() - begin < budget.seconds):
        if done == budget.max_rounds:
            break
        for impl in impls:
            found = {}
            for side in (now, other) if done % 2 == 0 else (other, now):
                found[side] = summarise(side.ask(do="time", impl=impl, calls=calls[impl])).ms
            pairs[impl].append((found[now], found[other]))
        done += 1
    return pairs


def compare_case(
    case: Case, suite: str, now: Side, other: Side, budget: Budget
) -> tuple[list[Pair], list[dict[str, Any]]]:
    """Run both sides on one case. Return the pairs, and the rows of both sides."""
    opened: dict[Side, Any] = {}
    broken = None
    for name, side in (("this checkout", now), ("the other revision", other)):
        try:
            opened[side] = side.ask(do="open", op=case.op, name=case.name, suite=suite)
        except RuntimeError as failure:
            broken = f"{name} cannot run the case: {failure}"
    if broken:
        rest = [c for c in case.contestants if c.ours]
        return [Pair(case.op, case.name, c.name, False, None, None, None, broken) for c in rest], []
    both = [impl for impl in opened[now]["can"] if impl in opened[other]["can"]]
    found = take_turns(now, other, both, budget)
    ceilings = now.ask(do="ceilings")
    rows, pairs = [], []
    for index, side in enumerate((now, other)):
        samples = {impl: [pair[index] for pair in values] for impl, values in found.items()}
        rows.append(side.ask(do="rows", samples=samples, ceilings=ceilings))
    for mine, theirs in zip(*rows, strict=True):
        failures = [f"{who}: {r['failure']}" for who, r in (("now", mine), ("other", theirs)) if r["failure"]]
        impl = mine["impl"]
        if impl in found:
            mine_ms, their_ms = (summarise([pair[index] for pair in found[impl]]) for index in (0, 1))
            pairs.append(Pair(case.op, case.name, impl, not mine["ours"], mine_ms, their_ms, judge(found[impl])))
        else:
            pairs.append(Pair(case.op, case.name, impl, not mine["ours"], None, None, None, "; ".join(failures)))
    return pairs, [r for side in rows for r in side]


def compare(
    chosen: Sequence[Case], suite: str, name: str, budget: Budget, arguments: dict[str, Any], out: Path, say: Say
) -> tuple[list[Pair], list[dict[str, Any]]]:
    """Compare this checkout with revision `name` on `chosen`; write results.jsonl and the report into `out`.

    Args:
        arguments: those of `compare_worker.Worker` except commit.
    Raises:
        CompareError: this is not a git checkout, or it has no such revision.
    """
    from calm_fast.benchmarks.report import comparison

    top, commit = revision(name)
    out.mkdir(parents=True, exist_ok=True)
    pairs: list[Pair] = []
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="calm-fast-sides-")))
        tree = stack.enter_context(other_tree(commit))
        library = native(top, commit, tree, say)
        sides = []
        for label, root, which in (("now", top, machine.commit()), ("other", tree, commit)):
            side = Side(stage(root, top / "benchmarks", folder / label), {**arguments, "commit": which})
            stack.callback(side.close)
            sides.append(side)
        sink = stack.enter_context((out / "results.jsonl").open("w"))
        for case in chosen:
            say(f"{case.name}: both sides are checked, then timed in turns")
            share = Budget(budget.seconds * case.share, budget.min_rounds, budget.max_rounds)
            fresh, made = compare_case(case, suite, sides[0], sides[1], share)
            sink.writelines(json.dumps(r, allow_nan=False) + "\n" for r in made)
            sink.flush()
            pairs, rows = pairs + fresh, rows + made
            comparison.write(out, pairs, rows, name, library)
    return pairs, rows
