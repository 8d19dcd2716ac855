"""The golden record of every kernel's machine code, one JSON file per Triton version, so that growth is noticed.

docs/ops/machine_code.md shows the rows of one architecture. It is written from the newest record.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from calm_fast.benchmarks.machine_code import Facts, blocks_per_multiprocessor, serialised
from calm_fast.benchmarks.speed_model import predict

FOLDER = Path(__file__).resolve().parent / "golden"
TILE = (
    "BLOCK_M",
    "BLOCK_R",
    "BLOCK_T",
    "BLOCK_N",
    "BLOCK_V",
    "BLOCK_J",
    "BLOCK_K",
    "BLOCK_D",
    "BLOCK",
    "LANES",
    "WIDTH",
)
REGISTER_SLACK = 8  # one allocation granule per thread
SIZE_SLACK = 1.10
LARGE = 64 * 1024  # bytes of shared memory on sm_80, from which a kernel is compiled for GPUs with 99 KiB too

PAGE = FOLDER.parents[2] / "docs" / "ops" / "machine_code.md"
SHOWN = "90"  # the architecture of the page

Golden = dict[str, dict[str, dict[str, Any]]]  # kernel name -> arch -> numbers


def path_for(version: str) -> Path:
    return FOLDER / f"triton-{version}.json"


def load(version: str) -> Golden | None:
    """Return the record for a Triton version, or None if there is none."""
    path = path_for(version)
    return json.loads(path.read_text()) if path.is_file() else None


def large_kernels() -> set[str]:
    """Return the kernels whose shared memory on sm_80 exceeds LARGE, by the newest record whatever its Triton."""
    versions = [path.stem.removeprefix("triton-") for path in FOLDER.glob("triton-*.json")]
    newest = max(versions, key=lambda version: [int(number) for number in version.split(".")], default="")
    record = load(newest) or {}
    return {name for name, rows in record.items() if rows.get("80", {}).get("shared", 0) > LARGE}


def numbers(facts: Facts, spec: Any) -> dict[str, Any]:
    """Return the recorded numbers of a kernel. spec: its entry of codegen_specs()."""
    tile = [f"{key.removeprefix('BLOCK_')} {spec.constexprs[key]}" for key in spec.constexprs if key in TILE]
    row = {
        "registers": facts.registers,
        "instructions": facts.instructions,
        "shared": facts.shared,
        "spills": facts.local_accesses,
        "matrix": f"{facts.matrix_instructions} {min(facts.tensor_core).split('.')[0]}" if facts.tensor_core else "",
        "async": facts.async_copies,
        "blocks": blocks_per_multiprocessor(facts, spec.num_warps),
        "warps": spec.num_warps,
        "stages": spec.num_stages,
        "tile": ", ".join(tile),
        "serialised": bool(serialised(facts)),
    }
    if facts.loop:
        row["step"] = facts.loop.mix
        if facts.arch == 90:  # what the model knows
            row["tensor_share"] = round(predict(facts.loop, spec.num_warps).tensor_share, 2)
    return row


@cache
def _rules() -> str:
    """Return a digest of the code that reads facts and judges them."""
    import calm_fast.benchmarks as benchmarks

    own = [Path(__file__), Path(__file__).with_name("check.py")]
    read = [Path(benchmarks.__path__[0]) / name for name in ("machine_code.py", "sass.py", "speed_model.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in own + read)).hexdigest()


def source(spec: Any, arch: int) -> str:
    """Return a digest of all that a row depends on: kernel and callees, arguments, options, Triton, and these rules.

    spec: an entry of codegen_specs(). Triton's own key of a function covers the functions and constants it uses.
    """
    import triton
    from triton.compiler import ASTSource

    ast = ASTSource(fn=spec.fn, signature=spec.signature, constexprs=spec.constexprs, attrs=spec.attrs)
    parts = (ast.hash(), spec.num_warps, spec.num_stages, spec.expectations, arch, triton.__version__, _rules())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def save(version: str, golden: Golden) -> Path:
    """Write the record, a sorted line per kernel and architecture so that diffs are readable; returns its path."""
    blocks = []
    for name in sorted(golden):
        rows = [f"  {json.dumps(arch)}: {json.dumps(golden[name][arch])}" for arch in sorted(golden[name], key=int)]
        blocks.append(f"{json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n}")
    FOLDER.mkdir(exist_ok=True)
    path = path_for(version)
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n")
    return path


def growth(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    """Return a message for each number that has grown beyond the slack."""
    limits = {
        "registers": then["registers"] + REGISTER_SLACK,
        "instructions": int(then["instructions"] * SIZE_SLACK),
        "shared": then["shared"],
    }
    return [f"{key} grew from {then[key]} to {now[key]}" for key, limit in limits.items() if now[key] > limit]


def page(version: str, golden: Golden) -> str:
    """Return the text of the page about the machine code of SHOWN, from a record."""
    shown = {name.removesuffix(f"_sm{SHOWN}"): golden[name][SHOWN] for name in sorted(golden) if SHOWN in golden[name]}
    lines = [
        f"# Machine code of the Triton kernels, sm_{SHOWN}",
        "",
        f"Written by `make codegen ARGS=--table` from the record of Triton {version}; `make codegen` compares. Every",
        "kernel is compiled with its default launch config, without a GPU.",
        "",
        "- spills: instructions that access local memory. Any is an error.",
        "- matrix: tensor-core instructions. HGMMA works for a group of four warps, HMMA for one.",
        "- async: instructions that copy from global to shared memory past the registers, so that products and loads",
        "  overlap. 0 in a kernel with products means that nothing is pipelined.",
        "- blocks, warps: the number that fits on a multiprocessor, estimated from registers and shared memory.",
        "",
        "| kernel | tile | stages | registers | spills | shared, KiB | matrix | async | blocks | warps |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in shown.items():
        cells = [f"`{name}`", row["tile"], row["stages"], row["registers"], row["spills"]]
        cells += [f"{row['shared'] / 1024:.1f}", row["matrix"], row["async"], row["blocks"]]
        lines.append(_line([*cells, row["blocks"] * row["warps"]]))
    return "\n".join(lines + _steps(shown)) + "\n"


def _line(cells: list[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _steps(shown: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of the page about the main loops of the kernels in `shown`."""
    kinds = ("EX2", "MUFU", "FMA", "ADD/MAX", "LDGSTS", "TMA", "BAR", "WARPGROUP")
    lines = [
        "",
        "## A step of the main loop",
        "",
        "The instructions that each warp issues in one step of the innermost loop with the most products. A kernel",
        "whose products stand outside of loops has no row.",
        "",
        "- products: tensor-core instructions with their shapes, rows x columns x depth.",
        "- EX2, MUFU: exponentials, other instructions of the same unit. FMA holds multiplications too.",
        "- TMA: copies of whole tiles. BAR: barriers of the block. WARPGROUP: instructions that order products.",
        "- serialised: each product waits for the one before it (ptxas says so, or the WARPGROUP instructions do).",
        "- model: predicted share of the tensor rate, products not overlapping with anything else. It is a model: no",
        "  GPU measured it. `calm_fast.benchmarks.speed_model` says what it leaves out.",
        "",
        f"| kernel | products | all | {' | '.join(kinds)} | serialised | model |",
        f"|---|---|---|{'---|' * len(kinds)}---|---|",
    ]
    for name, row in shown.items():
        if "step" in row:
            step = row["step"]
            products = ", ".join(f"{count} {shape}" for shape, count in step.items() if shape not in (*kinds, "all"))
            cells = [f"`{name}`", products, step["all"], *(step.get(kind, "") for kind in kinds)]
            lines.append(_line([*cells, "yes" if row["serialised"] else "", f"{row['tensor_share']:.0%}"]))
    return lines
