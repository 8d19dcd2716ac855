"""How the compiled library is found, what it reports about itself, and the errors where it is missing."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import calm_fast
from calm_fast import env_report
from calm_fast.core import native_library
from calm_fast.ops import OPS

ROOT = Path(calm_fast.__file__).resolve().parent
BUILT = importlib.util.find_spec("calm_fast._cpu") is not None
built = pytest.mark.skipif(not BUILT, reason="calm_fast was installed without the compiled library")


@pytest.fixture
def fresh(monkeypatch):
    """Clear the cached answers before and after a test."""
    for cached in (native_library._load, native_library._served, native_library._find_obstacle):
        cached.cache_clear()
        monkeypatch.setattr(native_library, cached.__name__, cached)
    yield monkeypatch
    for cached in (native_library._load, native_library._served, native_library._find_obstacle):
        cached.cache_clear()


@built
def test_library_says_how_it_was_built():
    info = native_library.build_info()["_cpu"]
    assert set(info) == {"compiler", "built with torch", "stable ABI target", "Python ABI", "best lane here"}
    assert info["stable ABI target"].lower().startswith("0x020b0000")
    assert info["Python ABI"].lower() == "0x030a0000"
    assert info["best lane here"] in ("scalar", "avx2", "avx512", "avx512_bf16")


@pytest.fixture(autouse=True)
def _own_lane(request):
    if request.config.getoption("lane"):
        pytest.skip("these tests set the lane themselves")


@built
def test_lane_agrees_with_what_torch_sees():
    lane, seen = native_library.build_info()["_cpu"]["best lane here"], torch.backends.cpu.get_cpu_capability()
    assert lane.startswith("avx512") == seen.startswith("AVX512")


@pytest.fixture
def lanes():
    """Return the lanes of this CPU, the narrowest first; lift the limit after the test."""
    best = native_library.build_info()["_cpu"]["best lane here"]
    yield native_library.LANES[: native_library.LANES.index(best) + 1]
    native_library.limit_lane(None)


@built
def test_a_limit_holds_for_every_kernel_and_can_be_lifted(lanes):
    rows = torch.ones(1, 1, 1, 8)
    for number, lane in enumerate(lanes):
        native_library.limit_lane(lane)
        assert native_library.build_info()["_cpu"]["best lane here"] == lane
        if number + 1 < len(lanes):
            wider = f"`lane` must be -1 or at most {number}, the best lane here .{lane}., got {number + 1}"
            with pytest.raises(RuntimeError, match=wider):
                torch.ops.calm_fast._cross_attention_native_decode(rows, rows, rows, None, None, False, 1.0, number + 1)
    native_library.limit_lane(None)
    assert native_library.build_info()["_cpu"]["best lane here"] == lanes[-1]


@built
def test_auto_chooses_as_on_a_cpu_of_the_lane(lanes, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    native_library.limit_lane(None)
    if lanes[-1].startswith("avx512"):
        assert (
            native_library.slowness(torch.bfloat16) == "this CPU has matrix units for 16-bit products, which torch uses"
        )
        for lane in ("avx512", "avx512_bf16"):  # a CPU that ends there has no matrix units
            native_library.limit_lane(lane)
            assert native_library.slowness(torch.bfloat16) is None
    native_library.limit_lane("scalar")
    assert native_library.slowness(torch.float32) == "this CPU has neither AVX2 nor AVX-512"
    if "avx2" in lanes:
        native_library.limit_lane("avx2")
        assert native_library.slowness(torch.bfloat16) is None and native_library.slowness(torch.float32) is None
    monkeypatch.undo()


@built
def test_an_unknown_lane_is_refused_by_name():
    with pytest.raises(ValueError, match="limit_lane: `name` must be one of 'scalar', 'avx2', .* or None, got 'sse'"):
        native_library.limit_lane("sse")


@built
@pytest.mark.parametrize("op", OPS)
def test_an_op_is_served_exactly_where_its_folder_has_code(op):
    written = any((ROOT.parent / "csrc" / op).glob("*_cpu.cpp"))
    if not (ROOT.parent / "csrc").is_dir():
        pytest.skip("the sources are not beside the package")
    why = native_library.obstacle(op, "cpu")
    assert (why is None) == written
    assert why is None or why == f"the compiled library has no {op} for cpu tensors"


@built
def test_every_declared_function_has_an_implementation():
    assert native_library.obstacle("dual_lora", "cpu") is None
    names = [n for n in torch._C._dispatch_get_all_op_names() if re.match(r"calm_fast::_\w+_native_", n)]
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = {"CPU"} if isinstance(native_library._load("_cuda"), str) else {"CPU", "CUDA"}
    cuda = "".join(path.read_text() for path in (Path(__file__).resolve().parents[2] / "csrc").glob("*/*_cuda.cu"))

    def found(name: str) -> bool:  # where _cuda is not built, what its sources register has to do
        return any(has(name, key) for key in keys) or ("CUDA" not in keys and f'"{name.split("::")[1]}"' in cuda)

    assert names and not [name for name in names if not found(name)]


@built
def test_no_two_ops_answer_to_one_prefix():
    """`obstacle("x")` looks for functions x and x_..., so no op's name may be such a prefix of another's."""
    assert not [(a, b) for a in OPS for b in OPS if a != b and b.startswith(f"{a}_")]


def test_other_devices_have_no_code():
    assert native_library.obstacle("dual_lora", "mps") == "the compiled library has no code for mps tensors"


def test_absent_library_is_named(fresh):
    found = importlib.util.find_spec
    fresh.setattr(importlib.util, "find_spec", lambda name: None if "._c" in name else found(name))
    for device, module in (("cpu", "_cpu"), ("cuda", "_cpu")):
        why = native_library.obstacle("dual_lora", device)
        assert f"the compiled library does not load: calm_fast.{module} is not there" in why
    assert "not there" in native_library.build_info()["_cpu"]


def test_library_that_does_not_load_is_named_with_its_reason(fresh):
    def broken(name):
        raise ImportError("undefined symbol: torch_parallel_for\nmore")

    fresh.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    fresh.setattr(native_library, "importlib", SimpleNamespace(import_module=broken, util=importlib.util))
    why = native_library.obstacle("dual_lora", "cpu")
    assert f"cannot be loaded with torch {torch.__version__}: undefined symbol: torch_parallel_for" in why
    assert "more" not in why
    x, y, a, b, w = (torch.randn(*s) for s in ((3, 8), (3, 8), (2, 8), (8, 2), (8, 8)))
    arguments = (x, y, a, b, a, b, w, w, (w,))
    with pytest.raises(RuntimeError, match="undefined symbol"):
        calm_fast.ops.dual_lora(*arguments, scaling=1.0, impl="native")
    decision = calm_fast.explain("dual_lora", *arguments, scaling=1.0)
    assert decision.impl == "torch" and "undefined symbol" in decision.reason


def test_report_shows_the_library_or_why_not(fresh):
    assert set(env_report.collect()["compiled library"]) == {"_cpu", "_cuda"}
    found = importlib.util.find_spec
    fresh.setattr(importlib.util, "find_spec", lambda name: None if "._c" in name else found(name))
    for cached in (native_library._load, native_library._find_obstacle):
        cached.cache_clear()
    report = env_report.collect()
    assert all(text.startswith("no: calm_fast._c") for text in report["compiled library"].values())
    assert all("is not there" in impls["native"] for impls in report["implementations"].values())
    assert "compiled library" in env_report.lines(report)


@built
def test_import_of_the_package_does_not_load_the_library():
    code = "import sys, calm_fast.ops; print([m for m in sys.modules if m.startswith('calm_fast._c')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
