"""Memory kept by the process or fresh from the system: the settings, their effect, the messages."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from calm_fast.benchmarks import memory
from calm_fast.benchmarks.compare_worker import Worker

CPU = torch.device("cpu")
# Allocate and release a block of 64 MiB. Print how far the process shrinks, and the peak memory as benchmarks count it,
# before and after keep().
PROBE = """
import json, os
import torch
from calm_fast.benchmarks import memory
from calm_fast.benchmarks.timing import peak_bytes

torch.set_num_threads(1)
size = 64 << 20

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def call():
    return torch.ones(size, dtype=torch.uint8).max()

def given_back():
    block = torch.ones(size, dtype=torch.uint8)
    held = resident()
    del block
    return (held - resident()) / size

call()
found = []
for _ in range(2):
    found.append((given_back(), given_back(), peak_bytes(call, torch.device("cpu"))))
    assert memory.settle(torch.device("cpu")) == ""
print(json.dumps(found))
"""


# Print how far the process grows when it allocates 64 MiB, without and with a reserve of 200.
RESERVE = """
import json, os
import torch
from calm_fast.benchmarks import memory

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def growth():
    before = resident()
    blocks.append(torch.ones(64 << 20, dtype=torch.uint8))
    return (resident() - before) / (64 << 20)

blocks = []
memory.settle(torch.device("cpu"))
growth()
found = [growth()]
memory.reserve(200 << 20)
found += [growth(), growth()]
print(json.dumps(found))
"""


class Library:
    """A C library that records its calls."""

    def __init__(self, answer=1):
        self.told, self.answer = [], answer

    def gnu_get_libc_version(self):
        return b"2.36"

    def mallopt(self, name, value):
        self.told.append((name, value))
        return self.answer


@pytest.fixture
def library(monkeypatch):
    """Fake glibc, so that this process keeps its settings."""
    made = Library()
    monkeypatch.setattr(memory, "_c_library", lambda: made)
    monkeypatch.setattr(memory, "_kept", False)
    return made


@pytest.fixture
def foreign(monkeypatch):
    """Fake a C library other than glibc."""
    monkeypatch.setattr(memory, "_c_library", object)
    monkeypatch.setattr(memory, "_kept", False)


@pytest.mark.skipif(memory.obstacle() is not None, reason=str(memory.obstacle()))
def test_a_reserve_is_there_when_a_block_is_made():
    done = subprocess.run([sys.executable, "-c", RESERVE], capture_output=True, text=True, check=True, timeout=120)
    without, first, second = json.loads(done.stdout)
    assert without > 0.9 and first < 0.1 and second < 0.1


def test_a_reserve_is_bounded_and_for_kept_memory_only(library, monkeypatch):
    made = []
    monkeypatch.setattr(memory.torch, "empty", lambda size, dtype: made.append(size) or torch.zeros(1))
    memory.reserve(1 << 20)
    assert made == []
    memory.settle(CPU)
    monkeypatch.setattr(memory, "_available", lambda: 4 << 20)
    memory.reserve(1 << 19)
    memory.reserve(1 << 40)
    assert made == [1 << 19, 1 << 20]


@pytest.mark.skipif(memory.obstacle() is not None, reason=str(memory.obstacle()))
def test_released_memory_stays_and_peaks_are_counted_as_before():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (*system, system_peak), (*kept, kept_peak) = json.loads(done.stdout)
    assert min(system) > 0.9 and max(map(abs, kept)) < 0.1
    assert 64 << 20 <= system_peak == kept_peak < (64 << 20) + 4096


def test_kept_is_the_default_and_what_glibc_is_told(library):
    assert memory.settle(CPU) == "" and memory.settle(CPU, "kept") == ""
    assert library.told == [(-4, 0), (-1, -1)] * 2  # M_MMAP_MAX, M_TRIM_THRESHOLD


def test_system_changes_nothing_and_is_said(library):
    assert memory.settle(CPU, "system") == "memory from the system"
    assert library.told == []


def test_a_gpu_has_an_allocator_of_its_own(library):
    assert [memory.settle(torch.device("cuda"), wanted) for wanted in (None, "kept", "system")] == [""] * 3
    assert library.told == []


def test_kept_memory_cannot_become_the_systems_again(library):
    memory.keep()
    with pytest.raises(memory.RefusedError, match="keeps its memory already"):
        memory.settle(CPU, "system")


def test_a_refusal_of_glibc_is_an_error(library):
    library.answer = 0
    with pytest.raises(memory.RefusedError, match=r"glibc refuses mallopt\(-4, 0\)"):
        memory.settle(CPU)
    assert library.told == [(-4, 0)] and not memory._kept


def test_another_c_library_is_said_and_asking_for_kept_is_refused(foreign):
    assert memory.settle(CPU) == memory.settle(CPU, "system") == memory.LABEL
    with pytest.raises(memory.RefusedError, match="only glibc can be told to keep released memory"):
        memory.settle(CPU, "kept")


@pytest.mark.parametrize("error", [OSError, TypeError])
def test_a_system_without_a_c_library_to_ask_is_another_one(error, monkeypatch):
    def refuse(name):
        raise error(name)

    monkeypatch.setattr(memory.ctypes, "CDLL", refuse)
    assert "only glibc" in memory.obstacle()


@pytest.mark.parametrize(("wanted", "cold", "ending"), [
    ("system", False, ", memory from the system"), (None, False, " thread"),
    ("system", True, ", memory from the system, cold cache"), ("kept", True, ", cold cache"),
])  # fmt: skip
def test_each_side_of_a_comparison_says_it(wanted, cold, ending, library, monkeypatch):
    monkeypatch.setattr("calm_fast.benchmarks.timing._FLUSH_BYTES", 64)
    name = Worker("cpu", torch.get_num_threads(), cold, 0, "abc", wanted).setting.device_name
    assert name.replace("threads", "thread").endswith(ending) and bool(library.told) == (wanted != "system")
