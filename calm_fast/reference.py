"""The definitions: each op in plain torch, any float dtype, readable in one sitting."""

from calm_fast._ops.cross_attention.reference import cross_attention_reference
from calm_fast._ops.dual_lora.reference import dual_lora_reference
from calm_fast._ops.linear_logprob.reference import linear_logprob_reference
from calm_fast._ops.linear_nce.reference import linear_nce_reference
from calm_fast._ops.maj_at_k.reference import maj_at_k_reference
from calm_fast._ops.vote.reference import vote_reference

__all__ = [
    "cross_attention_reference",
    "dual_lora_reference",
    "linear_logprob_reference",
    "linear_nce_reference",
    "maj_at_k_reference",
    "vote_reference",
]
