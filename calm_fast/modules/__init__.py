"""nn.Modules: parameters, folding of frozen-side products, and a call of an op; no kernel code."""

from calm_fast.modules.cross_attention import CrossAttention

__all__ = ["CrossAttention"]
