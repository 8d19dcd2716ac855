"""nn.Modules: parameters, folding of frozen-side products, and a call of an op; no kernel code."""

from calm_fast.modules.cross_attention import CrossAttention
from calm_fast.modules.dual_lora import DualLoRALinear

__all__ = ["CrossAttention", "DualLoRALinear"]
