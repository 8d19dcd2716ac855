"""Write the Triton kernels as a kernel of the Hugging Face Kernel Hub: `python -m tools.kernel_hub FOLDER`.

    FOLDER/build.toml                        what the Hub's builder reads: name, version, licence, backends
    FOLDER/torch-ext/calm_fast_kernels/      the kernels, the files of calm_fast that they import, and an __init__.py
    FOLDER/build/torch-<backend>/            what the builder makes of these for Python and Triton alone: the same files
                                             with metadata.json, which the package `kernels` loads

A Hub kernel is imported from any folder, beside other versions of itself, so each import of calm_fast becomes a
relative one. csrc/ stays out: what is compiled is built by the Hub's builder for every torch, and needs its compilers.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "calm-fast-kernels"
PACKAGE = NAME.replace("-", "_")
VERSION = 1  # of the public functions, a whole number
OPS = ("cross_attention", "linear_logprob")
BACKENDS = ("cuda", "cpu")  # cpu: in Triton's interpreter
BUILD = f"""\
[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "Apache-2.0"
backends = [{", ".join(f'"{name}"' for name in BACKENDS)}]

[torch-noarch]
"""
PUBLIC = ROOT / "tools" / "skeleton" / "kernel_hub.py.txt"


def source_of(module: str) -> Path | None:
    """Return the file of a module under calm_fast, or None if it is a name inside a module."""
    parts = module.split(".")[1:]
    kernels = parts[:1] == ["kernels"] and len(parts) > 1
    base = (ROOT / "kernels" if kernels else ROOT / "calm_fast").joinpath(*parts[kernels:])
    found = [path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()]
    return found[0] if found else None


def needed(modules: list[str]) -> dict[str, Path]:
    """Return every module of calm_fast that `modules` import, themselves included, with its file."""
    found: dict[str, Path] = {}
    while modules:
        module = modules.pop()
        path = source_of(module)
        if path is None or module in found:
            continue
        found[module] = path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import) and any(alias.name.startswith("calm_fast") for alias in node.names):
                raise ValueError(f"{path}: `import calm_fast...` cannot become relative; write `from calm_fast...`")
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("calm_fast"):
                modules += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def relative(source: str, depth: int) -> str:
    """Return `source` with imports of calm_fast relative to the package, `depth` folders above the file."""
    return re.sub(r"^(\s*from )calm_fast\.", rf"\g<1>{'.' * (depth + 1)}", source, flags=re.MULTILINE)


def files() -> dict[str, str]:
    """Return the package: path inside it -> text."""
    found = {"__init__.py": PUBLIC.read_text(encoding="utf-8")}
    for module, path in needed([f"calm_fast.kernels.{op}.launch" for op in OPS]).items():
        parts = module.split(".")[1:]
        name = "/".join(parts) + ("/__init__.py" if path.name == "__init__.py" else ".py")
        found[name] = relative(path.read_text(encoding="utf-8"), name.count("/"))
        for depth in range(1, name.count("/") + 1):
            found.setdefault("/".join(name.split("/")[:depth]) + "/__init__.py", "")
    return dict(sorted(found.items()))


def metadata(backend: str, package: dict[str, str]) -> str:
    """Return metadata.json of a variant; its id names this text of the kernels."""
    digest = hashlib.sha256("".join(f"{name}\0{text}\0" for name, text in package.items()).encode()).hexdigest()[:12]
    fields = {
        "id": f"_{PACKAGE}_{backend}_{digest}",
        "name": NAME,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }
    return json.dumps(fields, indent=1) + "\n"


def write(folder: Path) -> None:
    """Write the kernel repository into `folder`, which must be empty or absent."""
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"kernel_hub: `folder` must be empty or absent, got {folder}, which has files")
    package = files()
    texts = {"build.toml": BUILD} | {f"torch-ext/{PACKAGE}/{name}": text for name, text in package.items()}
    for backend in BACKENDS:
        variant = f"build/torch-{backend}"
        texts |= {f"{variant}/{name}": text for name, text in package.items()}
        texts[f"{variant}/metadata.json"] = metadata(backend, package)
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the Triton kernels as a repository of the Kernel Hub.")
    parser.add_argument("folder", type=Path, help="empty or absent")
    folder = parser.parse_args(arguments).folder
    try:
        write(folder)
    except FileExistsError as problem:
        print(problem, file=sys.stderr)
        return 1
    print(f"[kernel hub] wrote {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
