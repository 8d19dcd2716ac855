"""Versions of other packages that calm_fast was tried with, from the record beside this file.

``compatibility.json`` holds one entry per run of a test lane. ``tests/contract/lanes.py`` writes it together with
``docs/compatibility.md``. Nothing here changes what calm_fast computes: it only tells a person what was tried.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("compatibility.json")


@functools.cache
def lanes() -> tuple[dict[str, Any], ...]:
    """Return the recorded runs, oldest transformers first, or () if there is no record."""
    try:
        return tuple(json.loads(RECORD.read_text(encoding="utf-8"))["lanes"])
    except OSError:
        return ()


def tried_range(package: str) -> tuple[str, str] | None:
    """Return the (lowest, newest) version of `package` in recorded runs without failures, or None if there is none."""
    from packaging.version import Version

    found = [lane["versions"].get(package) for lane in lanes() if not lane["failed"]]
    ordered = sorted({version for version in found if version}, key=Version)
    return (ordered[0], ordered[-1]) if ordered else None


def newer_than_tried(package: str, version: str) -> str:
    """Return the newest version of `package` that was tried if `version` is newer still, else ""."""
    from packaging.version import InvalidVersion, Version

    span = tried_range(package)
    if span is None:
        return ""
    try:
        # a local label says how a package was built (torch 2.13.0+cu130), not that it is newer
        newer = Version(Version(version).public) > Version(Version(span[1]).public)
    except InvalidVersion:
        return ""
    return span[1] if newer else ""


def tried(package: str) -> str:
    """Return a sentence with the installed version of `package` and the versions calm_fast was tried with."""
    try:
        installed = f"{package} {importlib.metadata.version(package)} is installed"
    except importlib.metadata.PackageNotFoundError:
        installed = f"{package} is not installed"
    span = tried_range(package)
    known = "" if span is None else f"; calm_fast was tried with {package} {span[0]} to {span[1]}"
    return f"{installed}{known} (docs/compatibility.md says what to do about a release that breaks it)."


class IncompatibleRelease(ImportError):
    """A name that calm_fast needs is not in the installed release of another package."""


@contextlib.contextmanager
def importing(package: str) -> Iterator[None]:
    """Wrap imports from `package`: for a missing name, raise IncompatibleRelease with the versions that were tried."""
    try:
        yield
    except IncompatibleRelease:
        raise
    except ImportError as problem:
        if (problem.name or "").split(".")[0] != package:
            raise
        raise IncompatibleRelease(f"{problem.msg}. {tried(package)}", name=problem.name) from problem


def require(package: str, owner: type, *names: str) -> None:
    """Check that a class of `package` has the names that calm_fast overrides or reads.

    Raises IncompatibleRelease naming the missing ones. Without this check transformers would silently never call our
    override, and a missing attribute would silently count as its default.
    """
    missing = " and ".join(name for name in names if not hasattr(owner, name))
    if missing:
        raise IncompatibleRelease(f"{owner.__name__}: expected the name {missing}, got none. {tried(package)}")
