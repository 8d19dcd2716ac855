"""Write README's tables of results from the committed rows: `make results`.

Reads benchmarks/results/*.jsonl, takes the newest rows of every case, and writes between two markers of README.md. CPU
and GPU have a table each. Cases of the quick suite that have targets but no rows share one line, with their targets.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from calm_fast.benchmarks.memory import LABEL
from calm_fast.benchmarks.registry import REGISTRY, Case, cases
from calm_fast.benchmarks.report.facts import ABSENT, MET, Row, Verdict, best, number, times, verdicts
from calm_fast.benchmarks.report.text import goal_texts, growth_lines, red_texts, table

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results: written by `make results` -->", "<!-- end of results -->"
_TITLES = {"cpu": "CPU", "cuda": "GPU"}
_HEADINGS = (
    "case",
    "times faster than each baseline",
    "leanest baseline's peak memory / ours",
    "measured / floor",
    "target",
    "commit",
)


def read(files: Iterable[Path]) -> list[list[Row]]:
    """Return the rows in groups; each group is one case of one run.

    Raises:
        ValueError: a line is not a row; the message gives its place.
    """
    groups: list[list[Row]] = []
    for file in files:
        last: list[Row] = []
        for number_, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                key = row["case"], row["device"], row["commit"]
                again = row["impl"] in {r["impl"] for r in last}
            except (ValueError, TypeError, KeyError) as problem:
                raise ValueError(f"{file.name}, line {number_}: not a row of a benchmark: {problem!r}") from problem
            if again or not last or key != (last[0]["case"], last[0]["device"], last[0]["commit"]):
                groups.append(last := [])
            last.append(row)
    return groups


def kind(row: Row) -> str:
    """Return "cpu" or "cuda" from the device's name; a CPU's contains its thread count."""
    return "cpu" if " thread" in row["device"] else "cuda"


def newest(groups: Iterable[Sequence[Row]], device: str) -> dict[str, Sequence[Row]]:
    """Return the latest group of each case on that kind of device, without runs with cold caches.

    Runs with a narrower lane than the machine's own, and with memory from the system, count only if a case has no
    others.
    """
    found: dict[str, Sequence[Row]] = {}
    for group in groups:
        first = group[0]
        if kind(first) != device or "cold cache" in first["device"]:
            continue
        held = found.get(first["case"])
        if held is None or _rank(first) >= _rank(held[0]):
            found[first["case"]] = group
    return found


def _rank(row: Row) -> tuple[bool, bool, str]:
    return "lane " not in row["device"], LABEL not in row["device"], row["date"]


def listed(device: str, measured: Iterable[str]) -> list[Case]:
    """Return the cases of a table in the registry's order: the quick suite's with a target, and all measured ones."""
    names = set(measured)
    found: dict[str, Case] = {}
    for op in REGISTRY:
        for suite in ("quick", "full"):
            for case in cases(op, torch.device(device), suite):
                if case.name in names or (suite == "quick" and case.targets and case.series is None):
                    found.setdefault(case.name, case)
    return list(found.values())


def _line(v: Verdict, absolute: bool) -> list[str]:
    goals = "; ".join([f"**wrong** {text}" for text in red_texts(v)] + goal_texts(v))
    if v.ours is None:
        return [f"`{v.name}`", "**wrong**" if v.red else ABSENT, "", "", goals, ""]
    took = f"{number(v.ours['ms'])} ms, " if absolute else ""
    faster = f"{took}no baseline ran"
    if v.ratios:
        (best_name, best_ratio), *others = v.ratios
        faster = f"{took}**{times(best_ratio)}** {best_name}"
        faster += "".join(f", {times(value)} {name}" for name, value in others)
    least, memory = best(v.rows, v.yardsticks, "peak_bytes"), ""
    if least and least["peak_bytes"] and v.ours["peak_bytes"]:
        memory = times(least["peak_bytes"] / v.ours["peak_bytes"])
    commit = v.ours["commit"] or ""
    short = commit[:7] + ("-dirty" if commit.endswith("-dirty") else "")
    return [f"`{v.name}`", faster, memory, times(v.above_floor), goals, short]


def _waiting_line(waiting: Sequence[Verdict], device: str) -> str:
    """Name the cases without rows and their targets, cases with the same targets together."""
    by_targets: dict[str, list[str]] = {}
    for v in waiting:
        by_targets.setdefault(", ".join(goal.wanted for goal in v.goals), []).append(f"`{v.name}`")
    each = "; ".join(f"{', '.join(names)}: {targets}" for targets, names in by_targets.items())
    count = sum(len(v.goals) for v in waiting)
    return f"Not measured on a {_TITLES[device]} yet ({count} targets of {len(waiting)} cases): {each}."


def section(groups: Sequence[Sequence[Row]], device: str) -> list[str]:
    """Return one device's lines of markdown."""
    latest = newest(groups, device)
    chosen = listed(device, latest)
    rows = [row for case in chosen for row in latest.get(case.name, ())]
    found = verdicts(rows, chosen)
    lines = [f"### {_TITLES[device]}", ""]
    settings = list(dict.fromkeys(_setting(row) for row in rows))
    for text in settings:
        lines += [text, ""]
    shown = [v for v in found if v.series is None]
    waiting = [v for v in shown if not v.rows]
    if measured := [v for v in shown if v.rows]:
        lines += [*table(_HEADINGS, [_line(v, device == "cuda") for v in measured]), ""]
        states = [goal.state for v in measured for goal in v.goals]
        unknown = f", {states.count(ABSENT)} not measured" if ABSENT in states else ""
        lines.append(f"Targets: {states.count(MET)} of {len(states)} met{unknown}.")
    if waiting:
        lines.append(_waiting_line(waiting, device))
    lines += [f"Scaling: {line}." for line in growth_lines(found)]
    return [*lines, ""]


def _setting(row: Row) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items() if name != "calm_fast")
    return f"{row['device']}; {versions}; {row['date'][:10]}."


def render(groups: Sequence[Sequence[Row]]) -> str:
    """Return README's block of results, markers included."""
    lines = [BEGIN, ""]
    for device in _TITLES:
        lines += section(groups, device)
    return "\n".join([*lines, END])


def insert(text: str, block: str) -> str:
    """Return `text` with the block between its markers replaced by `block`.

    Raises:
        ValueError: there is not exactly one pair of markers.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README.md needs one line {BEGIN!r} and after it one line {END!r}")
    return text[: text.index(BEGIN)] + block + text[text.index(END) + len(END) :]


def main(argv: Sequence[str] | None = None) -> int:
    """Write README's tables, or with --check only report whether they are up to date."""
    parser = argparse.ArgumentParser(
        prog="python -m calm_fast.benchmarks.results_table",
        description="Write README's tables of results from the committed rows.",
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if README is out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of .jsonl files")
    args: Any = parser.parse_args(argv)
    try:
        before = args.readme.read_text(encoding="utf-8")
        after = insert(before, render(read(sorted(args.results.glob("*.jsonl")))))
    except (OSError, ValueError) as problem:
        print(f"results_table: {problem}", file=sys.stderr)
        return 2
    if args.check:
        print(f"README's tables are {'up to date' if before == after else 'out of date: run `make results`'}")
        return int(before != after)
    args.readme.write_text(after, encoding="utf-8")
    print(f"{args.readme.name}: {'unchanged' if before == after else 'written'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
