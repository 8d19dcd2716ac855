"""Mutants of a kernel source: each barrier removed, and the wrong indices that a test names."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from calm_fast.core.numerics import Case, Truth, judge, truth_of
from calm_fast.verify import emulation
from calm_fast.verify.cases import op_cases

BARRIER = re.compile(r"^\s*(?:__syncthreads\(\)|__syncwarp\(\)|sync_group<\w+>\(\));", re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    """A source text with one bug in it."""

    name: str
    text: str


def barriers(text: str) -> list[str]:
    """Where the barrier statements of `text` are, in readable form."""
    return [
        f"{match.group().strip()} in line {text[: match.end()].count(chr(10)) + 1}" for match in BARRIER.finditer(text)
    ]


def switched(text: str) -> Mutant:
    """`text` where barrier i is skipped while the global `calm_fast_mutant` is i: one compilation for all of them."""
    numbers = itertools.count()
    body = BARRIER.sub(lambda match: f" if (calm_fast_mutant != {next(numbers)}) {match.group().strip()}", text)
    return Mutant(
        "switched", body.replace("#pragma once", "#pragma once\ninline volatile int calm_fast_mutant = -1;", 1)
    )


def choose(op: str, csrc: Path, number: int) -> None:
    """Which barrier of a switched source is skipped from now on."""
    ctypes.c_int.in_dll(emulation.library_of(op, csrc), "calm_fast_mutant").value = number


def replaced(text: str, old: str, new: str) -> Mutant:
    """`text` with its only `old` replaced by `new`."""
    if text.count(old) != 1:
        raise ValueError(f"{old!r} is in the source {text.count(old)} times: a mutation must hit one place")
    return Mutant(f"{old} -> {new}", text.replace(old, new))


def copy_of(csrc: Path, folder: Path, op: str, mutant: Mutant) -> Path:
    """A copy of csrc/ in `folder` whose device code is the mutant."""
    place = folder / "csrc"
    for name in (op, "common", "emulation"):
        shutil.copytree(csrc / name, place / name, dirs_exist_ok=True)
    emulation.kernels(op, place).write_text(mutant.text)
    return place


def truths(op: str, cases: list[Case]) -> list[tuple[Case, dict, Truth]]:
    """Each case with its inputs and the float64 truth."""
    ops = op_cases(op)
    built = [(case, ops.build(case, torch.device("cpu"))) for case in cases]
    return [(case, inputs, truth_of(ops, inputs, case.dtype)) for case, inputs in built]


def what_is_wrong(
    op: str, prepared: list[tuple[Case, dict, Truth]], csrc: Path, schedules: tuple[emulation.Schedule, ...]
) -> str | None:
    """The first complaint of the emulation, or the first wrong result, over all schedules; None where all is well."""
    emulation.library_of(op, csrc)  # a mutant that does not compile raises here: it has shown nothing
    run: Callable = emulation.adapter(op).run
    for most_blocks, schedule in ((blocks, schedule) for schedule in schedules for blocks in (0, 2)):
        for case, inputs, truth in prepared:
            try:
                found = run(inputs, schedule, csrc, most_blocks)
            except emulation.EmulationError as problem:
                return str(problem)
            if found is None:
                continue
            own = Truth({name: truth.values[name] for name in found}, truth.bounds, truth.exact)
            for row in judge(case, "native", torch.device("cpu"), found, own):
                if not row.ok:
                    return f"{case} {schedule.order}: {row.quantity} is off by {row.error} of {row.bound}"
    return None
