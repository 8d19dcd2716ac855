"""The cases of whole composed models: a training step (E1), generation (E2) and scaling. They belong to no op."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from calm_fast.benchmarks.baselines.composition import Part
from calm_fast.benchmarks.cases.cross_attention_layer import LayerShape, layer_case
from calm_fast.benchmarks.cases.model_generate import LOOPS, generation_case
from calm_fast.benchmarks.cases.model_shape import OP, ModelShape
from calm_fast.benchmarks.cases.model_training import training_case
from calm_fast.benchmarks.registry import Case, Series, Target

AUGMENTERS = Series("training step of a composed model, number of augmenters", "augmenters", 1.0)
LENGTH = Series("training step of a composed model, tokens of one sequence", "M", 2.0)
LAYER_LENGTH = Series("training step of one composition layer, tokens of one sequence", "M", 2.0)
_POINT = 0.2  # one point's share of the timing budget


def cases(device: torch.device, suite: str) -> list[Case]:
    """Return the cases for `device`: tiny models on a CPU, an 8B- and a 1B-class model with random weights on a GPU."""
    return (_gpu if device.type == "cuda" else _cpu)(device, suite == "full")


def _cpu(device: torch.device, full: bool) -> list[Case]:
    fp32 = torch.float32
    # widths, depths and LM heads have about the proportions of an 8B and a 1B model
    step = ModelShape(Part(256, 8, 4, 2, 704), Part(128, 4, 2, 1, 352), 2048, b=1, m=512, connections=3)
    talk = ModelShape(Part(384, 6, 6, 2, 1024), Part(192, 3, 3, 1, 512), 4096, b=1, m=16, connections=2, new=32)
    loops = [*LOOPS] if full else ["unfolded_sdpa_cache"]
    public = ["released", "calm_pytorch", "eager_recompute"] if full else ["released", "calm_pytorch"]
    found = [
        training_case("e1_training", step, fp32, device, compiled=full),
        generation_case("e2_generate_b1", talk, fp32, device, loops=loops, recompute=public),
        generation_case("e2_generate_b4", replace(talk, b=4), fp32, device, loops=loops, recompute=public[:1]),
    ]
    if full:
        found.append(generation_case("e2_generate_b1_long", replace(talk, m=64, new=64), fp32, device))
    shallow = ModelShape(Part(256, 4, 4, 2, 704), Part(128, 2, 2, 1, 352), 2048, b=1, m=256, connections=2)
    return found + _scaling(shallow, fp32, device, (128, 256, 512, 1024), {"da": 128, "db": 256, "h": 4})


def _gpu(device: torch.device, full: bool) -> list[Case]:
    bf16, vocab = torch.bfloat16, 128256
    anchor, augmenter = Part(4096, 32, 32, 8, 14336), Part(2048, 16, 32, 8, 8192)
    step = ModelShape(anchor, augmenter, vocab, b=2, m=4096, connections=4)
    talk = replace(step, b=1, m=256, new=32)
    training = (Target("calm_fast", "released", 2.0), Target("calm_fast", "parts", 1 / 1.10))
    fast = (Target("calm_fast", "parts", 1 / 1.15), Target("calm_fast", "released", 5.0))
    found = [
        training_case("e1_training", step, bf16, device, training),
        generation_case("e2_generate_b1", talk, bf16, device, fast, recompute=["released"]),
        generation_case("e2_generate_b16", replace(talk, b=16), bf16, device, fast, recompute=["released"]),
    ]
    if full:  # without a cache, 512 tokens would take minutes per call
        long = replace(talk, b=16, new=512)
        found.append(generation_case("e2_long_b16", long, bf16, device, fast[:1], loops=[], recompute=[]))
        middle = Part(2048, 16, 32, 8, 8192)
        many = ModelShape(middle, Part(1024, 8, 16, 4, 4096), 32000, b=1, m=1024, connections=4)
        layer = {"da": 2048, "db": 4096, "h": 32, "d": 128}
        found += _scaling(many, bf16, device, (1024, 2048, 4096, 8192), layer)
    return found


def _scaling(
    s: ModelShape, dtype: torch.dtype, device: torch.device, lengths: tuple[int, ...], layer: dict[str, int]
) -> list[Case]:
    """Return the points of three curves: cost by augmenters, and by length for the whole model and for one layer."""
    against = ["eager", "unfolded_sdpa"]
    found = []
    for count in (1, 2, 4, 8):
        name, many = f"s1_augmenters_{count}", replace(s, augmenters=count, m=lengths[0] * 2)
        found.append(training_case(name, many, dtype, device, only=against, series=AUGMENTERS, share=_POINT))
    for m in lengths:
        name, longer = f"s2_length_{m}", replace(s, m=m)
        found.append(training_case(name, longer, dtype, device, only=against, series=LENGTH, share=_POINT))
    for m in lengths:
        sizes: dict[str, Any] = {"d": 64, **layer}
        one = LayerShape(**sizes, b=1, m=m, n=m, causal=True, train=True)
        found.append(layer_case(f"s3_layer_length_{m}", one, dtype, device, op=OP, series=LAYER_LENGTH, share=_POINT))
    return found
