"""What decides the states of augmenters: the key of a cache, and what differs between two."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from calm_fast.core.checks import bad_type, bad_value
from calm_fast.core.fingerprint import json_checksum
from calm_fast.core.wrapped_names import bare_name
from calm_fast.hf.alignment import StreamAligner
from calm_fast.hf.alignment.collator import AlignedCollator
from calm_fast.hf.cached_states.texts import ANCHOR, OWN, PROMPT
from calm_fast.hf.composed import ComposedForCausalLM
from calm_fast.hf.given_states import connected_layers
from calm_fast.hf.layers import hidden_size
from calm_fast.hf.part_configs import configs_differ, from_json
from calm_fast.hf.references import adapter_in, holds_shards
from calm_fast.hf.vocabularies import loaded_tokenizer
from calm_fast.hf.wrappers import inner_model

FORMAT = 2  # 2: checksums of the states
_SHOWN = 60  # characters of a value in an error


def composition_of(model: Any, where: str) -> ComposedForCausalLM:
    """Return the composition inside `model`, after checking that the states of its augmenters can be kept.

    Raises ValueError for another model, and for an augmenter whose states may change from one step to the next: one
    that trains, has dropout switched on or holds adapters; for one that is sharded or offloaded, whose weights cannot
    be compared; for one that reads the text anew at every token.
    """
    composed = inner_model(model) if isinstance(model, nn.Module) else model
    if not isinstance(composed, ComposedForCausalLM):
        raise bad_type(where, "model", "a ComposedForCausalLM", composed)
    for index, encoder in enumerate(composed.encoders):
        part = composed._augmenter(index)
        trained = next((name for name, p in part.named_parameters() if p.requires_grad), "")
        noisy = next((name or "the model" for name, module in part.named_modules() if module.training), "")
        problem = ""
        if trained:
            problem = f"{trained} requires a gradient. Call requires_grad_(False), or train without a cache"
        elif noisy:
            problem = f"{noisy} is in training mode, where dropout may act. Call eval() of the composition"
        elif adapter := adapter_in(part):
            problem = f"it has an adapter ({adapter}). Merge it first"
        elif holds_shards(part):
            problem = "this process holds a shard of it. Cache the states before sharding, or in one process"
        elif any(t.is_meta for t in part.state_dict().values()):
            problem = "some of its weights are not loaded (meta device). Load it whole"
        elif encoder is not None and encoder.mode != "prompt":
            problem = "it reads the text anew at every token of the answer. Compose it with bidirectional='prompt'"
        if problem:
            raise bad_value(where, "model", f"one whose augmenter {index} is frozen and read once per text", problem)
    return composed


def weight_checksum(model: nn.Module) -> str:
    """Return a SHA-256 of every value, name, shape and dtype that `model` keeps in its state_dict."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{bare_name(name)} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for plain in _plain(tensor):
            total.update(plain.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _plain(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the plain tensors that a tensor subclass (a quantised one) wraps, or the tensor itself."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    return [plain for name in flatten()[0] for plain in _plain(getattr(tensor, name))]


def state_key(composed: ComposedForCausalLM, collator: Any, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the key of the states that `composed` reads in batches of `collator`, as JSON values.

    settings: what else decides the ids of a row, such as the max_length of an earlier tokenisation.
    """
    tokenizers = [loaded_tokenizer(one) for one in composed.tokenizers]
    if tokenizers[0] is None:
        tokenizers[0] = getattr(collator, "tokenizer", None)
    parts = []
    for index, encoder in enumerate(composed.encoders):
        part, aligner = composed._augmenter(index), composed.aligners[index]
        reading = PROMPT if encoder is not None else ANCHOR if aligner is None else OWN
        own = aligner.augmenter_tokenizer if isinstance(aligner, StreamAligner) else tokenizers[index + 1]
        parts.append({
            "class": type(part).__name__,
            "config": json.loads(part.config.to_json_string(use_diff=False)),
            "layers": connected_layers(composed, index),
            "width": hidden_size(part),
            "dtype": str(part.dtype).removeprefix("torch."),
            "weights": weight_checksum(part),
            "reads": reading,
            "tokenizer": _tokenizer_checksum(own),
            "alignment": aligner.settings() if isinstance(aligner, StreamAligner) else None,
        })  # fmt: skip
    found: dict[str, Any] = {"format": FORMAT, "tokenizer": _tokenizer_checksum(tokenizers[0]), "augmenters": parts}
    found |= {"collator": _collator_settings(collator), "settings": dict(settings or {})}
    return dict(json.loads(json.dumps(found)))


def _tokenizer_checksum(tokenizer: Any) -> str | None:
    return None if tokenizer is None else json_checksum(sorted(tokenizer.get_vocab().items()))


def _collator_settings(collator: Any) -> dict[str, Any]:
    """Return what makes ids of a row in an AlignedCollator; other collators are known by their ids alone."""
    if not isinstance(collator, AlignedCollator):
        return {}
    return {
        "max_length": collator.max_length,
        "add_eos": collator.add_eos,
        "chat_template": getattr(collator.tokenizer, "chat_template", None),
        "chat_template_kwargs": collator.template_variables,
    }


def key_differences(kept: Mapping[str, Any], own: Mapping[str, Any], composed: ComposedForCausalLM) -> list[str]:
    """Say what differs between the key of a cache and `own`, that of `composed`, each as "name a, not b".

    Tokenizers that one side does not know are not compared.
    """
    found = []
    for name in ("format", "tokenizer"):
        found += _compare(name, kept.get(name), own.get(name), known=name == "tokenizer")
    if len(kept["augmenters"]) != len(own["augmenters"]):
        return [*found, f"augmenters {len(own['augmenters'])}, not {len(kept['augmenters'])}"]
    for index, (old, new) in enumerate(zip(kept["augmenters"], own["augmenters"], strict=True)):
        differ = [
            phrase
            for name in ("class", "layers", "width", "dtype", "reads", "alignment", "tokenizer")
            for phrase in _compare(f"{name} of augmenter {index}", old[name], new[name], known=name == "tokenizer")
        ]
        if not differ:  # other layers or another class have other weights too
            config = composed._augmenter(index).config
            if text := configs_differ(config, from_json(type(config), json.dumps(old["config"]))):
                differ.append(f"augmenter {index} with {text}")
            differ += _compare(f"weights of augmenter {index}", old["weights"], new["weights"])
        found += differ
    for kind in ("collator", "settings"):
        for name in sorted(kept[kind].keys() | own[kind].keys()):
            found += _compare(f"{name} of the rows", kept[kind].get(name), own[kind].get(name))
    return found


def collator_differences(kept: Mapping[str, Any], collator: Any) -> list[str]:
    """Say in which settings `collator` makes other rows than those of a cache, whose key says `kept` of them."""
    return [phrase for name, own in _collator_settings(collator).items() if name in kept
            for phrase in _compare(f"{name} of the rows", kept[name], own)]  # fmt: skip


def _compare(name: str, kept: Any, own: Any, known: bool = False) -> list[str]:
    if kept == own or (known and None in (kept, own)):
        return []
    old, new = (text if len(text := json.dumps(value)) <= _SHOWN else text[:_SHOWN] + "..." for value in (kept, own))
    return [f"{name} {new}, not {old}"]
