"""The contents of an installed calm_fast and the effects of importing it, in fresh Python processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from filelock import FileLock
from packaging.requirements import Requirement

import calm_fast

ROOT = Path(__file__).resolve().parents[1]
MAPPED = {
    "kernels": "calm_fast/kernels",
    "benchmarks": "calm_fast/benchmarks",
    "calm_fast": "calm_fast",
}
SOURCES_ONLY = "verify/emulated/"  # of calm_fast/: runs the kernels of csrc/, which a wheel does not hold
NOT_SOURCE = shutil.ignore_patterns(
    ".git",
    ".venv",
    "build",
    "dist",
    "__pycache__",
    "*.egg-info",
    ".pytest_cache",
    ".ruff_cache",
    ".mypy_cache",
    ".benchmarks",
    "*.so",
)


def run_python(code: str, cwd: Path, **env: str) -> str:
    """Run `code` in a fresh interpreter and return its output."""
    base = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    settings = base | {"OMP_NUM_THREADS": "1"} | env
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=settings, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, f"{code}\n--- failed with\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


ONLY_THE_WHEEL = """
import sys
# the development install must not lend the wheel files that it lacks
sys.meta_path = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
assert not [name for name in sys.modules if name.partition(".")[0] == "calm_fast"]
"""


def run_installed(forked, code: str, cwd: Path, installed: Path) -> str:
    """Run `code` with the wheel in `installed` as its calm_fast and return its output."""
    done = forked.run("-c", ONLY_THE_WHEEL + code, cwd=cwd, path=installed)
    assert done.returncode == 0, f"{code}\n--- failed with\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


def source_files(folder: str) -> set[str]:
    """Return the files of one source folder, relative to it, without build leftovers."""
    top = ROOT / folder
    paths = (path.relative_to(top) for path in top.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if "__pycache__" not in path.parts and path.suffix not in (".pyc", ".so")}


def unoptimised_compiler(folder: Path) -> dict[str, str]:
    """Make the compiler that setup.py takes work with -O0, whatever flags come before: half the time of -O3.

    Set-up compiled the same sources with -O3, and the tests of the ops run that. Here they are only packed and called.
    """
    found = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        return {}
    script = folder / "c++"
    script.write_text(f'#!/bin/sh\nexec {found} "$@" -O0\n')
    script.chmod(0o755)
    return {"CXX": str(script)}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel, through the sdist, from a copy of the tree, once for all test processes."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    dist = shared / "dist"
    with FileLock(shared / "dist.lock"):
        if not dist.exists():
            copy = shared / "source"
            shutil.copytree(ROOT, copy, ignore=NOT_SOURCE)
            command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(shared / "building")]
            # the CUDA part takes minutes to compile and has its own check (make cuda-gate)
            settings = {"CALM_FAST_CUDA": "0"} | os.environ | unoptimised_compiler(shared)
            done = subprocess.run(command, cwd=copy, env=settings, capture_output=True, text=True, timeout=240)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            (shared / "building").rename(dist)
    (path,) = dist.glob("*.whl")
    return path


def test_leftovers_of_an_earlier_build_are_not_packed(tmp_path: Path) -> None:
    """setuptools packs all of build/lib, so a module that was moved since would come back."""
    copy = tmp_path / "source"
    shutil.copytree(ROOT, copy, ignore=NOT_SOURCE)
    stale = copy / "build" / "lib" / "calm_fast" / "ops" / "__init__.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    settings = os.environ | {"CALM_FAST_NATIVE": "0"}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_py"], cwd=copy, env=settings, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not stale.exists() and (stale.parents[1] / "ops.py").is_file()


@pytest.fixture(scope="session")
def wheel_names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="session")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into an empty folder, without its dependencies."""
    target = tmp_path_factory.mktemp("installed")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        target,
    ]
    subprocess.run([*command, wheel], check=True, capture_output=True, timeout=240)
    return target


@pytest.mark.parametrize("folder", MAPPED)
def test_wheel_holds_every_source_file(wheel_names, folder):
    files = {name for name in source_files(folder) if not name.startswith(SOURCES_ONLY)}
    assert files, f"{folder} is empty"
    missing = {name for name in files if f"{MAPPED[folder]}/{name}" not in wheel_names}
    assert not missing, f"not in the wheel from {folder}: {sorted(missing)}"


def test_wheel_holds_nothing_but_calm_fast(wheel_names):
    tops = {name.split("/")[0] for name in wheel_names}
    assert tops == {"calm_fast", f"calm_fast-{calm_fast.__version__}.dist-info"}


def test_wheel_holds_the_compiled_library_where_a_compiler_is(wheel, wheel_names):
    """One wheel serves Python >= 3.10 and torch >= 2.11. Without a compiler it is pure Python."""
    start, name = f"calm_fast-{calm_fast.__version__}-", wheel.name
    if sys.platform == "linux" and any(map(shutil.which, ("c++", "g++", "clang++"))):
        assert name.startswith(f"{start}cp310-abi3-linux_")
        assert {n for n in wheel_names if n.endswith(".so")} == {"calm_fast/_cpu.abi3.so"}
    else:
        assert name == f"{start}py3-none-any.whl"
        assert not [n for n in wheel_names if n.endswith(".so")]


def test_sdist_holds_the_sources_of_the_compiled_library(wheel):
    (sdist,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    adapters = {name for name in source_files("calm_fast") if name.startswith(SOURCES_ONLY)}
    assert adapters and {f"calm_fast/{name}" for name in adapters} <= names
    missing = {f"csrc/{name}" for name in source_files("csrc")} - names
    assert source_files("csrc") and not missing
    assert not [name for name in names if name.endswith(".so")]


def test_wheel_carries_version_and_licence(wheel_names, metadata):
    assert metadata["Version"] == calm_fast.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("licenses/LICENSE") for name in wheel_names)


def test_no_dependency_but_transformers_has_an_upper_pin(metadata):
    required = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    core = {r.name: r for r in required if "extra ==" not in str(r.marker or "")}
    assert {"torch", "transformers", "triton", "safetensors", "math-verify", "matplotlib"} <= set(core)
    assert str(core["torch"].specifier) == ">=2.11"
    assert str(core["triton"].marker) == 'platform_system == "Linux"'
    bounded = [str(r) for r in required if any(s.operator != ">=" for s in r.specifier)]
    assert bounded == ["transformers<6,>=5.17"]  # a major release may break us, a minor one must not


def test_installed_wheel_imports_from_elsewhere(installed, tmp_path, forked):
    code = """
from importlib.metadata import distribution
import calm_fast, calm_fast.kernels, calm_fast.benchmarks, calm_fast.ops, calm_fast.modules, calm_fast.hf
for module in (calm_fast, calm_fast.kernels, calm_fast.benchmarks):
    print(module.__file__)
(script,) = [e for e in distribution("calm-fast").entry_points if e.name == "calm-fast"]
assert callable(script.load())
import calm_fast.benchmarks.registry
"""
    printed = run_installed(forked, code, tmp_path, installed).splitlines()
    assert len(printed) == 3
    assert all(Path(line).is_relative_to(installed) for line in printed), printed


def test_installed_wheel_runs_its_compiled_library(installed, wheel, tmp_path, forked):
    code = """
import torch, calm_fast
from calm_fast.core import native_library
print(native_library.__file__, native_library.obstacle("dual_lora"))
x, y, a, b, w = (torch.randn(*s) for s in ((3, 8), (3, 8), (2, 8), (8, 2), (8, 8)))
out = [calm_fast.ops.dual_lora(x, y, a, b, a, b, w, w, (w,), scaling=1.0, impl=i) for i in ("native", "reference")]
torch.testing.assert_close(*out)
"""
    if wheel.name.endswith("none-any.whl"):
        pytest.skip("no compiler here: the wheel is pure Python")
    file, obstacle = run_installed(forked, code, tmp_path, installed).split(" ", 1)
    assert Path(file).is_relative_to(installed) and obstacle == "None"


def test_installed_wheel_says_why_it_emulates_no_kernels(installed, tmp_path, forked):
    code = """
import importlib.util
from calm_fast.verify.run import plan
assert importlib.util.find_spec("calm_fast.verify.emulated") is None
(part,) = [part for part in plan(["vote"], ["native"]) if part.emulated]
print(part.skipped)
"""
    printed = run_installed(forked, code, tmp_path, installed)
    assert printed == "no csrc/ in this installation: the kernels are emulated from a source checkout"


@pytest.mark.parametrize("place", ["root", "elsewhere"])
def test_editable_install_maps_both_folders(place, tmp_path):
    code = "import calm_fast.kernels as k, calm_fast.benchmarks as b; print(k.__file__); print(b.__file__)"
    kernels, benchmarks = run_python(code, ROOT if place == "root" else tmp_path).splitlines()
    if not Path(kernels).is_relative_to(ROOT):
        pytest.skip("calm_fast is installed from a wheel here, not editable")
    assert Path(kernels) == ROOT / "calm_fast/kernels/__init__.py"
    assert Path(benchmarks) == ROOT / "benchmarks/__init__.py"


def test_transformers_runs_a_model_with_the_repository_as_working_directory():
    code = """
import importlib.util, torch
from transformers import LlamaConfig, LlamaForCausalLM
spec = importlib.util.find_spec("kernels")
assert spec is None or spec.origin is None or ROOT not in spec.origin, spec
config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                     num_attention_heads=2, num_key_value_heads=2)
print(tuple(LlamaForCausalLM(config)(torch.arange(5)[None]).logits.shape))
"""
    assert run_python(code.replace("ROOT", repr(str(ROOT))), ROOT).endswith("(1, 5, 32)")


def test_a_package_named_kernels_wins_over_our_folder(tmp_path):
    """Our kernels/ must yield even though the working directory comes first on sys.path."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("OWNER = 'installed'\n")
    assert run_python("import kernels; print(kernels.OWNER)", ROOT, PYTHONPATH=str(tmp_path)) == "installed"
    assert not (ROOT / "kernels" / "__init__.py").exists()


WATCH = """
import sys
started = []
def hook(event, args):
    if event in ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec"):
        started.append((event, args[0]))
sys.addaudithook(hook)
"""
HEAVY = (
    "triton",
    "transformers",
    "torch._inductor",
    "torch.utils.cpp_extension",
    "matplotlib",
    "math_verify",
)


@pytest.mark.parametrize(
    ("first", "statement", "forbidden"),
    # importing a CUDA build of torch starts other programs
    [("", "import calm_fast", ("torch", *HEAVY)), ("import torch", "import calm_fast.ops, calm_fast.kernels", HEAVY)],
)
def test_import_is_light(tmp_path, first, statement, forbidden):
    code = f"{first}\n{WATCH}\n{statement}\nprint([m for m in {forbidden!r} if m in sys.modules], started)"
    assert run_python(code, tmp_path) == "[] []"


BLOCKED = """
import sys
sys.modules["triton"] = None
import torch, calm_fast
q, k, v = (torch.randn(1, 5, 2, 8, requires_grad=True) for _ in range(3))
attend = calm_fast.ops.cross_attention
outs = [attend(q, k, v, causal=True, impl=impl) for impl in ("auto", "torch", "reference")]
outs[0].sum().backward()
torch.testing.assert_close(outs[0], outs[2])
try:
    calm_fast.ops.cross_attention(q, k, v, impl="triton")
except Exception as error:
    print(type(error).__name__, error)
"""


def test_everything_but_triton_works_without_triton(tmp_path):
    printed = run_python(BLOCKED, tmp_path, TRITON_INTERPRET="1").lower()
    assert "triton" in printed and "error" in printed, "an explicit impl that cannot run must say why"


def test_module_works_without_triton(tmp_path):
    code = """
import sys
sys.modules["triton"] = None
import torch, calm_fast
layer = calm_fast.CrossAttention(16, 12, 2)
anchor = torch.randn(2, 4, 16)
print(torch.equal(layer(anchor, torch.randn(2, 6, 12)), anchor))
"""
    assert run_python(code, tmp_path) == "True"
