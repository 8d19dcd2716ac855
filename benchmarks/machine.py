"""Hardware, versions and commit: the context that every measured number needs."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

_PACKAGES = ("torch", "triton", "transformers", "numpy", "peft", "liger-kernel", "cut-cross-entropy")


def device_name(device: torch.device, *remarks: str) -> str:
    """Return the GPU's name, or the CPU's with torch's thread count, followed by the non-empty remarks."""
    return ", ".join([_hardware(device), *filter(None, remarks)])


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        model = next((value.strip() for key, _, value in lines if key.strip() == "model name"), model)
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}"


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and the packages measured; missing packages are left out."""
    from calm_fast import __version__

    found = {"python": platform.python_version(), "calm_fast": __version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # with its build, e.g. +cu130
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def git(*args: str) -> str | None:
    """Return the output of a git command run in this file's folder, or None if it fails."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def checkout() -> Path | None:
    """Return the git checkout that this file belongs to, or None if it is installed or not under git."""
    top, here = git("rev-parse", "--show-toplevel"), Path(__file__).resolve().parent
    if top is None or here.parent != Path(top).resolve():  # installed inside somebody else's repository
        return None
    return here.parent


def commit() -> str | None:
    """Return the checkout's commit, with "-dirty" appended if tracked files differ; None outside a checkout."""
    if checkout() is None:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{git('rev-parse', 'HEAD')}{'-dirty' if changed else ''}"
