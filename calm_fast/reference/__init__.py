"""The definitions: each op in plain torch, any float dtype, readable in one sitting."""

from calm_fast.reference.cross_attention import cross_attention_reference

__all__ = ["cross_attention_reference"]
