"""The version of the package, written here only. pyproject.toml reads it without importing this module."""

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Return the versions that files of results record."""
    import platform

    import torch
    import transformers

    return {
        "calm_fast": __version__,
        "torch": torch.__version__,  # with its build, e.g. +cu130
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
