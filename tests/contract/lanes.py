"""Run the contract suite against other releases of the packages that calm_fast depends on.

    python tests/contract/lanes.py                          lowest, 5.17 and newest
    python tests/contract/lanes.py --lane newest            one of them
    python tests/contract/lanes.py --pin transformers==5.20.2   any other release, with the newest of the rest
    python tests/contract/lanes.py --record                 write the results: calm_fast/core/compatibility.json,
                                                            docs/compatibility.md, and constraints.txt
    python tests/contract/lanes.py --newest                 print the requirements of the newest lane
    python tests/contract/lanes.py --changed                print the differences from constraints.txt

Every lane is a virtual environment in a temporary folder. It shares the packages installed here (mainly torch, and this
checkout) and puts its own packages in front of them. If the newest releases fail, each package that changed since
constraints.txt is reverted in turn, and the one whose reversal makes the suite pass is named. Exit code 1 if a lane
failed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "calm_fast" / "core" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"
CONSTRAINTS = ROOT / "constraints.txt"
MARKS = ("<!-- lanes: written by `make contract ARGS=--record` -->", "<!-- end of lanes -->")

# never installed by a lane: torch takes gigabytes with CUDA and brings its own triton; the rest is not under test
SHARED = ("torch", "triton", "ruff", "mypy", "build", "setuptools", "ninja", "wheel")
# columns of the page's table
COLUMNS = ("transformers", "peft", "accelerate", "torch", "numpy", "math-verify", "typer", "python")
GPU_MACHINES = "==5.17.0"  # the transformers of the project's GPU machines
LANES = ("lowest", "5.17", "newest")
UPGRADE = ("--upgrade", "--upgrade-strategy", "eager")  # their dependencies are the newest possible, too


@dataclass(frozen=True)
class Outcome:
    """A run of the contract suite: all installed versions, the number of tests by result, the output."""

    lane: str
    versions: dict[str, str]
    passed: int
    failed: int
    skipped: int
    seconds: float
    output: str

    def row(self) -> dict[str, Any]:
        """Return the outcome as an entry of the record."""
        counts = {"passed": self.passed, "failed": self.failed, "skipped": self.skipped}
        named = sorted({*requirements(), "torch", "triton", "python"} & self.versions.keys())
        versions = {name: self.versions[name] for name in named}
        return {"lane": self.lane, "date": datetime.date.today().isoformat(), **counts, "versions": versions}


def requirements() -> dict[str, Requirement]:
    """Return the requirements of calm_fast and its tests by name, without the shared packages."""
    found = {}
    for text in importlib.metadata.requires("calm-fast") or []:
        requirement = Requirement(text)
        applies = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in ("", "test"))
        if applies and requirement.name not in SHARED:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def lower_bound(requirement: Requirement) -> str:
    """Return the lowest version that a requirement allows."""
    (bound,) = [spec.version for spec in requirement.specifier if spec.operator == ">="]
    return bound


def wanted(lane: str, pins: Iterable[str] = ()) -> list[str]:
    """Return pip's requirements for a lane; `pins` replace versions in a lane of their own."""
    known = requirements()
    fixed = {canonicalize_name(Requirement(pin).name): str(Requirement(pin).specifier) for pin in pins}
    if lane == "lowest":
        fixed = {name: f"=={lower_bound(requirement)}" for name, requirement in known.items()}
    elif lane == "5.17":
        fixed = {"transformers": GPU_MACHINES}
    # torch is listed explicitly; otherwise pip would upgrade it as a dependency of another package
    fixed.setdefault("torch", f"=={importlib.metadata.version('torch')}")

    def spelled(name: str) -> str:
        extras = sorted(known[name].extras) if name in known else []
        specifier = fixed.get(name) or str(known[name].specifier)
        return f"{name}[{','.join(extras)}]{specifier}" if extras else f"{name}{specifier}"

    return [spelled(name) for name in dict.fromkeys((*known, *fixed))]


def make_environment(folder: Path, packages: Iterable[str]) -> Path:
    """Make a virtual environment with `packages` in front of everything installed here, and return its Python.

    Raises:
        RuntimeError: the packages cannot be installed, with pip's message.
    """
    # unpacking a pip of its own takes seconds; the one installed here is on its path, too
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip())
    here = dict.fromkeys(path for path in sys.path if path.rstrip("/").endswith("-packages"))
    # addsitedir also runs the .pth files there: this checkout is installed through one
    lines = "".join(f"import site; site.addsitedir({path!r})\n" for path in here)
    (own / "zz_shared.pth").write_text(lines, encoding="utf-8")
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", *UPGRADE]
    done = subprocess.run([*command, *packages], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip could not install {' '.join(packages)}:\n{done.stderr[-3000:]}")
    return python


_FREEZE = """
import importlib.metadata as m, json
found = {}
for d in m.distributions():  # the first on the path is imported
    found.setdefault(d.metadata["Name"], d.version)
print(json.dumps(found))
"""


def versions_of(python: str | Path) -> dict[str, str]:
    """Return the version of every distribution that a Python sees, and of Python itself."""
    done = subprocess.run([python, "-c", _FREEZE], check=True, capture_output=True, text=True)
    found = {canonicalize_name(name): version for name, version in json.loads(done.stdout).items()}
    return {**found, "python": platform.python_version()}


def run_suite(lane: str, python: Path, folder: Path) -> Outcome:
    """Run the contract suite in the environment of `python`."""
    report, begin = folder / "report.xml", time.perf_counter()
    command = [python, "-m", "pytest", str(ROOT / "tests" / "contract"), "-n", "2", "-q", f"--junitxml={report}"]
    settings = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    command += ["-p", "no:cacheprovider"]
    if not lane.startswith("newest"):
        command += ["-o", "filterwarnings="]  # older releases warn about each other
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    counts = {"tests": 1, "failures": 0, "errors": 1, "skipped": 0}  # pytest itself did not start
    if report.is_file():
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
        counts = {name: int(suite.get(name, 0)) for name in counts}
    failed = max(counts["failures"] + counts["errors"], int(done.returncode != 0))
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    seconds = time.perf_counter() - begin
    output = done.stdout + done.stderr
    return Outcome(lane, versions_of(python), passed, failed, counts["skipped"], seconds, output)


def try_lane(lane: str, packages: list[str]) -> Outcome:
    """Make the environment of a lane, run the suite in it, and remove it."""
    print(f"[contract] {lane}: installing", flush=True)
    with tempfile.TemporaryDirectory(prefix="contract-") as folder:
        try:
            outcome = run_suite(lane, make_environment(Path(folder, "venv"), packages), Path(folder))
        except RuntimeError as problem:
            outcome = Outcome(lane, {}, 0, 1, 0, 0.0, str(problem))
    told = ", ".join(f"{name} {outcome.versions[name]}" for name in COLUMNS if name in outcome.versions)
    result = f"{outcome.passed} passed" if not outcome.failed else f"FAILED ({outcome.failed} of the suite)"
    print(f"[contract] {lane}: {result} in {outcome.seconds:.0f} s with {told or 'nothing installed'}", flush=True)
    return outcome


# ---- constraints.txt: the versions of the last green run ------------------------------------------------------------


def read_constraints(text: str) -> dict[str, str]:
    """Parse `name==version` lines into name -> version."""
    pairs = [line.split("==") for line in text.splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version.strip() for name, version in pairs}


def differences(now: Mapping[str, str], before: Mapping[str, str]) -> list[str]:
    """Return every package whose version changed, as `name before -> now`."""
    found = []
    for name, version in sorted(now.items()):
        if name in before and Version(version).public != Version(before[name]).public:
            found.append(f"{name} {before[name]} -> {version}")
    return found


def needed(versions: Mapping[str, str]) -> dict[str, str]:
    """Return the distributions here that calm_fast and its tests need, directly or indirectly.

    Triton is left out: its version belongs to the build of torch.
    """
    found, waiting = set(), [("calm-fast", frozenset({"", "test"}))]
    while waiting:
        name, extras = waiting.pop()
        for text in importlib.metadata.requires(name) or []:
            r = Requirement(text)
            key = canonicalize_name(r.name)
            applies = r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in {"", *extras})
            if applies and key in versions and (key, frozenset(r.extras)) not in found:
                found.add((key, frozenset(r.extras)))
                waiting.append((key, frozenset(r.extras)))
    return {name: versions[name] for name in sorted({name for name, _ in found} - {"triton"})}


def constraints(versions: Mapping[str, str]) -> str:
    """Return the text of constraints.txt."""
    release = ".".join(platform.python_version_tuple()[:2])
    head = [
        f"# Exact versions of the last run in which every test passed, on Linux with Python {release}. Triton",
        "# is not among them: each build of torch brings its own.",
        "# pip install -c constraints.txt .      written by: make contract ARGS=--record",
    ]
    return "\n".join([*head, *(f"{name}=={Version(version).public}" for name, version in versions.items())]) + "\n"


def culprits(failed: Outcome, before: Mapping[str, str]) -> list[str]:
    """Return the packages that changed since constraints.txt and whose reversal alone makes the suite pass."""
    changed = [line.split()[0] for line in differences(failed.versions, before)]
    found = []
    for name in (name for name in changed if name not in SHARED):
        lane = f"newest, but {name} {before[name]}"
        if not try_lane(lane, wanted("newest", [f"{name}=={before[name]}"])).failed:
            found.append(name)
    return found


def explain(failed: Outcome) -> None:
    """Print which release broke the suite."""
    before = read_constraints(CONSTRAINTS.read_text(encoding="utf-8")) if CONSTRAINTS.is_file() else {}
    changed = differences(failed.versions, before)
    print(failed.output[-6000:])
    print(f"[contract] changed since the last green run: {', '.join(changed) or 'nothing'}")
    if failed.lane != "newest" or not changed:
        return
    guilty = culprits(failed, before)
    for name in guilty:
        print(
            f"[contract] {name} {failed.versions[name]} broke it: with {name} {before[name]} and everything else as "
            "it is, the suite passes (docs/compatibility.md says what to do)"
        )
    if not guilty:
        print("[contract] none of them alone broke it: the suite fails with each of them reverted")


# ---- the record and its page ----------------------------------------------------------------------------------------


def merged(rows: Iterable[dict[str, Any]], new: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the record with new rows, sorted: one per lane, and in the newest lane one per transformers release."""
    kept = {(r["lane"], r["versions"]["transformers"] if r["lane"] == "newest" else ""): r for r in (*rows, *new)}
    return sorted(kept.values(), key=lambda r: (Version(r["versions"]["transformers"]), r["lane"]))


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Return the record as a Markdown table."""
    lines = [f"| lane | {' | '.join(COLUMNS)} | contract | date |", "|---" * (len(COLUMNS) + 3) + "|"]
    for row in rows:
        result = f"{row['passed']} passed" if not row["failed"] else f"**{row['failed']} failed**"
        cells = [row["lane"], *(row["versions"][name] for name in COLUMNS), result, row["date"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page(text: str, rows: Iterable[dict[str, Any]]) -> str:
    """Return the text of docs/compatibility.md with its table replaced."""
    pattern = f"{re.escape(MARKS[0])}.*?{re.escape(MARKS[1])}"
    return re.sub(pattern, lambda _: f"{MARKS[0]}\n\n{table(rows)}\n\n{MARKS[1]}", text, flags=re.DOTALL)


def record(outcomes: Iterable[Outcome]) -> None:
    """Write the outcomes into the record and its page, and the newest lane's into constraints.txt."""
    outcomes = list(outcomes)
    rows = merged(json.loads(RECORD.read_text(encoding="utf-8"))["lanes"], (o.row() for o in outcomes if o.versions))
    RECORD.write_text(json.dumps({"lanes": rows}, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    for newest in (o for o in outcomes if o.lane == "newest" and not o.failed):
        here = needed(versions_of(sys.executable))
        # the whole suite runs in this environment: record only versions that it has seen
        if other := differences(needed(newest.versions), here):
            print(f"[contract] constraints.txt stays: {', '.join(other)} (make upgrade, the whole suite, then again)")
        else:
            CONSTRAINTS.write_text(constraints(here), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lane", action="append", choices=LANES, help="one of the lanes; repeat for several")
    parser.add_argument("--pin", action="append", default=[], metavar="NAME==VERSION", help="a lane of its own")
    parser.add_argument("--record", action="store_true", help="write the results into the checkout")
    parser.add_argument("--changed", action="store_true", help="only print the differences from constraints.txt")
    parser.add_argument("--newest", action="store_true", help="only print the requirements of the newest lane")
    options = parser.parse_args(arguments)
    if options.newest:
        print(" ".join(wanted("newest")))
        return 0
    if options.changed:
        before = read_constraints(CONSTRAINTS.read_text(encoding="utf-8"))
        changed = differences(versions_of(sys.executable), before)
        print(f"[contract] changed since the last green run: {', '.join(changed) or 'nothing'}")
        return 0
    lanes = {lane: wanted(lane) for lane in options.lane or (() if options.pin else LANES)}
    lanes |= {pin.replace("==", " "): wanted("pinned", [pin]) for pin in options.pin}
    outcomes = [try_lane(lane, packages) for lane, packages in lanes.items()]
    failures = [outcome for outcome in outcomes if outcome.failed]
    for outcome in failures:
        explain(outcome)
    if options.record:
        record(outcomes)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
