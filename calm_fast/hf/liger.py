"""Liger kernels for the parts of a composition, applied by Trainer's `use_liger_kernel=True`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from calm_fast.core.checks import bad_value
from calm_fast.hf.config import ComposedConfig, ComposedSeq2SeqConfig

if TYPE_CHECKING:
    from calm_fast.hf.composition import Composition

_WHERE = "use_liger_kernel"
_FUSED = "fused_linear_cross_entropy"
_TABLE = "MODEL_TYPE_TO_APPLY_LIGER_FN"  # model type -> the function that patches a model of it


def register_compositions() -> None:
    """Enter compositions in Liger's table of model types, if Liger is installed.

    For a type that is not in it Liger does nothing, and says so to nobody.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        return
    try:
        patching = importlib.import_module("liger_kernel.transformers.monkey_patch")
    except ImportError:  # use_liger_kernel=True raises the same
        return
    table: dict[str, Callable[..., None]] = getattr(patching, _TABLE)
    if ComposedConfig.model_type in table:
        return
    taken = {name for patch in table.values() for name in inspect.signature(patch).parameters} - {"model"}

    def apply_liger_kernel_to_composition(model: Composition | None = None, **settings: Any) -> None:
        apply_to_parts(model, table, settings)

    # Liger drops every setting that the signature does not name
    kinds = inspect.Parameter.KEYWORD_ONLY
    named = [inspect.Parameter(name, kinds, default=None) for name in ("model", *sorted(taken))]
    apply_liger_kernel_to_composition.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    for config in (ComposedConfig, ComposedSeq2SeqConfig):
        table[config.model_type] = apply_liger_kernel_to_composition


def apply_to_parts(model: Composition | None, table: dict[str, Callable[..., None]], settings: dict[str, Any]) -> None:
    """Patch every part of a composition whose family Liger knows; warn of the others.

    table: Liger's functions by model type. settings: `liger_kernel_config`.

    Raises ValueError without a model, if Liger knows no part, and for the fused loss: it takes the place of the
    anchor's forward, and in a part, which stays in eval mode, it builds the logits all the same.
    """
    if model is None:
        raise bad_value(_WHERE, "model", "a composition", "None: its parts are patched, and no class")
    if settings.get(_FUSED):
        got = "True. Leave it out; TRL's trainers compute the loss from the last hidden state without logits"
        raise bad_value(_WHERE, _FUSED, "False for a composition, whose parts build the logits in eval mode", got)
    parts = [model.anchor, *model.augmenters]
    known = [part for part in parts if part.config.model_type in table]
    others = sorted({type(part).__name__ for part in parts if part not in known})
    if not known:
        expected = "False for a composition without a part that Liger has kernels for"
        raise bad_value("TrainingArguments", _WHERE, expected, f"True, with {', '.join(others)}")
    if others:
        warnings.warn(f"{_WHERE}: Liger has no kernels for {', '.join(others)}, which stay as they are", stacklevel=4)
    for part in known:
        patch = table[part.config.model_type]
        takes = inspect.signature(patch).parameters
        given = {name: value for name, value in settings.items() if name in takes}
        patch(model=part, **given | ({_FUSED: False} if _FUSED in takes else {}))
