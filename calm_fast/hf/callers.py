"""Who calls: what trainers of TRL ask of a composition without saying why, told apart by the code that asks.

TRL takes a model's logits without saying where prompts end, and loads a reference model from the name in the config.
Neither call has an argument that a composition could answer to.
"""

from __future__ import annotations

import inspect
import sys
from types import FrameType

from calm_fast.core.checks import bad_value

# wrappers of a model's forward, and TRL's own
_WRAPPERS = ("torch", "accelerate", "peft", "calm_fast", "functools", "contextlib", "trl.trainer.utils", "trl.models")
_PAGE = "docs/training_libraries.md"


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def trainer_of_trl() -> str:
    """Return the module of TRL whose code calls the model, wrappers of its forward aside; "" for any other caller.

    generate calls from transformers, also where TRL has called generate.
    """
    frame = inspect.currentframe() if "trl" in sys.modules else None
    while frame is not None:
        name = _module(frame)
        if not any(_inside(name, package) for package in _WRAPPERS):
            return name if _inside(name, "trl") else ""
        frame = frame.f_back
    return ""


def check_prompt_is_told(where: str) -> None:
    """Raise ValueError if a trainer of TRL calls forward of a composition that aligns texts. where: its class.

    For a call that says neither `prompt_length` nor `augmenter_input_ids`.
    """
    if trainer := trainer_of_trl():
        expected = (
            "given, or `augmenter_input_ids`, where augmenters have another tokenizer, because generation reads a text "
            "otherwise before the end of its prompt"
        )
        got = f"None from {trainer}, which does not say where prompts end. SFT and GRPO can ({_PAGE}, Two tokenizers)"
        raise bad_value(where, "prompt_length", expected, got)


def check_reference_has_folder() -> None:
    """Raise ValueError if a trainer of TRL asks for the folder of its reference model. For a model that has none."""
    frame = inspect.currentframe() if "trl" in sys.modules else None
    while frame is not None and _module(frame).startswith(("calm_fast.", "transformers.")):
        frame = frame.f_back
    if frame is None or not _inside(_module(frame), "trl") or frame.f_code.co_name != "get_config_model_id":
        return
    asking = frame.f_back
    known = {} if asking is None or asking.f_code.co_name != "__init__" else asking.f_locals
    # before Trainer's own __init__ has run, TRL asks for the name of the run and of the tokenizer
    if not hasattr(known.get("self"), "accelerator"):
        return
    trainer = type(known["self"]).__name__
    if "ref_model" in known:
        expected = f"given, because {trainer} would load it from the composition's folder"
        got = (
            "None, and the composition was not loaded from a folder. Pass ref_model=calm_fast.hf.frozen_copy(model), "
            f"or set precompute_ref_log_probs=True ({_PAGE})"
        )
        raise bad_value(trainer, "ref_model", expected, got)
    expected = f"loaded by from_pretrained, because {trainer} loads its reference from the same folder"
    got = f"a composition without a folder. Save it and load it first, or set beta=0 in GRPO and RLOO ({_PAGE})"
    raise bad_value(trainer, "model", expected, got)
