"""The floors of the house: imports only point down. Read off the syntax tree, so nothing has to be importable."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import calm_fast

ROOT = Path(__file__).resolve().parents[1]
# floor -> what it may import of calm_fast besides itself
ROOMS = ("_ops", "kernels", "core", "_version")
OPS = ("ops", "reference", *ROOMS)
MODULES = ("modules", *OPS)
HF = ("hf", *MODULES)
CONSISTENCY = ("consistency", *HF)
NAT = ("nat", *CONSISTENCY)
DOORS = ("experiments", "verify", "benchmarks", "env_report", "cli", "serving", "composing", "planning", *NAT)
USERS = ("experiments", "benchmarks", "cli")  # they may `import calm_fast` as anybody else does
FLOORS: dict[str, tuple[str, ...]] = {
    "_version": (),
    "core": ("_version",),
    "kernels": ("core",),
    "_ops": ROOMS,
    "reference": ("_ops",),
    "ops": ("_ops", "core"),
    "modules": OPS,
    "hf": MODULES,
    "consistency": HF,
    "nat": CONSISTENCY,
    "composing": CONSISTENCY,
    "serving": ("composing", *CONSISTENCY),
    "planning": HF,
    "env_report": OPS,
    "lm_eval": HF,
    "vllm": HF,
    "experiments": DOORS,
    "verify": DOORS,
    "benchmarks": DOORS,
    "cli": DOORS,
    "__main__": ("cli",),
    "__init__": ("_version",),
}
# explain() and the package's __getattr__ import by name; cases run the public op inside their functions
LAZY_DOORS = {"__init__": ("", *DOORS), "core": ("ops", "_ops"), "_ops": ("ops",)}
# inside a room: what these files may import of calm_fast; api.py may import all of its room
ROOM_FILES = {
    "reference": re.compile(r"calm_fast\._ops\.\w+\.(reference|masked)"),
    "masked": re.compile(r"calm_fast\.core\.dispatch"),  # products over visible pairs, part of a definition
    "torch_impl": re.compile(r"calm_fast\.(core\.\w+|_ops\.\w+\.(torch_impl|schedule|products|masked|sealed))"),
    "schedule": re.compile(r"calm_fast\.(core\.\w+|_ops\.\w+\.(schedule|products))"),
    "products": re.compile(r"calm_fast\.core(\.\w+)?"),  # torch's products, as this CPU has them
}


def sources() -> dict[str, Path]:
    """Dotted module name under calm_fast -> file, the mapped folders included."""
    found = {}
    for folder, prefix in (("calm_fast", ""), ("kernels", "kernels."), ("benchmarks", "benchmarks.")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = prefix + ".".join(path.relative_to(ROOT / folder).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


SOURCES = sources()
# a public name counts as the module that defines it
PUBLIC = {**calm_fast._LAZY, "__version__": "calm_fast._version"}


def floor_of(module: str) -> str:
    return module.split(".")[0]


def imported(tree: ast.Module, module: str, is_package: bool) -> Iterator[str]:
    """Absolute dotted names of everything imported, at any depth of the file, relative imports resolved."""
    parts = ["calm_fast", *module.split(".")] if module != "__init__" else ["calm_fast"]
    package = parts if is_package else parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            if stem == "calm_fast":  # `from calm_fast import ops` names a module, not an attribute
                yield from (PUBLIC.get(alias.name, f"calm_fast.{alias.name}") for alias in node.names)
            else:
                yield stem
        elif isinstance(node, ast.Call):
            yield from lazily_imported(node)


def lazily_imported(call: ast.Call) -> Iterator[str]:
    """import_module("calm_fast....") with a literal or an f-string that begins with one."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name not in ("import_module", "__import__") or not call.args:
        return
    first = call.args[0]
    if isinstance(first, ast.JoinedStr) and first.values:
        first = first.values[0]
    if isinstance(first, ast.Constant) and isinstance(first.value, str):
        yield first.value.rstrip(".")


def broken_rules(module: str, source: str, is_package: bool) -> list[str]:
    floor = floor_of(module)
    allowed = {floor, *FLOORS[floor], *LAZY_DOORS.get(floor, ())}
    if floor in USERS:
        allowed.add("")
    wrong = []
    for name in imported(ast.parse(source), module, is_package):
        top, _, rest = name.partition(".")
        if top == "calm_fast" and rest.split(".")[0] not in allowed:
            wrong.append(f"{module} imports {name}: {floor}/ may import {', '.join(FLOORS[floor]) or 'nothing'}")
    return wrong


def names_imported_by(module: str) -> list[str]:
    path = SOURCES[module]
    return list(imported(ast.parse(path.read_text()), module, path.name == "__init__.py"))


def test_every_module_stands_on_a_floor():
    assert not {floor_of(module) for module in SOURCES} - set(FLOORS), (
        "add the floor to FLOORS, with what it may import"
    )


def test_imports_point_down():
    wrong = [
        rule
        for module, path in SOURCES.items()
        for rule in broken_rules(module, path.read_text(), path.name == "__init__.py")
    ]
    assert not wrong, "\n".join(wrong)


def test_references_import_torch_and_each_other():
    outside = {"torch", "math", "fractions", "__future__", "collections", "typing", "calm_fast"}
    for module in SOURCES:
        if floor_of(module) == "reference" or module.endswith(".reference"):
            assert {name.split(".")[0] for name in names_imported_by(module)} <= outside, module


def test_implementations_do_not_know_each_other():
    checked = 0
    for module in SOURCES:
        allowed = ROOM_FILES.get(module.split(".")[-1]) if module.startswith("_ops.") else None
        if allowed:
            names = [name for name in names_imported_by(module) if name.startswith("calm_fast")]
            wrong = [name for name in names if not allowed.fullmatch(name)]
            assert not wrong, f"{module} imports {', '.join(wrong)}"
            checked += 1
    assert checked >= 12


def test_only_kernels_import_triton():
    for module in SOURCES:
        if floor_of(module) not in ("kernels", "verify", "benchmarks"):
            assert not [name for name in names_imported_by(module) if name.split(".")[0] == "triton"], module


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("reference", "from calm_fast.ops import x"),
        ("reference", "from calm_fast.core import checks"),
        ("kernels.x", "from calm_fast import ops"),
        ("_ops.x.api", "from calm_fast import CrossAttention"),
        ("kernels.x", "from .._ops.x.torch_impl import y"),
        ("_ops.x.api", "def f():\n    from calm_fast.modules import y"),
        ("modules.x", "import importlib\nimportlib.import_module('calm_fast.hf')"),
        ("modules.x", "import importlib\nimportlib.import_module(f'calm_fast.hf.{name}')"),
        ("hf.x", "from calm_fast.cli import main"),
        ("hf.x", "import calm_fast"),
        ("core.checks", "from calm_fast.modules.x import y"),
        ("__main__", "from calm_fast import hf"),
    ],
)
def test_rule_sees_an_import_that_points_up(module, source):
    assert len(broken_rules(module, source, False)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kernels.x", "from calm_fast.core.launch_config import y\nfrom calm_fast.kernels.z import w\nfrom . import v"),
        ("_ops.x.api", "from calm_fast.core import native_library\nfrom calm_fast._ops.x.reference import y"),
        ("hf.x", "import torch, transformers\nfrom .layers import y\nfrom ..modules.x import z"),
    ],
)
def test_rule_allows_an_import_that_points_down(module, source):
    assert broken_rules(module, source, False) == []
