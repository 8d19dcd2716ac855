"""Configs of a composition's parts: the same weights under another config are another model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from transformers import PreTrainedConfig

Config = TypeVar("Config", bound=PreTrainedConfig)

# fields that do not change the logits of given tokens: where a model comes from, how it is run, what it returns, how it
# is initialised and trained
_WITHOUT_EFFECT = frozenset(
    "architectures attn_implementation auto_map bos_token_id chunk_size_feed_forward decoder_start_token_id "
    "distributed_config dtype eos_token_id experts_implementation gradient_checkpointing id2label initializer_range "
    "is_encoder_decoder label2id name_or_path output_attentions output_hidden_states output_router_logits pad_token_id "
    "problem_type quantization_config return_dict router_aux_loss_coef tokenizer_class torch_dtype "
    "transformers_version use_cache".split()
)
_DROPOUT = ("dropout", "pdrop", "layerdrop")


def _number(found: dict[str, Any]) -> Any:
    return float(found["__float__"]) if set(found) == {"__float__"} else found


def from_json(kind: type[Config], text: str) -> Config:
    """Return the config of class `kind` that `to_json_string` wrote as `text`.

    JSON has no infinity and no NaN: transformers writes such a number as {"__float__": "Infinity"}, here too within a
    part's config (the time step limits of Mamba 2).
    """
    found: Config = kind.from_dict(json.loads(text, object_hook=_number))
    return found


def _fields(content: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _fields(value) if isinstance(value, dict) else value
        for name, value in content.items()
        if name not in _WITHOUT_EFFECT and not name.startswith("_") and not name.endswith(_DROPOUT)
    }


def _as_saved(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of a config as they come back from its JSON, because not every config comes back as it was."""
    own = from_json(type(config), config.to_json_string(use_diff=False))
    return _fields(json.loads(own.to_json_string(use_diff=False)))


def _differences(first: dict[str, Any], second: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(first.keys() | second.keys()):
        one, other = first.get(name), second.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _differences(one, other, f"{path}{name}.")
        elif one != other:
            yield f"{path}{name}", one, other


def configs_differ(own: PreTrainedConfig, other: PreTrainedConfig, given: Iterable[str] = ()) -> str:
    """Say in which fields that matter to the logits `own` differs from `other`, or return "".

    given: names of fields that the caller asked to be different.
    """
    left_out = set(given)
    found = [
        f"{name} {mine!r} instead of {theirs!r}"
        for name, mine, theirs in _differences(_as_saved(own), _as_saved(other))
        if name.partition(".")[0] not in left_out
    ]
    return (
        f"a config with {', '.join(found[:3])}" + (f" and {len(found) - 3} more" if found[3:] else "") if found else ""
    )
