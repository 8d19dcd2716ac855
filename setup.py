"""Packages and the compiled library. The declarative settings are in pyproject.toml.

``kernels/<op>`` is installed as ``calm_fast.kernels.<op>`` and ``benchmarks`` as ``calm_fast.benchmarks``.
The container ``kernels/`` deliberately has no ``__init__.py``: Hugging Face publishes a package named ``kernels`` that
transformers imports, and a regular package of that name at the repository root would shadow it.

``csrc/`` becomes two extension modules built against LibTorch's stable ABI, so that one cp310-abi3 wheel serves every
torch >= 2.11. ``calm_fast._cpu`` is built if a C++ compiler works, ``calm_fast._cuda`` if there are nvcc and a CUDA
build of torch, with or without a visible GPU. Without a compiler or without torch the distribution is pure Python.

CALM_FAST_NATIVE=auto|0|1   0: pure Python. 1: fail if the library cannot be built.
CALM_FAST_CUDA=auto|0|1     the same for ``_cuda`` alone.
MAX_JOBS, CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST are torch's own.
"""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
KERNELS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py"))
MAPPED = {"calm_fast.benchmarks": "benchmarks", **{f"calm_fast.kernels.{op}": f"kernels/{op}" for op in KERNELS}}
TORCH_TARGET = (2, 11)  # the oldest torch that the library's stable ABI supports
PYTHON_TARGET = (3, 10)
WITHOUT_BUILDING = {"egg_info", "dist_info", "sdist", "clean", "--version", "--name"}


def packages() -> list[str]:
    """Return every package of the distribution, including the mapped ones and their subpackages."""
    # the adapters of the emulation need csrc/, which a wheel does not hold
    found = find_packages(str(ROOT), include=["calm_fast", "calm_fast.*"], exclude=["calm_fast.verify.emulated"])
    for name, folder in MAPPED.items():
        if (ROOT / folder).is_dir():
            found.append(name)
            found += [f"{name}.{sub}" for sub in find_packages(str(ROOT / folder))]
    return found


def say(message: str) -> None:
    print(f"[calm_fast] {message}", file=sys.stderr, flush=True)


def switch(name: str) -> str:
    value = os.environ.get(name, "auto").lower()
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"[calm_fast] setup: `{name}` must be auto, 0 or 1, got {value!r}")
    return value


def compiler_problem() -> str:
    """Return the reason why no C++20 shared library can be built here, or "". Set CXX to the compiler that works."""
    tried = []
    for command in [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("#include <concepts>\nint probe(std::integral auto x) { return x; }\n")
            arguments = [*shlex.split(command), "-std=c++20", "-fPIC", "-shared", str(source), "-o", f"{source}.so"]
            try:
                done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
            except (OSError, subprocess.TimeoutExpired) as problem:
                tried.append(f"{command}: {type(problem).__name__}")
                continue
        if done.returncode == 0:
            os.environ["CXX"] = command
            return ""
        tried.append(f"{command}: {(done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[0]}")
    return f"no C++20 compiler works here ({'; '.join(tried)})"


def torch_problem() -> str:
    """Return the reason why the library cannot be built against torch, or "".

    An isolated build has no torch and must not install one: the library would be built against that torch but run with
    another. The torch of the target environment is looked up last on sys.path.
    """
    bases = [{}, {"base": sys.base_prefix, "platbase": sys.base_prefix}]
    for folder in (sysconfig.get_path(kind, vars=base) for base in bases for kind in ("purelib", "platlib")):
        if folder not in sys.path and Path(folder, "torch").is_dir():
            sys.path.append(folder)
    try:
        import torch
    except Exception as problem:
        return (
            f"torch cannot be imported at build time ({type(problem).__name__}: {problem}); install torch first, "
            "or install with --no-build-isolation"
        )
    if tuple(map(int, torch.__version__.split(".")[:2])) < TORCH_TARGET:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, TORCH_TARGET))}"
    return ""


def locate_cuda() -> None:
    """Set CUDA_HOME if torch would guess wrong: it takes the folder above nvcc, which may be a wrapper script."""
    nvcc = shutil.which("nvcc")
    guesses = [*([Path(nvcc).resolve().parents[1]] if nvcc else []), Path("/usr/local/cuda")]
    if not (os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")):
        whole = [home for home in guesses if (home / "include" / "cuda_runtime.h").is_file()]
        if whole:
            os.environ["CUDA_HOME"] = str(whole[0])


def toolkit() -> str:
    """Return the CUDA release of nvcc, e.g. 13.0."""
    from torch.utils.cpp_extension import CUDA_HOME

    said = subprocess.run([f"{CUDA_HOME}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
    return said.partition("release ")[2].partition(",")[0]


def cuda_problem() -> str:
    """Return the reason why `_cuda` cannot be built, or "". No GPU needs to be visible."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if not torch.version.cuda:
        return f"torch {torch.__version__} is not a CUDA build"
    if CUDA_HOME is None or not Path(CUDA_HOME, "bin", "nvcc").is_file():
        return "no nvcc found (CUDA_HOME)"
    if torch.version.cuda.split(".")[0] != toolkit().split(".")[0]:
        return f"torch is built for CUDA {torch.version.cuda}, but {CUDA_HOME} has {toolkit() or 'no working nvcc'}"
    return ""


def flags() -> dict[str, list[str]]:
    """Return the flags per compiler. No -march (lanes are chosen at run time) and no fast-math (NaN must survive)."""
    import torch

    target = f"0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000ULL"
    common = ["-O3", "-std=c++20", f"-DTORCH_TARGET_VERSION={target}", f"-DCALM_FAST_TORCH={torch.__version__}"]
    # otherwise an invalid target attribute would silently compile the scalar lane twice
    cxx = [*common, "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror=attributes", "-ffp-contract=off"]
    cxx += ["-fvisibility=hidden", "-g0"]
    return {"cxx": cxx, "nvcc": [*common, "-DUSE_CUDA", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden"]}


def default_architectures() -> str:
    from torch.utils.cpp_extension import CUDA_HOME

    known = subprocess.run([f"{CUDA_HOME}/bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout
    return "8.0;9.0;10.0+PTX" if "compute_100" in known else "8.0;9.0+PTX"


def extensions() -> list[Extension]:
    """Return `_cpu` and, with CUDA, `_cuda`; nothing if the library cannot or must not be built."""
    wanted, cuda = switch("CALM_FAST_NATIVE"), switch("CALM_FAST_CUDA")
    if wanted == "0":
        return pure("CALM_FAST_NATIVE=0")
    why = "the compiled library is built on Linux only" if sys.platform != "linux" else ""
    why = why or compiler_problem() or torch_problem()
    if why and "1" in (wanted, cuda):
        raise SystemExit(f"[calm_fast] the compiled library was requested, but {why}")
    if why:
        return pure(why)
    with contextlib.suppress(ImportError):  # a ninja from the package index is not always on PATH
        import ninja

        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])
    locate_cuda()
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    def sources(pattern: str) -> list[str]:
        return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))

    headers = [path.as_posix() for path in (ROOT / "csrc").rglob("*.h*")]
    shared = {"include_dirs": [str(ROOT / "csrc")], "depends": headers, "py_limited_api": True}
    shared |= {"extra_compile_args": flags(), "extra_link_args": ["-Wl,--as-needed", "-Wl,--strip-all"]}
    cpu = CppExtension("calm_fast._cpu", ["csrc/bindings.cpp", *sources("csrc/*/*_cpu.cpp")], **shared)
    found, kernels = [cpu], sources("csrc/*/*_cuda.cu")
    why = "CALM_FAST_CUDA=0" if cuda == "0" else "" if kernels else "csrc has no CUDA sources"
    why = why or cuda_problem()
    if why and cuda == "1":
        raise SystemExit(f"[calm_fast] CALM_FAST_CUDA=1, but {why}")
    if why:
        say(f"building calm_fast._cpu; not calm_fast._cuda: {why}")
        return found
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_architectures())
    say(f"building calm_fast._cpu and calm_fast._cuda for {os.environ['TORCH_CUDA_ARCH_LIST']}")
    shared = {**shared, "include_dirs": [str(ROOT / "csrc")], "define_macros": [("CALM_FAST_CUDA_MODULE", toolkit())]}
    return [*found, CUDAExtension("calm_fast._cuda", ["csrc/bindings.cpp", *kernels], **shared)]


def forget_old_sources() -> None:
    """Delete the copies of sources that an earlier build left in build/lib*.

    setuptools packs all that lies there: a wheel would hold modules that have been moved or removed since.
    """
    for path in (ROOT / "build").glob("lib*/calm_fast/**/*"):
        if path.is_file() and path.suffix != ".so":
            path.unlink()


def pure(why: str) -> list[Extension]:
    """Return no extensions; an editable install deletes those that an earlier build left in the tree."""
    say(f"pure Python, no compiled library: {why}")
    if "editable_wheel" in sys.argv:
        for stale in (ROOT / "calm_fast").glob("_c*.so"):
            stale.unlink()
    return []


def native_arguments() -> dict[str, Any]:
    """Return the arguments of setup() for the compiled library; none for commands that build nothing."""
    if set(sys.argv[1:]) & WITHOUT_BUILDING or len(sys.argv) < 2:
        return {}
    modules = extensions()
    if not modules:
        return {}
    from torch.utils.cpp_extension import BuildExtension

    class BuildNative(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as problem:
                raise SystemExit(
                    f"[calm_fast] compiling the library failed ({type(problem).__name__}: {problem}). The compiler's "
                    "messages are above (pip shows them with -v). CALM_FAST_NATIVE=0 installs calm_fast without it; "
                    "CALM_FAST_CUDA=0 leaves out the CUDA part."
                ) from problem

    tag = f"cp{PYTHON_TARGET[0]}{PYTHON_TARGET[1]}"
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": BuildNative},
        "options": {"bdist_wheel": {"py_limited_api": tag}},
    }


forget_old_sources()
setup(
    packages=packages(),
    package_dir=MAPPED,
    package_data={
        "calm_fast": ["py.typed", "core/compatibility.json"],
        **{f"calm_fast.kernels.{op}": ["tuned/*.json"] for op in KERNELS},
        "calm_fast.benchmarks": ["*.sh", "*.ini", "results/**"],
    },
    **native_arguments(),
)
