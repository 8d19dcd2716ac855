"""Package layout. Everything declarative is in pyproject.toml; this file only says where the packages lie.

``kernels/fused`` is installed as ``calm_fast.kernels`` and ``benchmarks`` as ``calm_fast.benchmarks``.
The container ``kernels/`` has no ``__init__.py`` on purpose: Hugging Face publishes a package named
``kernels`` that transformers imports, and a regular package of that name at the repository root would
shadow it.

Seam for the compiled library: its extensions belong in ``ext_modules`` below, built from ``csrc/`` against
LibTorch's stable ABI (one cp310-abi3 wheel). Until ``csrc/`` holds sources the distribution is pure Python and needs
no compiler.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
MAPPED = {"calm_fast.kernels": "kernels/fused", "calm_fast.benchmarks": "benchmarks"}


def packages() -> list[str]:
    """Every package of the distribution, the mapped ones and their subpackages included."""
    found = find_packages(str(ROOT), include=["calm_fast", "calm_fast.*"])
    for name, folder in MAPPED.items():
        if (ROOT / folder).is_dir():
            found.append(name)
            found += [f"{name}.{sub}" for sub in find_packages(str(ROOT / folder))]
    return found


setup(
    packages=packages(),
    package_dir=MAPPED,
    package_data={
        "calm_fast": ["py.typed"],
        "calm_fast.kernels": ["**/*.json"],
        "calm_fast.benchmarks": ["*.sh", "results/**"],
    },
)
