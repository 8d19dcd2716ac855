"""The public ops. One file per op: public function -> validate -> choose implementation -> run it."""

from calm_fast._ops.cross_attention.api import cross_attention
from calm_fast._ops.dual_lora.api import dual_lora
from calm_fast._ops.linear_logprob.api import linear_logprob
from calm_fast._ops.linear_nce.api import linear_nce
from calm_fast._ops.maj_at_k.api import Curve, maj_at_k
from calm_fast._ops.vote.api import Vote, vote

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
