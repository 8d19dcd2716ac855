"""How setup.py builds the compiled library: with a compiler, without one, and where compiling fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="no C++ compiler on Linux here")
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "calm_fast", "kernels", "benchmarks")


@pytest.fixture
def tree(tmp_path):
    """A copy of what a build reads, with one op's C++ only: compiling all of it is test_packaging's part."""
    copy, skipped = tmp_path / "tree", shutil.ignore_patterns("__pycache__", "*.so", "results")
    for name in (*SOURCES, "csrc/common", "csrc/dual_lora", "csrc/bindings.cpp"):
        source, target = ROOT / name, copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target, ignore=skipped) if source.is_dir() else shutil.copy2(source, target)
    return copy


def build(tree, *command, **env):
    """A build's exit code and everything it said. An empty value takes the variable away."""
    settings = {k: v for k, v in (os.environ | {"MAX_JOBS": "1"} | env).items() if v or k not in env}
    settings = {k: v for k, v in settings.items() if not k.startswith("CALM_FAST") or k in env}
    done = subprocess.run(
        [sys.executable, *command], cwd=tree, env=settings, capture_output=True, text=True, timeout=240
    )
    return done.returncode, done.stdout + done.stderr


def wheel_of(tree):
    (wheel,) = (tree / "dist").glob("*.whl")
    return wheel.name, {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")}


def without_compilers(tmp_path):
    """A PATH with nothing on it but what a build needs besides a compiler."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return str(folder)


@pytest.mark.parametrize("how", ["CXX=false", "PATH", "CALM_FAST_NATIVE=0"])
def test_without_a_compiler_the_wheel_is_pure_and_the_build_says_why(tree, tmp_path, how):
    env, why = {
        "CXX=false": ({"CXX": "false"}, "no C++20 compiler works here (false: "),
        "PATH": (
            {"PATH": without_compilers(tmp_path), "CXX": ""},
            "no C++20 compiler works here (c++: FileNotFoundError",
        ),
        "CALM_FAST_NATIVE=0": ({"CALM_FAST_NATIVE": "0"}, "CALM_FAST_NATIVE=0"),
    }[how]
    code, said = build(tree, "setup.py", "-q", "bdist_wheel", **env)
    assert code == 0, said
    assert f"[calm_fast] pure Python, no compiled library: {why}" in said
    name, libraries = wheel_of(tree)
    assert name.endswith("-py3-none-any.whl") and not libraries


def test_a_library_that_was_asked_for_is_not_left_out(tree):
    for variable in ("CALM_FAST_NATIVE", "CALM_FAST_CUDA"):
        code, said = build(tree, "setup.py", "-q", "bdist_wheel", CXX="false", **{variable: "1"})
        assert code != 0 and "the compiled library was requested, but no C++20 compiler works here" in said
    code, said = build(tree, "setup.py", "-q", "bdist_wheel", CALM_FAST_NATIVE="yes")
    assert code != 0 and "`CALM_FAST_NATIVE` must be auto, 0 or 1, got 'yes'" in said


@needs_compiler
def test_cuda_that_was_asked_for_is_not_left_out(tree):
    import torch

    if torch.version.cuda:
        pytest.skip("torch is a CUDA build here")
    code, said = build(tree, "setup.py", "-q", "bdist_wheel", CALM_FAST_CUDA="1")
    assert code != 0 and "[calm_fast] CALM_FAST_CUDA=1, but" in said


@needs_compiler
def test_source_that_does_not_compile_is_an_error_that_names_the_way_out(tree):
    (tree / "csrc" / "bindings.cpp").write_text('#error "broken on purpose"\n')
    code, said = build(tree, "setup.py", "-q", "bdist_wheel")
    assert code != 0 and "broken on purpose" in said
    assert "compiling the library failed" in said and "CALM_FAST_NATIVE=0 installs calm_fast without it" in said


CHECK = """
import torch, calm_fast
from calm_fast.core import native_library
print(native_library.__file__, native_library.obstacle("dual_lora"), sep="|")
"""


@needs_compiler
@pytest.mark.slow
def test_editable_install_builds_in_place_and_goes_back_to_pure(tree, tmp_path):
    home = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True, timeout=120)
    python = str(home / "bin" / "python")
    site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    paths = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    Path(site.strip(), "lent.pth").write_text("\n".join(paths) + "\n")  # torch of this environment
    install = ("-m", "pip", "--python", python, "install", "--no-index", "--no-deps", "--no-build-isolation", "-e", ".")

    def obstacle():
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run([python, "-c", CHECK], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        file, why = done.stdout.strip().split("|")
        assert Path(file).is_relative_to(tree)
        return why

    code, said = build(tree, *install)
    assert code == 0, said
    assert (tree / "calm_fast" / "_cpu.abi3.so").is_file() and obstacle() == "None"
    code, said = build(tree, *install, CALM_FAST_NATIVE="0")
    assert code == 0, said
    assert "calm_fast._cpu is not there: calm_fast was installed without it" in obstacle()


@needs_compiler
@pytest.mark.slow
def test_isolated_build_finds_the_torch_it_is_installed_beside(tree, tmp_path):
    """pip makes an environment for the build that holds setuptools and ninja from the package index, and no torch."""
    where = tmp_path / "wheels"
    code, said = build(tree, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(where), ".")
    if code != 0 and any(text in said for text in ("Could not find a version", "No matching distribution")):
        pytest.skip("no package index is reachable, which an isolated build needs")
    assert code == 0, said[-3000:]
    (wheel,) = where.glob("*.whl")
    assert "cp310-abi3" in wheel.name
    built = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")}
    assert "calm_fast/_cpu.abi3.so" in built and built <= {f"calm_fast/{name}.abi3.so" for name in ("_cpu", "_cuda")}
