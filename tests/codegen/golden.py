"""The recorded size of every kernel, one JSON file per Triton version: growth must be seen."""

from __future__ import annotations

import json
from pathlib import Path

from calm_fast.benchmarks.machine_code import Facts

FOLDER = Path(__file__).resolve().parent / "golden"
REGISTER_SLACK = 8  # one allocation granule per thread
SIZE_SLACK = 1.10

Golden = dict[str, dict[str, dict[str, int]]]  # kernel name -> arch -> numbers


def path_for(version: str) -> Path:
    return FOLDER / f"triton-{version}.json"


def load(version: str) -> Golden | None:
    """The record for this Triton version, or None where nobody has made one."""
    path = path_for(version)
    return json.loads(path.read_text()) if path.is_file() else None


def numbers(facts: Facts) -> dict[str, int]:
    return {"registers": facts.registers, "instructions": facts.instructions, "shared": facts.shared}


def save(version: str, golden: Golden) -> Path:
    """Write one line per kernel and architecture, sorted, so that a diff shows what changed."""
    blocks = []
    for name in sorted(golden):
        rows = [f"  {json.dumps(arch)}: {json.dumps(golden[name][arch])}" for arch in sorted(golden[name], key=int)]
        blocks.append(f"{json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n}")
    FOLDER.mkdir(exist_ok=True)
    path = path_for(version)
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n")
    return path


def growth(now: dict[str, int], then: dict[str, int]) -> list[str]:
    """What has grown beyond the slack."""
    limits = {
        "registers": then["registers"] + REGISTER_SLACK,
        "instructions": int(then["instructions"] * SIZE_SLACK),
        "shared": then["shared"],
    }
    return [f"{key} grew from {then[key]} to {now[key]}" for key, limit in limits.items() if now[key] > limit]
