"""Names of parameters and modules without the wrappers of torch.compile, DDP, FSDP and PEFT."""

from __future__ import annotations

# what torch.compile, FSDP 1 and activation checkpointing add to a path
SEGMENTS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))


def bare_name(name: str) -> str:
    """Return a dotted name without wrappers, at the front or inside.

    They are DDP's ``module``, torch.compile's ``_orig_mod``, those of FSDP and of activation checkpointing, and PEFT's
    ``base_model.model``.
    """
    parts = [part for part in name.split(".") if part not in SEGMENTS and part != "module"]
    kept: list[str] = []
    for part in parts:
        if part == "model" and kept[-1:] == ["base_model"]:
            kept.pop()
        else:
            kept.append(part)
    return ".".join(kept)
