"""Tiny configs of every causal language model, encoder-decoder and encoder of the installed transformers.

`tiny_model` shrinks a class's default config by the names of its settings; what a family needs besides is in OVERRIDES,
which is data. A new class of transformers shows up by itself.

A family is named by its model type, with "seq2seq/" before an encoder-decoder and "encoder/" before an encoder, because
BART and BERT have classes of two kinds.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

VOCAB, LAYERS, WIDTH = 99, 3, 32

_WIDTHS = (
    "hidden_size",
    "hidden_size_global",
    "d_model",
    "n_embd",
    "dim",
    "emb_dim",
    "word_embed_proj_dim",
    "embedding_size",
    "lru_width",
)
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_blocks")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads")
_INNER = (
    "intermediate_size", "ffn_dim", "d_ff", "n_inner", "dff", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim",
    "dim_ff", "feed_forward_size", "block_ff_dim", "mlp_hidden_size", "intermediate_size_mlp",
)  # fmt: skip
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_target_positions", "seq_length")
# name of a setting -> its small value
SMALL: dict[str, Any] = (
    {"vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB, "decoder_vocab_size": VOCAB}
    | dict.fromkeys(_WIDTHS, WIDTH)
    | dict.fromkeys(_DEPTHS, LAYERS)
    | dict.fromkeys(_HEADS, 4)
    | dict.fromkeys(_INNER, 48)
    | dict.fromkeys(_LENGTHS, 64)
    | {"num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "attention_hidden_size": WIDTH, "global_head_dim": 8}
    | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "expert_ffn_hidden_size": 16}
    | {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4}
    | {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_topk": 2, "first_k_dense_replace": 1}
    | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    | {"sliding_window": 6, "attention_window": 6, "attention_window_size": 6, "query_pre_attn_scalar": 8}
    | {"state_size": 4, "mamba_d_state": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "n_groups": 1}
    | {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    | {"hidden_size_per_layer_input": 8, "rotary_dim": 4, "index_topk": 64, "index_n_heads": 2, "index_head_dim": 16}
    | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    | {"dropout": 0.0, "tie_word_embeddings": False, "is_decoder": True, "unpadded_vocab_size": VOCAB}
)

# index_topk is longer than every text: past it, the plain DeepSeek V3.2 gave other tokens with a cache than without one
# in 15 of 30 texts (24 with a static cache), because rounding decides between tokens of nearly equal scores
# what a family needs besides, by model type; None removes a setting of SMALL
OVERRIDES: dict[str, dict[str, Any]] = {
    "bart": {"decoder_start_token_id": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2, "state_size": 4, "n_groups": 1},
    "mamba": {"intermediate_size": 64},
    "falcon_h1": {"mamba_d_ssm": 64},
    "zaya": {"num_experts_per_tok": 1},
    "falcon_mamba": {"intermediate_size": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]], "num_layers": 3, "num_heads": 4},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "xlm": {"causal": True},
    "recurrent_gemma": {"num_key_value_heads": 1},
    "mllama_text_model": {"cross_attention_layers": [2]},
    # hybrids, of which the first few layers are of one kind
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "zamba": {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 16},
    "zamba2": {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 16},
    "reformer": {
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh", "local"],
        "num_buckets": 2,
        "attention_head_size": 8,
    },
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "qwen4_exp": {
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 2,
    },
    "seq2seq/switch_transformers": {
        "num_decoder_layers": LAYERS,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    },
    "encoder/esm": {"vocab_size": VOCAB, "pad_token_id": 0, "mask_token_id": 3},
    "encoder/esmc": {"num_key_value_heads": 4},
    # settings whose default is None
    "hunyuan_v1_dense": {"head_dim": 8},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


# what families of a kind need besides
KINDS: dict[str, dict[str, Any]] = {
    "causal": {},
    "seq2seq": {
        "is_decoder": False,
        "decoder_start_token_id": 0,
        "forced_eos_token_id": None,
        "forced_bos_token_id": None,
    },
    "encoder": {"is_decoder": False},
}


def kind_of(family: str) -> tuple[str, str]:
    """Return (kind, model type) of a family: its kind is "causal", "seq2seq" or "encoder"."""
    kind, slash, model_type = family.partition("/")
    return (kind, model_type) if slash else ("causal", family)


def classes() -> dict[str, str]:
    """Return the class name of every causal language model by family."""
    return _once(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@functools.cache
def families() -> dict[str, str]:
    """Return the class name of every family: causal language models, encoder-decoders, encoders."""
    found = classes()
    # the mapping also has models that listen, which are decoders, and pairs of any two models
    for model_type, name in _once(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES).items():
        if model_type != "encoder-decoder" and CONFIG_MAPPING[model_type]().is_encoder_decoder:
            found[f"seq2seq/{model_type}"] = name
    types = dict.fromkeys([*MODEL_FOR_MASKED_LM_MAPPING_NAMES, *MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES])
    names = {model_type: MODEL_MAPPING_NAMES[model_type] for model_type in types if model_type in MODEL_MAPPING_NAMES}
    whole = {key: name if isinstance(name, str) else name[0] for key, name in names.items()}  # Funnel has two
    for model_type, name in _once(whole).items():
        # those that only exist as decoders are no encoders
        decodes = (
            model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        )
        if not decodes and not CONFIG_MAPPING[model_type]().is_encoder_decoder:
            found[f"encoder/{model_type}"] = name
    return found


def _once(mapping: Mapping[str, str]) -> dict[str, str]:
    """Return the entries of a mapping from model types to class names, each class once."""
    types: dict[str, str] = {}
    known = set(dir(transformers))  # the mapping also has classes that others register, as calm_fast does
    for model_type, name in mapping.items():
        if name not in known:
            continue
        # of several types with one class, the one that the class is named after
        if name not in types or name.lower().startswith(re.sub("[-_]", "", model_type)):
            types[name] = model_type
    return {model_type: name for name, model_type in types.items()}


def _short(value: list[Any]) -> list[Any]:
    """Return LAYERS entries of a list with one entry per layer, with as many kinds of them as there are."""
    kinds = list(dict.fromkeys(map(str, value)))
    picked = [next(v for v in value if str(v) == kind) for kind in kinds][:LAYERS]
    return sorted((picked * LAYERS)[:LAYERS], key=lambda v: kinds.index(str(v)))


def tiny_config(family: str) -> PreTrainedConfig:
    """Return the shrunk config of a family."""
    kind, model_type = kind_of(family)
    own = OVERRIDES.get(family, {} if kind == "causal" else OVERRIDES.get(model_type, {}))
    # of a model with several parts, the class of the text's config
    config_class = getattr(transformers, families()[family]).config_class
    return _shrunk(config_class, KINDS[kind] | own)


def _shrunk(kind: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    default = kind()
    names = {*vars(default), *kind.attribute_map}
    settings = {name: value for name, value in SMALL.items() if name in names and _is_set(default, name)}
    depth = getattr(default, "num_hidden_layers", None)  # settings of one entry per layer are shortened to it
    for name, value in vars(default).items():
        if isinstance(value, list) and len(value) == depth and name not in settings:
            settings[name] = _short(value)
        elif name in kind.sub_configs and isinstance(value, PreTrainedConfig):
            settings[name] = _shrunk(type(value), {}).to_dict()
    if "kv_lora_rank" in settings:  # latent attention: a key per query head
        settings["num_key_value_heads"] = settings.get("num_attention_heads")
        settings.pop("head_dim", None)
    settings |= overrides
    return kind(**{name: value for name, value in settings.items() if value is not None})


def _is_set(default: PreTrainedConfig, name: str) -> bool:
    """Return True if a setting means something: a family that leaves it at None has another name for it."""
    try:
        value = getattr(default, name, None)
    except RuntimeError:  # one that may vary across layers (Gemma 4)
        return True
    return value is not None and (not isinstance(value, (list, dict)) or name in ("num_attention_heads",))


def tiny_model(family: str, seed: int = 0) -> Any:
    """Return a tiny random model of a family, in eval mode."""
    config = tiny_config(family)
    for part in (config, config.get_text_config(decoder=True)):
        for name in ("initializer_range", "init_std"):
            if hasattr(part, name):  # the default spread would make every model nearly constant
                setattr(part, name, 0.3)
    torch.manual_seed(seed)
    model = getattr(transformers, families()[family])(config).eval()
    if model.can_generate():  # generation chooses every token by its logits alone
        model.generation_config.update(forced_eos_token_id=None, forced_bos_token_id=None)
    return model
