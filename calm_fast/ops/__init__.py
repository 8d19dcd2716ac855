"""The public ops. One file per op: public function -> validate -> choose implementation -> run it."""

from calm_fast.ops.cross_attention import cross_attention
from calm_fast.ops.dual_lora import dual_lora
from calm_fast.ops.linear_logprob import linear_logprob
from calm_fast.ops.linear_nce import linear_nce
from calm_fast.ops.maj_at_k import Curve, maj_at_k
from calm_fast.ops.vote import Vote, vote

# every op of the package, by its stem
OPS = ("cross_attention", "dual_lora", "linear_logprob", "linear_nce", "maj_at_k", "vote")

__all__ = [
    "OPS",
    "Curve",
    "Vote",
    "cross_attention",
    "dual_lora",
    "linear_logprob",
    "linear_nce",
    "maj_at_k",
    "vote",
]
