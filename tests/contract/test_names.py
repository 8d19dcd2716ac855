"""Every name of transformers that calm_fast imports, overrides or calls exists with the expected signature."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer

import calm_fast
from calm_fast.hf import ComposedCache, ComposedConfig, ComposedForCausalLM, ComposedForSeq2SeqLM, ComposedSeq2SeqConfig
from calm_fast.hf.cache_names import NAMES, generate_argument
from calm_fast.hf.seq2seq_cache import ComposedSeq2SeqCache

ROOT = Path(calm_fast.__file__).parents[1]
FOLDERS = ("calm_fast", "benchmarks", "examples")
OTHERS = ("transformers", "peft", "accelerate", "safetensors", "math_verify", "typer", "rich", "tqdm")


def imports() -> Iterator[tuple[str, str, str]]:
    """Yield (file, module, name) of every import from another package, including those inside functions.

    Not of calm_fast/serving: transformers' server needs the extra `serve` and a new release; tests/integration has it.
    """
    for file in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        if ROOT / "calm_fast" / "serving" in file.parents:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] in OTHERS:
                for alias in node.names:
                    yield file.relative_to(ROOT).as_posix(), node.module, alias.name


def test_every_imported_name_exists() -> None:
    found = list(imports())
    assert len(found) > 40
    missing = [where for where in found if not hasattr(importlib.import_module(where[1]), where[2])]
    assert not missing


def parameters(owner: Any, method: str) -> list[str]:
    return [name for name in inspect.signature(getattr(owner, method)).parameters if name != "self"]


# method that a class of ours overrides -> the parameters, in order, that the other package passes
OVERRIDDEN = {
    (GenerationConfig, "update"): ["defaults_only", "allow_custom_entries"],
    (GenerationMixin, "_prepare_cache_for_generation"): ["generation_config", "model_kwargs"],
    (GenerationMixin, "_validate_model_kwargs"): ["model_kwargs"],
    (GenerationMixin, "_get_logits_processor"): ["generation_config"],
    (GenerationMixin, "_expand_inputs_for_generation"): ["expand_size", "is_encoder_decoder", "input_ids"],
    (GenerationMixin, "init_continuous_batching"): [],
    (GenerationMixin, "generate"): ["inputs", "generation_config"],
    (GenerationMixin, "prepare_inputs_for_generation"): ["input_ids"],
    (PreTrainedModel, "_set_gradient_checkpointing"): ["enable", "gradient_checkpointing_func"],
    (PreTrainedModel, "enable_input_require_grads"): [],
    (PreTrainedModel, "disable_input_require_grads"): [],
    (PreTrainedModel, "get_input_embeddings"): [],
    (PreTrainedModel, "get_output_embeddings"): [],
    (PreTrainedModel, "get_decoder"): [],
    (PreTrainedModel, "get_encoder"): ["modality"],
    (PreTrainedModel, "resize_token_embeddings"): ["new_num_tokens"],
    (PreTrainedModel, "init_weights"): [],
    (PreTrainedModel, "initialize_weights"): [],
    (PreTrainedModel, "tie_weights"): [],
    (PreTrainedModel, "save_pretrained"): ["save_directory", "is_main_process", "state_dict", "push_to_hub"],
    (PreTrainedModel, "push_to_hub"): ["repo_id"],
    (PreTrainedModel, "from_pretrained"): ["pretrained_model_name_or_path"],
    (PreTrainedConfig, "get_text_config"): ["decoder", "encoder"],
    (PreTrainedConfig, "to_dict"): [],
    (PreTrainedConfig, "from_dict"): ["config_dict"],
    (Cache, "update"): [],
    (Cache, "crop"): [],
    (Cache, "reset"): [],
    (Cache, "get_seq_length"): ["layer_idx"],
    (Cache, "get_mask_sizes"): ["query_length", "layer_idx"],
    (Cache, "get_max_length"): ["layer_idx"],
    (EncoderDecoderCache, "reset"): [],
    (EncoderDecoderCache, "reorder_cache"): ["beam_idx"],
    (EncoderDecoderCache, "batch_repeat_interleave"): ["repeats"],
    (EncoderDecoderCache, "batch_select_indices"): ["indices"],
    (Trainer, "_save"): ["output_dir", "state_dict"],
    (Trainer, "_load_from_checkpoint"): ["resume_from_checkpoint", "model"],
    (Trainer, "compute_loss"): ["model", "inputs", "return_outputs", "num_items_in_batch"],
}
# methods that calm_fast calls
CALLED = {
    (Cache, "batch_select_indices"): ["indices"],
    (Cache, "reorder_cache"): ["beam_idx"],
    (CacheLayerMixin, "get_seq_length"): [],
    (DynamicLayer, "update"): ["key_states", "value_states"],
    (GenerationMixin, "_supports_default_dynamic_cache"): [],
    (GenerationMixin, "prepare_inputs_for_generation"): ["input_ids"],
    (PreTrainedModel, "is_remote_code"): [],
    (PreTrainedModel, "can_generate"): [],
}


@pytest.mark.parametrize(("owner", "method"), [*OVERRIDDEN, *CALLED], ids=lambda v: getattr(v, "__name__", v))
def test_method_has_the_parameters_relied_upon(owner: type, method: str) -> None:
    wanted = (OVERRIDDEN | CALLED)[owner, method]
    assert parameters(owner, method)[: len(wanted)] == wanted, transformers.__version__


OURS = [ComposedForCausalLM, ComposedConfig, ComposedCache]
OURS += [ComposedForSeq2SeqLM, ComposedSeq2SeqConfig, ComposedSeq2SeqCache]


@pytest.mark.parametrize("ours", OURS)
def test_every_override_of_ours_is_listed(ours: type) -> None:
    """A method that overrides one of transformers must be in OVERRIDDEN: a release could silently stop calling it."""
    others = [base for base in ours.__mro__[1:] if base.__module__.startswith("transformers")]
    own = {name for base in ours.__mro__ if base.__module__.startswith("calm_fast") for name in vars(base)}
    listed = {name for _, name in OVERRIDDEN}
    data = {"config_class", "base_model", "base_model_prefix", "main_input_name", "model_type", "sub_configs",
            "is_compileable", "has_no_defaults_at_init", "keys_to_ignore_at_inference", "layers"}  # fmt: skip
    data |= {"supports_gradient_checkpointing", "accepts_loss_kwargs", "_supports_sdpa", "_supports_flash_attn",
             "_supports_flex_attn", "_supports_attention_backend"}  # fmt: skip
    overridden = {name for name in own if any(name in vars(base) for base in others) and not name.startswith("__")}
    assert overridden - {"forward", "train", "attribute_map", "_auto_class"} - data <= listed


def test_attributes_read_from_other_packages_exist() -> None:
    assert isinstance(GradientCheckpointingLayer.gradient_checkpointing, bool)
    assert hasattr(DynamicCache(), "layers") and hasattr(Cache, "is_compileable")
    assert "disable_tqdm" in inspect.signature(TrainingArguments).parameters
    assert generate_argument() in NAMES
    layer = DynamicLayer()
    assert layer.get_seq_length() == 0 and {"keys", "values"} <= {*vars(layer), *dir(layer)}
