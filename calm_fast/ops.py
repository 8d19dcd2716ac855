"""The public ops: their functions, their names, and `explain`. Each has its room in `calm_fast/_ops/<op>/`."""

from calm_fast._ops.cross_attention.api import cross_attention
from calm_fast._ops.dual_lora.api import dual_lora
from calm_fast._ops.linear_logprob.api import linear_logprob
from calm_fast._ops.linear_nce.api import linear_nce
from calm_fast._ops.maj_at_k.api import Curve, maj_at_k
from calm_fast._ops.vote.api import Vote, vote
from calm_fast.core.dispatch import explain

# every public op, by its stem
OPS = ("cross_attention", "dual_lora", "linear_logprob", "linear_nce", "maj_at_k", "vote")
# ops that modules call and users do not: a room like the others, no public function
INTERNAL_OPS = ("packed_linear",)

__all__ = [
    "INTERNAL_OPS",
    "OPS",
    "Curve",
    "Vote",
    "cross_attention",
    "dual_lora",
    "explain",
    "linear_logprob",
    "linear_nce",
    "maj_at_k",
    "vote",
]
