"""Compositions in vLLM: the entry point that vLLM calls. docs/serving.md says what goes and what is refused."""

from __future__ import annotations

ARCHITECTURE = "ComposedForCausalLM"  # as config.json of a saved composition names it
MODEL = "calm_fast.vllm.model:ComposedForCausalLM"


def register() -> None:
    """Tell vLLM which class serves a saved composition. vLLM calls this in each of its processes.

    The class is named, not imported. Importing `calm_fast` has registered the config with AutoConfig by then.

    Raises ModuleNotFoundError if vLLM is not installed.
    """
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, MODEL)
