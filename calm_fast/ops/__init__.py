"""The public ops. One file per op: public function -> validate -> choose implementation -> run it."""

from calm_fast.ops.cross_attention import cross_attention
from calm_fast.ops.dual_lora import dual_lora
from calm_fast.ops.linear_logprob import linear_logprob
from calm_fast.ops.linear_nce import linear_nce

# every op of the package, by its stem
OPS = ("cross_attention", "dual_lora", "linear_logprob", "linear_nce")

__all__ = ["OPS", "cross_attention", "dual_lora", "linear_logprob", "linear_nce"]
