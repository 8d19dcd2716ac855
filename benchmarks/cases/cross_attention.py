"""The cases of cross_attention: the attention core (X1-X3) and the composition layer around it (X4, X5)."""

from __future__ import annotations

from typing import Any

import torch

from calm_fast.benchmarks.cases.cross_attention_core import CoreShape, core_case, decode_case
from calm_fast.benchmarks.cases.cross_attention_layer import LayerShape, layer_case
from calm_fast.benchmarks.registry import Case, Target


def cases(device: torch.device, suite: str) -> list[Case]:
    """Return the cases for `device` in `suite`; "full" adds cases and compiled baselines.

    The shapes for a CPU are small enough for one core.
    """
    full = suite == "full"
    return _gpu(device, full) if device.type == "cuda" else _cpu(device, full)


def _cpu(device: torch.device, full: bool) -> list[Case]:
    fp32 = torch.float32
    plain: dict[str, Any] = {"b": 1, "m": 512, "n": 512, "h": 8, "d": 64, "causal": True}
    texts: dict[str, Any] = {"b": 1, "m": 512, "n": 650, "h": 8, "d": 64, "documents": 2}
    infer: dict[str, Any] = {"b": 1, "m": 1024, "n": 1024, "da": 1024, "db": 2048, "h": 16, "d": 128}
    train: dict[str, Any] = {"b": 8, "m": 1024, "n": 1024, "da": 512, "db": 768, "h": 12, "d": 64, "train": True}
    step: dict[str, Any] = {"b": 4, "m": 1, "n": 1024, "da": 1024, "db": 2048, "h": 16, "d": 128, "cached": True}
    cache = {name: step[name] for name in "bmnhd"}  # x5_decode without the projections and the cache update
    inference = (Target("calm_fast", "eager", 1.5), Target("calm_fast", "unfolded_sdpa", 1.25))
    training = (Target("calm_fast", "eager", 1.5),)
    found = [
        layer_case("x4_layer_inference", LayerShape(**infer), fp32, device, inference, compiled=full),
        layer_case("x4_layer_training", LayerShape(**train), fp32, device, training, compiled=full, check_batch=1),
        core_case("x1_core", CoreShape(**plain), fp32, device, flex=full),
        core_case("x2_core_training", CoreShape(**plain, train=True), fp32, device, flex=full),
        core_case("x3_intervals", CoreShape(**texts), fp32, device, flex=full),
        layer_case("x5_decode", LayerShape(**step), fp32, device, compiled=full),
        core_case("x5_core_decode", CoreShape(**cache), fp32, device, flex=full),
        core_case("x5_core_decode_bfloat16", CoreShape(**cache), torch.bfloat16, device),
    ]
    if full:
        causal_train = LayerShape(**train, causal=True)
        found += [
            layer_case("x4_layer_inference_causal", LayerShape(**infer, causal=True), fp32, device, inference),
            layer_case("x4_layer_training_causal", causal_train, fp32, device, training, check_batch=1),
            core_case("x3_intervals_training", CoreShape(**texts, train=True), fp32, device),
            core_case("x5_core_decode_b1", CoreShape(**{**cache, "b": 1, "n": 4096}), fp32, device),
        ]
    return found


def _gpu(device: torch.device, full: bool) -> list[Case]:
    bf16 = torch.bfloat16
    plain: dict[str, Any] = {"b": 4, "m": 4096, "n": 4096, "h": 32}
    texts: dict[str, Any] = {"b": 4, "m": 4096, "n": 5200, "h": 32, "d": 128, "documents": 4}
    layer: dict[str, Any] = {"b": 4, "m": 4096, "n": 4096, "da": 2048, "db": 4096, "h": 32, "d": 128, "causal": True}
    step: dict[str, Any] = {"m": 1, "n": 4096, "da": 2048, "db": 4096, "h": 32, "d": 128, "cached": True}
    core = (Target("auto", "best", 1.0), Target("triton", "flex_attention", 1.0))
    interval = (Target("triton", "best", 1.3),)
    inference, training = (
        (
            Target("calm_fast", "compiled_eager", least),
            Target("calm_fast", "compiled_unfolded_sdpa", 1.2),
            Target("calm_fast", "eager", 2.0, "peak_bytes"),
        )
        for least in (1.5, 2.0)
    )
    decode = (Target("calm_fast_graph", "eager", 2.0), Target("calm_fast_graph", "compiled_eager_graph", 1.2))
    found = []
    for d in (64, 128, 256) if full else (128,):
        for name, train in (("x1_core", False), ("x2_core_training", True)):
            found.append(
                core_case(f"{name}_d{d}", CoreShape(**plain, d=d, causal=True, train=train), bf16, device, core)
            )
    found += [
        core_case("x3_intervals", CoreShape(**texts), bf16, device, interval),
        core_case("x3_intervals_training", CoreShape(**texts, train=True), bf16, device, interval),
        layer_case("x4_layer_inference", LayerShape(**layer), bf16, device, inference, compiled=True, check_batch=1),
        layer_case(
            "x4_layer_training", LayerShape(**layer, train=True), bf16, device, training, compiled=True, check_batch=1
        ),
    ]
    for b in (1, 4, 16, 64) if full else (1, 64):
        found.append(
            layer_case(
                f"x5_decode_b{b}", LayerShape(b=b, **step), bf16, device, decode, compiled=True, check_batch=min(b, 2)
            )
        )
        found.append(decode_case(f"x5_core_decode_b{b}", CoreShape(b, 1, 4096, 32, 128), bf16, device))
    if full:
        unmasked = LayerShape(**{**layer, "causal": False})
        found += [
            core_case("x1_core_full_mask_d128", CoreShape(**plain, d=128), bf16, device, core),
            layer_case("x4_layer_inference_full_mask", unmasked, bf16, device, inference, compiled=True, check_batch=1),
        ]
    return found
