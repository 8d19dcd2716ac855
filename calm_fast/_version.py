"""The version of the package: the one place it is written (pyproject.toml reads it without importing)."""

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """What results were made with, for the files that hold them."""
    import platform

    import torch
    import transformers

    return {
        "calm_fast": __version__,
        "torch": torch.__version__,  # with its build, e.g. +cu130
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
