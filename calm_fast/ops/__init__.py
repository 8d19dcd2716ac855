"""The public ops. One file per op: public function -> validate -> choose implementation -> run it."""

from calm_fast.ops.cross_attention import cross_attention
from calm_fast.ops.dual_lora import dual_lora

# every op of the package, by its stem
OPS = ("cross_attention", "dual_lora")

__all__ = ["OPS", "cross_attention", "dual_lora"]
