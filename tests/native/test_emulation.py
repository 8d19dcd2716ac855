"""The CUDA emulation itself: right kernels give right results, and every kind of bug is found on every schedule."""

from __future__ import annotations

import shutil

import pytest
import torch

from calm_fast.verify import emulation
from calm_fast.verify.emulation import SCHEDULES, EmulationError, Schedule

if why := emulation.obstacle("vote"):
    pytest.skip(f"CUDA kernels cannot be emulated: {why}", allow_module_level=True)

PROBES = (
    "right_sum", "no_barrier", "late_write", "shuffle_is_no_barrier", "warp_barrier", "shared_index", "global_index",
    "unwritten", "divergent_barrier", "early_return", "two_barriers", "absent_lane", "partial_shuffle", "same_element",
    "blocks_collide", "misaligned", "atomic_count", "last_block", "wait_for_all", "too_much_shared", "writes_input",
    "block_size", "halves",
)  # fmt: skip


@pytest.fixture(scope="module")
def probes(tmp_path_factory):
    """Return a csrc/ whose op `probes` is tests/native/probes.cu."""
    csrc = tmp_path_factory.mktemp("csrc")
    for name in ("common", "emulation"):
        shutil.copytree(emulation.CSRC / name, csrc / name)
    (csrc / "probes").mkdir()
    shutil.copy(emulation.CSRC.parent / "tests" / "native" / "probes.cu", csrc / "probes" / "probes_emulated.cpp")
    return csrc


@pytest.fixture(params=SCHEDULES, ids=lambda s: f"{s.order}{s.seed}")
def schedule(request):
    return request.param


@pytest.fixture
def run(probes, schedule):
    """run(probe, argument) returns the tensors by name."""

    def call(name: str, argument: int = 0, schedule: Schedule = schedule) -> dict[str, torch.Tensor]:
        numbers = torch.arange(64, dtype=torch.float32)
        tensors = {
            "x": numbers.clone(),
            "out": torch.full((64,), torch.nan),
            "count": torch.zeros(1, dtype=torch.int32),
            "parts": torch.full((64,), torch.nan),
            "b": (numbers * 1.7 - 30).bfloat16(),
            "h": torch.cat((numbers[:32] * 1.7 - 30, 2.0 ** -numbers[:32])).half(),
            "b_out": torch.zeros(64, dtype=torch.bfloat16),
            "h_out": torch.zeros(64, dtype=torch.float16),
        }
        emulation.call("probes", list(tensors.values()), [PROBES.index(name), argument], (), schedule, probes)
        return tensors

    return call


@pytest.mark.parametrize("n", [1, 63, 64])
def test_a_correct_kernel_gives_the_right_result(run, n):
    assert run("right_sum", n)["out"][0] == sum(range(n))


@pytest.mark.parametrize(
    ("probe", "argument", "message"),
    [
        ("no_barrier", 0, "race: reads what|nobody wrote.*`cells`"),
        ("late_write", 0, "race: writes what .* may still read: `cells`|race: reads what"),
        ("shuffle_is_no_barrier", 0, "race: reads what thread|nobody wrote"),
        ("warp_barrier", 1, "race: reads what thread|nobody wrote"),
        ("shared_index", 64, r"write outside the array: `cells`\[64\] \(64 elements of 4 bytes\)"),
        ("shared_index", -1, r"write outside the array: `cells`\[-1\]"),
        ("shared_index", 4, r"race: writes what .* `cells`\[4\]"),
        ("global_index", 1, r"thread \(63,0,0\): read outside the array: `x`\[64\]"),
        ("global_index", -1, r"thread \(0,0,0\): read outside the array: `x`\[-1\]"),
        ("unwritten", 0, r"thread \(5,0,0\): read of memory that nobody wrote: `cells`\[5\]"),
        ("divergent_barrier", 0, "part of the block|returned while other threads"),
        ("early_return", 0, "1 of its threads have returned|returned while other threads"),
        ("two_barriers", 0, "threads of one block wait at different barriers"),
        ("absent_lane", 0, "reads lane 20, which takes no part"),
        ("partial_shuffle", 0, "names lane|returned while its warp waits"),
        ("same_element", 0, r"race: writes what thread \d+ of block 0 writes"),
        ("blocks_collide", 0, r"race: writes what thread 0 of block \d writes"),
        ("misaligned", 3, "not a multiple of 16"),
        ("last_block", 0, "race: reads what thread 0 of block"),
        ("too_much_shared", 65, "the launch gives 256"),
        ("writes_input", 0, "write to an input: `x`"),
        ("block_size", 1025, "1 to 1024 threads, got 1025"),
    ],
)
def test_a_bug_is_found_on_every_schedule(run, probe, argument, message):
    with pytest.raises(EmulationError, match=message):
        run(probe, argument)


def test_syncwarp_orders_memory_within_a_warp(run):
    expected = torch.arange(64).view(2, 32).flip(1).flatten().float()
    assert torch.equal(run("warp_barrier", 0)["out"], expected)


def test_an_aligned_wide_load_is_allowed(run):
    assert run("misaligned", 4)["out"][0] == 4 + 7


def test_atomics_count_every_thread(run):
    assert run("atomic_count")["count"].item() == 5 * 64


def test_fence_and_atomic_order_the_last_block_after_all_others(run):
    found = run("last_block", 1)
    assert found["out"][0] == 2 * (0 + 1 + 2 + 3) and found["count"].item() == 0


def test_blocks_may_wait_for_each_other_if_all_are_resident(run):
    assert run("wait_for_all", schedule=Schedule("random", 5, resident=3))["out"][:3].tolist() == [1, 1, 1]
    assert run("wait_for_all", schedule=Schedule("forward", resident=1))["out"][0] == 0  # waits in vain, as on a GPU


def test_16_bit_floats_round_as_in_torch(run):
    found = run("halves")
    b, h = found["b"].float(), found["h"].float()
    assert torch.equal(found["out"], b + h)
    assert torch.equal(found["b_out"], (b * 1.001).bfloat16())
    assert torch.equal(found["h_out"], (h * 1.001).half())


def test_random_schedules_differ_and_repeat(run, probes):
    """The error that a racy kernel is caught with depends on the seed and on nothing else."""

    def error_of(seed: int) -> str:
        with pytest.raises(EmulationError) as caught:
            run("no_barrier", schedule=Schedule("random", seed))
        return str(caught.value)

    seen = [error_of(seed) for seed in range(6)]
    assert len(set(seen)) > 1 and seen == [error_of(seed) for seed in range(6)]


def test_call_refuses_strided_tensors(probes):
    with pytest.raises(ValueError, match=r"`tensors\[0\]` must be contiguous"):
        emulation.call("probes", [torch.zeros(8, 8).T], [0, 0], (), csrc=probes)


def test_obstacle_names_what_is_missing(monkeypatch, tmp_path):
    assert "no CUDA kernel" in emulation.obstacle("linear_nce")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "g++ is not on the PATH" in emulation.obstacle("vote")
    monkeypatch.setattr(emulation, "CSRC", tmp_path / "csrc")
    assert "no csrc/ in this installation" in emulation.obstacle("vote")


def test_a_source_that_does_not_compile_raises_the_compilers_messages(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "broken_emulated.cpp").write_text("int f( { return no_such_name; }\n")
    with pytest.raises(EmulationError, match="broken: g\\+\\+ failed:"):
        emulation.compile_emulated("broken", tmp_path, tmp_path / "x.so")
