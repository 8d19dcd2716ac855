"""Run the contract suite against other releases of the packages that calm_fast stands on.

    python tests/contract/lanes.py                          lowest, 5.17 and newest
    python tests/contract/lanes.py --lane newest            one of them
    python tests/contract/lanes.py --pin transformers==5.20.2   any other release, beside the newest of the rest
    python tests/contract/lanes.py --record                 write what was seen: calm_fast/compatibility.json,
                                                            docs/compatibility.md, and constraints.txt
    python tests/contract/lanes.py --newest                 what pip is asked for in the newest lane
    python tests/contract/lanes.py --changed                what is newer or older here than in constraints.txt

Every lane is a virtual environment in a temporary folder that shares what is installed here (torch above all, and this
checkout) and has packages of its own in front of it. Where the newest releases fail, each package that changed since
constraints.txt is put back alone, and the one without which the suite passes is named. Exit code 1 if a lane failed.
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
RECORD = ROOT / "calm_fast" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"
CONSTRAINTS = ROOT / "constraints.txt"
MARKS = ("<!-- lanes: written by `make contract ARGS=--record` -->", "<!-- end of lanes -->")

# never installed by a lane: torch is gigabytes with CUDA, and the others do not take part in the contract
SHARED = ("torch", "ruff", "build", "setuptools", "ninja", "wheel")
# the columns of the page; the record holds them and triton
COLUMNS = ("transformers", "peft", "accelerate", "torch", "numpy", "math-verify", "typer", "python")
GPU_MACHINES = "transformers==5.17.0"  # what the GPU machines of the project carry
LANES = ("lowest", "5.17", "newest")
UPGRADE = ("--upgrade", "--upgrade-strategy", "eager")  # what the named packages need is the newest possible, too


@dataclass(frozen=True)
class Outcome:
    """A run of the contract suite: the versions it saw, how many tests passed, failed and were skipped, the output."""

    lane: str
    versions: dict[str, str]
    passed: int
    failed: int
    skipped: int
    seconds: float
    output: str

    def row(self) -> dict[str, Any]:
        """The outcome as the record holds it."""
        counts = {"passed": self.passed, "failed": self.failed, "skipped": self.skipped}
        return {"lane": self.lane, "date": datetime.date.today().isoformat(), **counts, "versions": self.versions}


def requirements() -> dict[str, Requirement]:
    """What calm_fast and its tests need, by name, without what lanes share."""
    found = {}
    for text in importlib.metadata.requires("calm-fast") or []:
        requirement = Requirement(text)
        applies = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in ("", "test"))
        if applies and requirement.name not in SHARED:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def lower_bound(requirement: Requirement) -> str:
    """The version that a requirement states as its lowest."""
    (bound,) = [spec.version for spec in requirement.specifier if spec.operator == ">="]
    return bound


def wanted(lane: str, pins: Iterable[str] = ()) -> list[str]:
    """What pip is asked for in a lane; `pins` are for a lane of their own."""
    known = requirements()

    def spelled(requirement: Requirement, specifier: str) -> str:
        extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
        return f"{requirement.name}{extras}{specifier}"

    if lane == "lowest":
        return [spelled(requirement, f"=={lower_bound(requirement)}") for requirement in known.values()]
    fixed = {canonicalize_name(Requirement(pin).name): pin for pin in ([GPU_MACHINES] if lane == "5.17" else pins)}
    newest = [spelled(r, str(r.specifier)) for name, r in known.items() if name not in fixed]
    # said aloud, or pip would upgrade it as somebody's dependency
    return [*newest, *fixed.values(), f"torch=={importlib.metadata.version('torch')}"]


def make_environment(folder: Path, packages: Iterable[str]) -> Path:
    """A virtual environment with `packages` in front of everything that is installed here; its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip())
    here = sorted({str(Path(path)) for path in sys.path if path.rstrip("/").endswith("-packages")})
    # addsitedir also runs the .pth files there: this checkout is installed through one
    lines = "".join(f"import site; site.addsitedir({path!r})\n" for path in here)
    (own / "zz_shared.pth").write_text(lines, encoding="utf-8")
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", *UPGRADE]
    done = subprocess.run([*command, *packages], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"[contract] pip could not install {' '.join(packages)}:\n{done.stderr[-3000:]}")
    return python


def versions_of(python: Path) -> dict[str, str]:
    """Version of every package of the contract in an environment."""
    names = sorted({*requirements(), "torch"})
    code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    done = subprocess.run([python, "-c", code, *names], check=True, capture_output=True, text=True)
    return {**json.loads(done.stdout), "python": platform.python_version()}


def run_suite(lane: str, python: Path, folder: Path) -> Outcome:
    """The contract suite in the environment of `python`."""
    report, begin = folder / "report.xml", time.perf_counter()
    command = [python, "-m", "pytest", str(ROOT / "tests" / "contract"), "-n", "2", "-q", f"--junitxml={report}"]
    settings = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    command += ["-p", "no:cacheprovider"]
    if not lane.startswith("newest"):
        command += ["-o", "filterwarnings="]  # older releases warn of each other
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
    """Make the environment of a lane, run the suite in it, and take it away again."""
    print(f"[contract] {lane}: installing", flush=True)
    with tempfile.TemporaryDirectory(prefix="contract-") as folder:
        outcome = run_suite(lane, make_environment(Path(folder, "venv"), packages), Path(folder))
    told = ", ".join(f"{name} {outcome.versions[name]}" for name in COLUMNS)
    result = f"{outcome.passed} passed" if not outcome.failed else f"FAILED ({outcome.failed} of the suite)"
    print(f"[contract] {lane}: {result} in {outcome.seconds:.0f} s with {told}", flush=True)
    return outcome


# ---- constraints.txt: the versions of the last green run ------------------------------------------------------------


def read_constraints(text: str) -> dict[str, str]:
    """name -> version of a file of `name==version` lines."""
    pairs = [line.split("==") for line in text.splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version.strip() for name, version in pairs}


def differences(now: Mapping[str, str], before: Mapping[str, str]) -> list[str]:
    """Every package whose version is another one than before, as `name before -> now`."""
    found = []
    for name, version in sorted(now.items()):
        if name in before and Version(Version(version).public) != Version(before[name]):
            found.append(f"{name} {before[name]} -> {version}")
    return found


def installed() -> dict[str, str]:
    """Every distribution that is installed here, calm_fast itself and pip left out."""
    found = {canonicalize_name(d.metadata["Name"]): d.version for d in importlib.metadata.distributions()}
    return {name: version for name, version in sorted(found.items()) if name not in ("calm-fast", "pip")}


def constraints(versions: Mapping[str, str]) -> str:
    """The text of constraints.txt."""
    head = [
        "# Exact versions of the last run in which every test passed, on Linux with Python "
        f"{platform.python_version_tuple()[0]}.{platform.python_version_tuple()[1]} and a CPU build of torch.",
        "# pip install -c constraints.txt .      written by: make contract ARGS=--record",
    ]
    return "\n".join([*head, *(f"{name}=={Version(version).public}" for name, version in versions.items())]) + "\n"


def culprits(failed: Outcome, before: Mapping[str, str]) -> list[str]:
    """The packages that changed since constraints.txt and make the suite pass again when put back alone."""
    changed = [line.split()[0] for line in differences(failed.versions, before)]
    found = []
    for name in changed:
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
    for name in culprits(failed, before) if failed.lane == "newest" else []:
        print(
            f"[contract] {name} {failed.versions[name]} broke it: with {name} {before[name]} and everything else as "
            "it is, the suite passes (docs/compatibility.md says what to do)"
        )


# ---- the record and its page ----------------------------------------------------------------------------------------


def merged(rows: Iterable[dict[str, Any]], new: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The record with new rows: one row for each lane, transformers and torch; by transformers, then lane."""
    table = {(r["lane"], r["versions"]["transformers"], r["versions"]["torch"]): r for r in (*rows, *new)}
    return [table[key] for key in sorted(table, key=lambda key: (Version(key[1]), Version(key[2]), key[0]))]


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The record as a Markdown table."""
    lines = [f"| lane | {' | '.join(COLUMNS)} | contract | date |", "|---" * (len(COLUMNS) + 3) + "|"]
    for row in rows:
        result = f"{row['passed']} passed" if not row["failed"] else f"**{row['failed']} failed**"
        cells = [row["lane"], *(row["versions"][name] for name in COLUMNS), result, row["date"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page(text: str, rows: Iterable[dict[str, Any]]) -> str:
    """The text of docs/compatibility.md with its table replaced."""
    pattern = f"{re.escape(MARKS[0])}.*?{re.escape(MARKS[1])}"
    return re.sub(pattern, lambda _: f"{MARKS[0]}\n\n{table(rows)}\n\n{MARKS[1]}", text, flags=re.DOTALL)


def record(outcomes: Iterable[Outcome]) -> None:
    """Write what was seen into the record, its page and, where the newest lane is among it, constraints.txt."""
    outcomes = list(outcomes)
    rows = merged(json.loads(RECORD.read_text(encoding="utf-8"))["lanes"], (o.row() for o in outcomes))
    RECORD.write_text(json.dumps({"lanes": rows}, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    if any(o.lane == "newest" and not o.failed for o in outcomes):
        CONSTRAINTS.write_text(constraints(installed()), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lane", action="append", choices=LANES, help="one of the lanes; again for another")
    parser.add_argument("--pin", action="append", default=[], metavar="NAME==VERSION", help="a lane of its own")
    parser.add_argument("--record", action="store_true", help="write what was seen into the checkout")
    parser.add_argument("--changed", action="store_true", help="only say what differs from constraints.txt here")
    parser.add_argument("--newest", action="store_true", help="only print what pip is to upgrade")
    options = parser.parse_args(arguments)
    if options.newest:
        print(" ".join(wanted("newest")))
        return 0
    if options.changed:
        before = read_constraints(CONSTRAINTS.read_text(encoding="utf-8"))
        print(
            f"[contract] changed since the last green run: {', '.join(differences(installed(), before)) or 'nothing'}"
        )
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
