"""What is measured of cross_attention: the attention core (X1-X3) and the composition layer around it (X4, X5)."""

from __future__ import annotations

import torch

from calm_fast.benchmarks.cases.cross_attention_layer import LayerShape, layer_case
from calm_fast.benchmarks.registry import Case


def cases(device: torch.device, suite: str) -> list[Case]:
    """The cases for `device` ("cpu": small enough for one core) in `suite`."""
    return _gpu(device, suite) if device.type == "cuda" else _cpu(device, suite)


def _cpu(device: torch.device, suite: str) -> list[Case]:
    full, fp32 = suite == "full", torch.float32
    infer = {"b": 1, "m": 1024, "n": 1024, "da": 1024, "db": 2048, "h": 16, "d": 128}
    train = {"b": 8, "m": 1024, "n": 1024, "da": 512, "db": 768, "h": 12, "d": 64, "train": True}
    inference, training = {"eager": 1.5, "unfolded_sdpa": 1.25}, {"eager": 1.5}
    found = [
        layer_case("x4_layer_inference", LayerShape(**infer), fp32, device, inference, compiled=full),
        layer_case("x4_layer_training", LayerShape(**train), fp32, device, training, compiled=full, check_batch=2),
        layer_case("x4_layer_inference_causal", LayerShape(**infer, causal=True), fp32, device, inference),
        layer_case(
            "x4_layer_training_causal", LayerShape(**train, causal=True), fp32, device, training, check_batch=2
        ),
    ]
    return found


def _gpu(device: torch.device, suite: str) -> list[Case]:
    return []
