"""Tiny random models of every tested family, and compositions of them with non-zero random weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from calm_fast.hf import ComposedForCausalLM, compose

VOCAB = 97
PAD, EOS = 0, 96  # sampled prompts avoid both


@dataclass(frozen=True)
class Family:
    """The tiny config of a family: its own names for width, depth and heads, and its special settings."""

    model_type: str
    width: str = "hidden_size"
    depth: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    extra: dict[str, Any] = field(default_factory=dict)
    positions: bool = True  # the family separates documents packed by restarting positions
    static_chunks: bool = True  # transformers sizes its static cache right for prefill in chunks

    def model(self, seed: int = 0, width: int = 32, depth: int = 3, vocab: int = VOCAB) -> Any:
        """Return a randomly initialised causal LM in eval mode."""
        torch.manual_seed(seed)
        names = {self.width: width, self.depth: depth, "vocab_size": vocab}
        if self.heads:
            names[self.heads] = 4
        names |= {"pad_token_id": PAD, "bos_token_id": EOS, "eos_token_id": EOS}
        config = CONFIG_MAPPING[self.model_type](**(names | self.extra))
        # the default spread of 0.02 would make every model nearly constant
        config.initializer_range = 0.3
        return AutoModelForCausalLM.from_config(config).eval()


_ROPE = {"intermediate_size": 48, "max_position_embeddings": 64, "num_key_value_heads": 2}
_GPT = {"n_positions": 64, "n_inner": 48}
_ROUNDED = ("mlstm_round_up_to_multiple_of", "ffn_round_up_to_multiple_of")

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", extra=_ROPE),
        Family("mistral", extra=_ROPE | {"sliding_window": 6}),
        Family(
            "gemma3_text",
            extra=_ROPE
            | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}
            | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        ),
        Family("qwen3", extra=_ROPE | {"head_dim": 8}),
        Family("gpt2", "n_embd", "n_layer", "n_head", _GPT),
        Family("opt", extra={"ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 64}, positions=False),
        Family("gpt_neox", extra={"intermediate_size": 48, "max_position_embeddings": 64}),
        Family(
            "falcon",
            extra={"ffn_hidden_size": 48, "hidden_dropout": 0.1, "attention_dropout": 0.1},
            static_chunks=False,
        ),
        Family("bloom", "hidden_size", "n_layer", "n_head", positions=False),
        Family("mixtral", extra=_ROPE | {"num_local_experts": 3, "num_experts_per_tok": 2}),
    )
}

OTHERS = {
    family.model_type: family
    for family in (
        Family("mamba", heads="", extra={"state_size": 4, "intermediate_size": 64}),
        Family("mpt", "d_model", "n_layers", "n_heads", {"max_seq_len": 64}),
        Family("gptj", "n_embd", "n_layer", "n_head", {"rotary_dim": 4, "n_positions": 64}),
        Family(
            "qwen3_next",
            extra=_ROPE
            | {"head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
            | {"linear_value_head_dim": 8, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
            | {"shared_expert_intermediate_size": 16}
            | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        ),
        Family(
            "olmo_hybrid",
            extra=_ROPE
            | {"linear_num_value_heads": 4, "linear_num_key_heads": 4, "linear_key_head_dim": 8}
            | {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        ),
        Family("rwkv", heads="", extra={"attention_hidden_size": 32}),
        Family("recurrent_gemma", extra={"intermediate_size": 48, "lru_width": 32, "num_key_value_heads": 1}),
        Family("ctrl", "n_embd", "n_layer", "n_head", {"dff": 48}),
    )
}

# families without a transformers Cache: a composition with one reads the whole text in every step
CACHELESS = {name: OTHERS[name] for name in ("rwkv", "recurrent_gemma")} | {
    family.model_type: family
    for family in (
        Family("openai-gpt", "n_embd", "n_layer", "n_head", {"n_positions": 64}),
        Family("xlstm", heads="num_heads", extra=dict.fromkeys(_ROUNDED, 8)),
        Family("minimax", extra=_ROPE | {"head_dim": 8, "num_local_experts": 3, "block_size": 4}),
    )
}


def randomize(composed: ComposedForCausalLM, seed: int = 7) -> ComposedForCausalLM:
    """Give every composition weight a non-zero value, large enough to change which tokens win."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in composed.connections.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.ndim == 1 else noise / parameter.shape[-1] ** 0.5)
    return composed


def composed_model(name: str, connections: Any = ((-1, -1), (0, 1), (2, 2)), **kwargs: Any) -> ComposedForCausalLM:
    """Compose an anchor and an augmenter of one family (different seeds) with random weights."""
    family = FAMILIES[name]
    pairs = [tuple(pair) for pair in connections]
    return randomize(compose(family.model(0), family.model(1), pairs, **kwargs))


def prompts(batch: int = 2, length: int = 9, seed: int = 3) -> torch.Tensor:
    """Return token ids (batch, length) without padding or end tokens."""
    return torch.randint(2, EOS, (batch, length), generator=torch.Generator().manual_seed(seed))


def switch(model: ComposedForCausalLM, what: str) -> Any:
    """Return the method that switches gradient checkpointing, under the name that this transformers version prefers."""
    return getattr(model, f"activation_checkpointing_{what}", None) or getattr(model, f"gradient_checkpointing_{what}")


def left_padded(rows: torch.Tensor, pads: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same prompts with padding at the start of the first row."""
    mask = torch.ones_like(rows)
    mask[0, :pads] = 0
    return rows.masked_fill(mask == 0, PAD), mask
