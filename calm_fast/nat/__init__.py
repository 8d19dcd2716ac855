"""Learning from wrong rationales in three stages: negative LoRA, NAT and NCE (arXiv 2312.12832)."""

from calm_fast.core.compatibility import importing

with importing("transformers"):
    from calm_fast.nat.data import Example, RationaleDataset, read_rows, split_rationales
    from calm_fast.nat.pipeline import run
    from calm_fast.nat.stages import Settings, distil_nce, plain_lora, train_nat, train_negative

__all__ = [
    "Example",
    "RationaleDataset",
    "Settings",
    "distil_nce",
    "plain_lora",
    "read_rows",
    "run",
    "split_rationales",
    "train_nat",
    "train_negative",
]
