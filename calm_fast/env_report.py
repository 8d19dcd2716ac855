"""A report of installed versions, devices, the implementations that run here, and the reasons why others do not.

It needs the standard library only and looks up every fact on its own, so it also works where torch or Triton is missing
or broken. Run `calm-fast env`, `python -m calm_fast.env_report` or `python -m calm_fast.env_report --json`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from calm_fast._version import __version__
from calm_fast.core.broken_pipe import quiet_end
from calm_fast.core.compatibility import newer_than_tried

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "numpy",
    "math-verify",
    "matplotlib",
    "typer",
    "rich",
    "tqdm",
)
_VARIABLES = ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def _brief(problem: BaseException) -> str:
    """Return one line for an exception, with the home folder written as ~."""
    text = (str(problem).strip().splitlines() or [""])[0]
    text = text.replace(os.path.expanduser("~"), "~") if os.path.expanduser("~") not in ("/", "~") else text
    return f"{type(problem).__name__}: {text}" if text else type(problem).__name__


def _ask(question: Callable[[], Any]) -> Any:
    """Return the answer, or the reason why there is none: one broken package must not hide the others."""
    try:
        return question()
    except Exception as problem:
        return f"unknown ({_brief(problem)})"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _load(module: str) -> tuple[Any, str]:
    """Return (module, ""), or (None, the reason why it cannot be imported)."""
    try:
        return importlib.import_module(module), ""
    except Exception as problem:
        return None, _brief(problem)


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            found = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        found = []
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{found[0] if found else platform.processor() or platform.machine()}, {usable} usable cores"


def _devices(torch: Any) -> dict[str, str]:
    """Return what torch can compute on: CPU features, threads, the build, and one entry per GPU."""
    found = {
        "CPU features": _ask(torch.backends.cpu.get_cpu_capability),
        "torch threads": str(_ask(torch.get_num_threads)),
        "float32 matmul precision": str(_ask(torch.get_float32_matmul_precision)),
        "torch built for": _ask(lambda: _built_for(torch)),
    }
    if _ask(torch.cuda.is_available) is not True:
        return {**found, "GPU": "none that torch can use"}
    for index in range(torch.cuda.device_count()):
        found[f"GPU {index}"] = _ask(partial(_gpu, torch, index))
    return found


def _built_for(torch: Any) -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "CPU only"


def _gpu(torch: Any, index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, compute capability {properties.major}.{properties.minor}, {memory:.0f} GiB"


def _implementations(torch: Any, torch_problem: str) -> dict[str, dict[str, str]]:
    """Return, for each op and implementation, "yes" or the reason why it does not run here."""
    if torch is None:
        why = f"no: torch cannot be imported ({torch_problem})"
        return {"every op": dict.fromkeys(("reference", "torch", "triton", "native"), why)}
    ops, problem = _load("calm_fast.ops")
    if ops is None:
        return {"every op": {"every implementation": f"no: calm_fast.ops cannot be imported ({problem})"}}
    impls = ("reference", "torch", "triton", "native")
    return {op: {impl: _ask(partial(_runs, torch, op, impl)) for impl in impls} for op in ops.OPS}


def _runs(torch: Any, op: str, impl: str) -> str:
    from calm_fast.core import dispatch, native_library

    if impl == "native":
        devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        whys = {device: native_library.obstacle(op, device) for device in devices}
        served = [device for device, why in whys.items() if not why]
        return f"yes, for {' and '.join(served)} tensors" if served else f"no: {next(iter(whys.values()))}"
    if impl != "triton":
        return "yes"
    if importlib.util.find_spec(f"calm_fast.kernels.{op}") is None:
        return "no: this op has no Triton kernel"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    why = dispatch.triton_obstacle(device)
    if why:
        return f"no: {why}"
    _, problem = _load(f"calm_fast.kernels.{op}.launch")
    if problem:
        return f"no: its kernels cannot be imported ({problem})"
    return "yes, in Triton's CPU interpreter" if dispatch.triton_interpreted() else "yes"


def _compiled_library(torch_problem: str) -> dict[str, str]:
    """Return how each extension module was built and the SIMD lane here, or the reason why it does not load."""
    if torch_problem:
        return {"every part": f"no: torch cannot be imported ({torch_problem})"}
    native, problem = _load("calm_fast.core.native_library")
    info = {"every part": problem} if native is None else _ask(native.build_info)
    if isinstance(info, str):
        return {"every part": info}
    return {
        name: f"no: {found}" if isinstance(found, str) else ", ".join(f"{key} {text}" for key, text in found.items())
        for name, found in info.items()
    }


def collect() -> dict[str, Any]:
    """Return the report as plain data: versions, imports that fail, devices, implementations, variables."""
    torch, torch_problem = _load("torch")
    _, triton_problem = _load("triton")
    problems = {"torch": torch_problem, "triton": triton_problem}
    versions = {name: _ask(partial(_version, name)) for name in _PACKAGES}
    newer = {name: _ask(partial(newer_than_tried, name, versions[name])) for name in _PACKAGES}
    return {
        "calm_fast": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _ask(_cpu),
        "versions": versions,
        "newer than tested": {name: tested for name, tested in newer.items() if tested},
        "broken imports": {n: p for n, p in problems.items() if p and versions[n] != "not installed"},
        "devices": {} if torch is None else _devices(torch),
        "compiled library": _compiled_library(torch_problem),
        "implementations": _implementations(torch, torch_problem),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def lines(report: dict[str, Any]) -> list[str]:
    """Return the report as lines for a person."""
    found = [f"calm_fast {report['calm_fast']}, Python {report['python']}, {report['system']}", report["cpu"]]
    newer = {name: f", newer than tested ({tested})" for name, tested in report["newer than tested"].items()}
    report = report | {"versions": {name: v + newer.get(name, "") for name, v in report["versions"].items()}}
    for title in ("versions", "broken imports", "devices", "compiled library", "environment"):
        if report[title]:
            found += ["", title, *(f"  {name:<26}{value}" for name, value in report[title].items())]
    found += ["", "implementations that run here"]
    for op, impls in report["implementations"].items():
        found += [f"  {op}", *(f"    {name:<24}{value}" for name, value in impls.items())]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report, with --json as JSON. Return the exit code: 2 for any other argument."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv not in ([], ["--json"]):
        print("usage: python -m calm_fast.env_report [--json]", file=sys.stderr)
        return 2
    report = collect()
    print(json.dumps(report, indent=1) if argv else "\n".join(lines(report)))
    return 0


if __name__ == "__main__":
    with quiet_end():
        sys.exit(main())
