"""plan(): memory, FLOPs, time and traffic of training a composition, from the configs of its parts."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from calm_fast._version import versions
from calm_fast.core.checks import bad_value, check_bool, describe
from calm_fast.hf import ComposedForCausalLM, compose
from calm_fast.hf.encoders import encoder_from_config
from calm_fast.hf.given_states import connected_layers
from calm_fast.hf.layers import hidden_size
from calm_fast.hf.positions import most_positions
from calm_fast.hf.references import load_errors_named
from calm_fast.planning.gpus import EFFICIENCY, GPUS, LAUNCH, MEMORY_EFFICIENCY, NETWORK, PER_NODE, Gpu
from calm_fast.planning.trace import Trace, trace_step

WHERE = "plan"
DTYPES = ("bfloat16", "float16", "float32")
_MOMENTS = 8  # bytes of AdamW's two moments of a float32 parameter
Config = str | os.PathLike[str] | PreTrainedConfig


def plan(
    anchor: Config,
    augmenters: Sequence[Config],
    *,
    tokens: int,
    gpus: int = 1,
    connections: Any = "uniform:4",
    num_heads: int | None = None,
    head_dim: int | None = None,
    bidirectional: Any = None,
    batch_size: int = 8,
    length: int = 512,
    dtype: str = "bfloat16",
    gpu: str = "h200",
    checkpointing: bool = False,
    fsdp: bool = False,
) -> dict[str, Any]:
    """Return what training the connections over `tokens` tokens will cost.

    The composition is built on the meta device and one training step is run there, so FLOPs and the bytes that autograd
    keeps are those of torch's own graph. Attention counts as a fused kernel that keeps no scores, all pairs of tokens
    included. Every augmenter is taken to read as many tokens as the anchor, a bidirectional one half of them as the
    prompt. AdamW keeps two float32 moments. No weight is read.

    Args:
        anchor, augmenters: configs, folders or hub names with a config.json. connections, num_heads, head_dim,
            bidirectional: see `compose`.
        tokens: of the training, padding included. gpus: processes with one GPU each.
        batch_size, length: rows of a step and GPU, tokens of a row. dtype: of the frozen parts; connections are
            float32.
        gpu: "h200", "h100" or "a100"; its datasheet gives the model's time.
        checkpointing: recompute the anchor's layers in the backward pass. fsdp: shard all weights over the GPUs.
    Returns:
        a dict of JSON values: parts, parameters, memory (bytes per GPU), flops (of a step, all GPUs), time (seconds; a
        model's, from the datasheet), interconnect (bytes per GPU and step), caches (bytes per token).
    Raises:
        ValueError naming the argument; for a family whose step cannot be traced without values.
    """
    _check(tokens=tokens, gpus=gpus, batch_size=batch_size, length=length)
    for name, flag in (("checkpointing", checkpointing), ("fsdp", fsdp)):
        check_bool(WHERE, name, flag)
    if dtype not in DTYPES:
        raise bad_value(WHERE, "dtype", f"one of {', '.join(DTYPES)}", repr(dtype))
    if gpu not in GPUS:
        raise bad_value(WHERE, "gpu", f"one of {', '.join(GPUS)}", repr(gpu))
    options = {"connections": connections, "num_heads": num_heads, "head_dim": head_dim}
    model, parts = meta_composition(anchor, augmenters, dtype, bidirectional, **options)
    positions = most_positions(model)
    if positions is not None and length > positions:
        got = f"{length}. Plan shorter rows, or raise max_position_embeddings in the config if the model takes more"
        raise bad_value(WHERE, "length", f"at most {positions}, the positions of the part that has the fewest", got)
    run = trace_training(model, batch_size, length, checkpointing, False)
    cached = trace_training(model, batch_size, length, checkpointing, True)
    trained = sum(p.numel() for p in model.connections.parameters())
    steps = -(-tokens // (gpus * batch_size * length))
    board = GPUS[gpu]
    memory = {name: _memory(model, trace, trained, gpus if fsdp else 1) for name, trace in
              (("augmenters_run", run), ("states_cached", cached))}  # fmt: skip
    moved = {name: _traffic(model, trained, gpus, fsdp, name == "augmenters_run") for name in memory}
    time = {name: _time(board, trace, steps, moved[name], gpus, fsdp) for name, trace in
            (("augmenters_run", run), ("states_cached", cached))}  # fmt: skip
    flops = {"step": run.flops * gpus, "step_with_cached_states": cached.flops * gpus,
             "augmenters": (run.flops - cached.flops) * gpus}  # fmt: skip
    return {
        "parts": parts,
        "connections": [list(pair) for pair in model.pairs],
        "parameters": {"trained": trained, "frozen": sum(part["parameters"] for part in parts)},
        "setting": {
            "tokens": tokens, "gpus": gpus, "batch_size": batch_size, "length": length, "dtype": dtype, "gpu": gpu,
            "checkpointing": checkpointing, "fsdp": fsdp, "steps": steps,
        },
        "memory": memory | {"gpu": int(board.memory)},
        "flops": flops | {"augmenters_share": flops["augmenters"] / flops["step"],
                          "all_tokens": run.flops * gpus * steps},
        "time": {
            "kind": "a model's: op by op the longer of arithmetic and memory traffic, from the datasheet",
            "assumed": {"product_efficiency": EFFICIENCY, "memory_efficiency": MEMORY_EFFICIENCY, "launch_s": LAUNCH,
                        "gpus_per_node": PER_NODE, "network_bytes_per_s": NETWORK},
            **time,
        },
        "interconnect": moved,
        "caches": cache_bytes(model, batch_size, length),
        "versions": versions(),
    }  # fmt: skip


def _check(**numbers: Any) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise bad_value(WHERE, name, "a positive integer", describe(value))
    if numbers["length"] < 2:
        raise bad_value(WHERE, "length", "at least 2, because nothing predicts the first token", "1")


def _config(name: str, given: Config) -> PreTrainedConfig:
    expected = "a config, or a folder or hub name with a config.json, of a language model"
    if isinstance(given, PreTrainedConfig):
        config: PreTrainedConfig = copy.deepcopy(given)  # models keep their config, and change it
    else:
        path = os.fspath(given)
        # transformers takes a config.json too
        with load_errors_named(WHERE, name, path, expected), _named(name, expected, path):
            config = AutoConfig.from_pretrained(path)
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else type(quantised).__name__
        got = f"one that is quantised ({method}), whose products are not planned. Remove its quantization_config"
        raise bad_value(WHERE, name, "a config whose weights are in `dtype`", got)
    return config


@contextmanager
def _named(name: str, expected: str, given: str) -> Iterator[None]:
    """Turn transformers' errors about a config into one that names the argument."""
    try:
        yield
    except (ValueError, TypeError, StrictDataclassError) as problem:
        why = " ".join(str(problem).split())
        raise bad_value(WHERE, name, expected, f"{given}: {why}") from problem


def _reads_both_ways(config: PreTrainedConfig) -> bool:
    """Whether a config is that of an encoder such as BERT: its class with an LM head reads the following tokens too."""
    decodes = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not decodes


def meta_composition(
    anchor: Config, augmenters: Sequence[Config], dtype: str, bidirectional: Any = None, **options: Any
) -> tuple[ComposedForCausalLM, list[dict[str, Any]]]:
    """Return the composition on the meta device, and its parts: name, family, parameters and bytes as they are loaded.

    Raises ValueError as `compose` does.
    """
    modes = list(bidirectional) if isinstance(bidirectional, (list, tuple)) else [bidirectional] * len(augmenters)
    models: list[PreTrainedModel] = []
    names = ["anchor", *["augmenters"] * len(augmenters)]
    for name, given, mode in zip(names, (anchor, *augmenters), [None, *modes], strict=True):
        config = _config(name, given)
        if mode is None and config.is_encoder_decoder:
            expected = "a causal language model (an augmenter may be an encoder: bidirectional='prompt')"
            raise bad_value(WHERE, name, expected, f"an encoder-decoder, {type(config).__name__}, which is not planned")
        expected = "the config of a causal language model, or of an encoder with bidirectional='prompt'"
        if mode is None and _reads_both_ways(config):
            raise bad_value(WHERE, name, expected, f"{type(config).__name__}, which reads a text in both directions")
        with torch.device("meta"), _named(name, expected, type(config).__name__):
            if mode is None:
                models.append(AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)))
            else:
                models.append(encoder_from_config(config).to(getattr(torch, dtype)))
    labels = ["B", *(["A"] if len(augmenters) == 1 else [f"A{i + 1}" for i in range(len(augmenters))])]
    parts = [
        {"name": label, "family": type(model).__name__, "parameters": _count(model), "bytes": _bytes(model)}
        for label, model in zip(labels, models, strict=True)
    ]
    # what the ids mean is compared when the models are loaded, with their tokenizers
    model = compose(models[0], [*models[1:]], same_ids=True, probe=False, vocab_size=1, bidirectional=bidirectional,
                    **options)  # fmt: skip
    assert isinstance(model, ComposedForCausalLM)  # the anchor is a causal LM
    for part, view in zip(parts[1:], model.augmenters, strict=True):
        part["kept_parameters"], part["kept_bytes"] = _count(view), _bytes(view)
    return model, parts


def trace_training(model: ComposedForCausalLM, rows: int, length: int, checkpointing: bool, cached: bool) -> Trace:
    """Return the Trace of one training step of `model`, which lies on the meta device.

    cached: the augmenters' states are given. Live bytes are marked "saved" at the end of the forward pass.
    """
    model.zero_grad()
    ids = torch.zeros(rows, length, dtype=torch.int64)
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids.to("meta")}
    width = length
    if any(model.encoders):
        batch["prompt_length"] = width = max(1, length // 2)
    if cached:
        batch["augmenter_hidden_states"] = [
            torch.zeros(
                rows, len(connected_layers(model, i)), width if model.encoders[i] else length,
                hidden_size(model._augmenter(i)), dtype=model._augmenter(i).dtype, device="meta",
            )
            for i in range(len(model.augmenters))
        ]  # fmt: skip

    def step(trace: Trace) -> None:
        if checkpointing:
            model._set_gradient_checkpointing(True, trace.checkpoint)
        loss = model(**batch).loss
        trace.mark("saved")
        loss.backward()

    model.train()
    try:
        return trace_step(step)
    except (RuntimeError, NotImplementedError) as problem:
        if "meta" not in str(problem).lower() and not isinstance(problem, NotImplementedError):
            raise
        names = ", ".join(type(part).__name__ for part in (model.anchor, *model.augmenters))
        got = f"{names}: {problem}. Measure a short run of it instead"
        raise bad_value(WHERE, "anchor", "of a family whose step reads no values of tensors", got) from problem
    finally:
        if checkpointing:
            model._set_gradient_checkpointing(False)
        model.zero_grad()
        model.eval()


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _memory(model: ComposedForCausalLM, trace: Trace, trained: int, shards: int) -> dict[str, int]:
    """Return bytes per GPU. shards: over how many GPUs weights, gradients and optimizer are split."""
    parts = [model.anchor, *(model._augmenter(i) for i in range(len(model.augmenters)))]
    weights = sum(map(_bytes, parts)) + _bytes(model.connections)
    # what is gathered: the layer that runs and the one that follows
    gathered = 0 if shards == 1 else 2 * max(_largest_layer(part) for part in parts)
    gradients = _bytes(model.connections)
    step = trace.peak - gradients + -(-gradients // shards)
    found = {
        "weights": -(-weights // shards) + gathered,
        "optimizer": -(-trained * _MOMENTS // shards),
        "saved_activations": trace.marks["saved"],
        "step_peak": step,
    }
    return found | {"total": found["weights"] + found["optimizer"] + step}


def _largest_layer(part: nn.Module) -> int:
    """Return the bytes of the largest layer, embedding or head."""
    units = [child for module in part.modules() if isinstance(module, nn.ModuleList) for child in module]
    units += [module for module in part.modules() if isinstance(module, (nn.Embedding, nn.Linear))]
    return max(map(_bytes, units), default=0)


def _traffic(model: ComposedForCausalLM, trained: int, gpus: int, fsdp: bool, run: bool) -> dict[str, int]:
    """Return the bytes that a GPU sends in a step. run: the augmenters run."""
    share = (gpus - 1) / gpus
    gradients = 4 * trained
    if not fsdp:
        return {"bytes": round(2 * share * gradients)}  # a ring's all-reduce
    anchor = _bytes(model.anchor) + _bytes(model.connections)
    read = sum(_bytes(model._augmenter(i)) for i in range(len(model.augmenters))) if run else 0
    # weights are gathered for the forward and again for the backward pass; frozen augmenters have no backward
    return {"bytes": round(share * (2 * anchor + read + gradients))}


def _time(board: Gpu, trace: Trace, steps: int, moved: dict[str, int], gpus: int, fsdp: bool) -> dict[str, float]:
    compute = board.seconds(trace)
    transfer = board.transfer_seconds(moved["bytes"], gpus) if gpus > 1 else 0.0
    # FSDP fetches the next layer while one runs; gradients of the connections are few and are added at the end
    step = max(compute, transfer) if fsdp else compute + transfer
    return {"compute_s": compute, "interconnect_s": transfer, "step_s": step, "all_tokens_s": step * steps}


def cache_bytes(model: ComposedForCausalLM, rows: int, length: int) -> dict[str, int]:
    """Return bytes per token: of cached states on disk in bfloat16, and of a generation's caches at this length."""
    states = 2 * sum(len(connected_layers(model, i)) * hidden_size(model._augmenter(i))
                     for i in range(len(model.augmenters)))  # fmt: skip
    found = {"states_bfloat16": states}
    if model.recomputes:
        return found
    caches: list[Any] = []

    @torch.no_grad()
    def prefill(trace: Trace) -> None:
        caches.append(model.eval()(torch.zeros(rows, length, dtype=torch.int64), use_cache=True).cache)

    trace_step(prefill)
    cache = caches[0]
    size = model.anchor.dtype.itemsize
    connections: Any = model.connections
    cross = 2 * size * sum(c.num_kv_heads * c.head_dim for c in connections)
    for name, layers in (("anchor", cache.anchor.layers),
                         ("augmenters", [layer for part in cache.augmenters for layer in part.layers])):  # fmt: skip
        tensors = {id(t): t for layer in layers for t in vars(layer).values() if isinstance(t, torch.Tensor)}
        found[name] = round(sum(t.numel() * t.element_size() for t in tensors.values()) / (rows * length))
    return found | {"cross": cross}
