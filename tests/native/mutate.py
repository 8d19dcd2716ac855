"""Mutants of a kernel source: one barrier removed, or one text replaced by a wrong one."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from calm_fast.core.numerics import Case, Inputs, Truth, judge, truth_of
from calm_fast.verify import emulation
from calm_fast.verify.cases import op_cases

BARRIER = re.compile(r"^\s*(?:__syncthreads\(\)|__syncwarp\(\)|sync_group<\w+>\(\));", re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    """A source text with one bug."""

    name: str
    text: str


def barriers(text: str) -> list[str]:
    """Return the barrier statements of `text` and their lines, in readable form."""
    return [
        f"{match.group().strip()} in line {text[: match.end()].count(chr(10)) + 1}" for match in BARRIER.finditer(text)
    ]


def with_switchable_barriers(text: str) -> Mutant:
    """Return `text` where barrier i is skipped while the global `calm_fast_mutant` is i: one compilation for all."""
    numbers = itertools.count()
    body = BARRIER.sub(lambda match: f" if (calm_fast_mutant != {next(numbers)}) {match.group().strip()}", text)
    return Mutant(
        "switchable barriers",
        body.replace("#pragma once", "#pragma once\ninline volatile int calm_fast_mutant = -1;", 1),
    )


def skip_barrier(op: str, csrc: Path, number: int) -> None:
    """Skip barrier `number` of a source with switchable barriers from now on; -1 skips none."""
    ctypes.c_int.in_dll(emulation.library_of(op, csrc), "calm_fast_mutant").value = number


def replace_once(text: str, old: str, new: str) -> Mutant:
    """Return `text` with its only occurrence of `old` replaced by `new`."""
    if text.count(old) != 1:
        raise ValueError(f"replace_once: `old` must occur once in the source, got {text.count(old)} times: {old!r}")
    return Mutant(f"{old} -> {new}", text.replace(old, new))


def copy_with_mutant(csrc: Path, folder: Path, op: str, mutant: Mutant, *flags: str) -> Path:
    """Copy csrc/ to `folder` with the mutant as the device code of `op`, compiled with `flags`. Returns the copy."""
    place = folder / "csrc"
    for name in (op, "common", "emulation"):
        shutil.copytree(csrc / name, place / name, dirs_exist_ok=True)
    emulation.kernels(op, place).write_text(mutant.text)
    emulation.MORE_FLAGS[place] = flags
    return place


def with_truth(op: str, cases: list[Case]) -> list[tuple[Case, Inputs, Truth]]:
    """Return each case with its inputs and its float64 truth."""
    ops = op_cases(op)
    built = [(case, ops.build(case, torch.device("cpu"))) for case in cases]
    return [(case, inputs, truth_of(ops, inputs, case.dtype)) for case, inputs in built]


def first_problem(
    op: str, prepared: list[tuple[Case, Inputs, Truth]], csrc: Path, schedules: tuple[emulation.Schedule, ...]
) -> str | None:
    """Return the first error of the emulation or the first wrong result over all schedules, or None."""
    emulation.library_of(op, csrc)  # a mutant that does not compile raises here, because it would prove nothing
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
