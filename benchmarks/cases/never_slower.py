"""The shapes of `--suite never-slower`: a few hundred small ones per machine, where a wrong choice of "auto" shows.

Each op's own case file builds the cases, so contestants, definitions and checks are those of the other suites. The
shapes lie on both sides of the limits at which an op changes its implementation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F

from calm_fast.benchmarks.baselines.composition import Part
from calm_fast.benchmarks.cases import (
    cross_attention_core,
    cross_attention_layer,
    dual_lora,
    linear_logprob,
    linear_nce,
    maj_at_k,
    vote,
)
from calm_fast.benchmarks.cases.model_generate import generation_case
from calm_fast.benchmarks.cases.model_shape import ModelShape
from calm_fast.benchmarks.cases.model_training import training_case
from calm_fast.benchmarks.registry import Case, Contestant, Inputs, Thunk, Values

DTYPES = (torch.float32, torch.bfloat16)
_CPU = torch.device("cpu")
_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_SMALL = {"da": 128, "db": 256, "h": 4, "d": 64}
_MEDIUM = {"da": 512, "db": 1024, "h": 8, "d": 128}


def _name(stem: str, dtype: torch.dtype, **sizes: Any) -> str:
    """Return e.g. "core_train_b1_m64_bf16": `stem`, the sizes, the dtype."""
    return "_".join([stem, *(f"{key}{value}" for key, value in sizes.items()), _SHORT[dtype]])


def _core(name: str, dtype: torch.dtype, **shape: Any) -> Case:
    return cross_attention_core.core_case(name, cross_attention_core.CoreShape(**shape), dtype, _CPU)


def core_cases() -> Iterator[Case]:
    """Yield attention cores: decode, prefill, several queries, intervals and training."""
    for dtype in DTYPES:
        for b, n, d in product((1, 8), (64, 512, 4096), (64, 128)):
            yield _core(_name("core", dtype, b=b, m=1, n=n, d=d), dtype, b=b, m=1, n=n, h=8, d=d)
        for m, d, causal in product((8, 17, 32, 64, 128, 512), (64, 128), (False, True)):
            kind = "core_causal" if causal else "core"
            yield _core(_name(kind, dtype, m=m, d=d), dtype, b=1, m=m, n=m, h=8, d=d, causal=causal)
        for m, n, b in ((16, 512, 1), (128, 1024, 1), (1024, 64, 1), (32, 32, 8)):
            yield _core(_name("core", dtype, b=b, m=m, n=n), dtype, b=b, m=m, n=n, h=8, d=64)
        for m, n, train in product((64, 512), (650,), (False, True)):
            n, kind = m * n // 512, "core_documents_train" if train else "core_documents"
            yield _core(_name(kind, dtype, m=m), dtype, b=1, m=m, n=n, h=8, d=64, documents=2, train=train)
        for m, causal in product((16, 64, 256, 512), (False, True)):
            kind = "core_causal_train" if causal else "core_train"
            yield _core(_name(kind, dtype, m=m), dtype, b=1, m=m, n=m, h=8, d=64, causal=causal, train=True)


def _layer(name: str, dtype: torch.dtype, **shape: Any) -> Case:
    return cross_attention_layer.layer_case(name, cross_attention_layer.LayerShape(**shape), dtype, _CPU, check_batch=1)


def layer_cases() -> Iterator[Case]:
    """Yield whole composition layers: decode, inference and training."""
    for dtype, (width, sizes) in product(DTYPES, (("small", _SMALL), ("medium", _MEDIUM))):
        for b, n in product((1, 4, 16), (64, 1024)):
            name = _name(f"layer_{width}_decode", dtype, b=b, n=n)
            yield _layer(name, dtype, b=b, m=1, n=n, cached=True, **sizes)
        for m, causal in product((16, 128, 512), (False, True)):
            kind = f"layer_{width}_causal" if causal else f"layer_{width}"
            yield _layer(_name(kind, dtype, m=m), dtype, b=1, m=m, n=m, causal=causal, **sizes)
        for m in (16, 64, 128, 256) if width == "small" else (64, 256):
            yield _layer(
                _name(f"layer_{width}_train", dtype, m=m), dtype, b=1, m=m, n=m, causal=True, train=True, **sizes
            )


def _lora(name: str, dtype: torch.dtype, **shape: Any) -> Case:
    case = dual_lora.layer_case(name, dual_lora.Shape(**shape), dtype, _CPU, check_tokens=32)
    # the op with folded factors does less than the layer around it
    inside = [replace(c, yardstick=c.yardstick or c.name.startswith("calm_fast_")) for c in case.contestants]
    # W_k B, that times W_q, and the product with x
    return replace(case, contestants=tuple(inside), roundings=3)


def dual_lora_cases() -> Iterator[Case]:
    """Yield dual LoRA in both variants: whole layers, the cost on top of a given base output, and training."""
    for dtype, variant in product(DTYPES, ("released", "paper")):
        for d, t in product((256, 1024), (1, 16, 64, 256)):
            yield _lora(_name(f"lora_{variant}", dtype, d=d, t=t), dtype, t=t, d=d, r=8, variant=variant)
        for t, r in product((1, 16, 64), (8, 64)):
            added = {"t": t, "d": 4096, "r": r, "variant": variant, "added": True}
            yield _lora(_name(f"lora_{variant}_added_d4096", dtype, t=t, r=r), dtype, **added)
        for d, t in product((256, 768), (16, 256)):
            yield _lora(
                _name(f"lora_{variant}_train", dtype, d=d, t=t), dtype, t=t, d=d, r=8, variant=variant, train=True
            )


def logprob_cases() -> Iterator[Case]:
    """Yield log-probabilities: few and many tokens, narrow and wide models, gradients."""
    for dtype in DTYPES:
        for (d, v), t in product(((256, 8192), (4096, 2048), (576, 32768)), (1, 4, 15, 16, 32, 64, 128)):
            if t * d * v <= 1 << 30:
                shape = linear_logprob.Shape(t, d, v)
                case = linear_logprob.logprob_case(_name("logprob", dtype, t=t, d=d, v=v), shape, dtype, _CPU)
                # the logarithm's, and those of a logit in another order: random ones of d products leave sqrt(d) / 2
                # roundings of a logit of size 1, beside log-probabilities of about 8
                yield replace(case, roundings=2 + math.isqrt(d) // 16)
        for (d, v), t in product(((256, 8192), (1024, 2048)), (16, 128)):
            shape = linear_logprob.Shape(t, d, v, train=True)
            yield linear_logprob.logprob_case(_name("logprob_train", dtype, t=t, d=d, v=v), shape, dtype, _CPU)


def nce_cases() -> Iterator[Case]:
    """Yield NCE losses with a frozen and a trained head."""
    for dtype in DTYPES:
        for (d, v), t, head in product(((64, 8192), (576, 8192), (576, 32768)), (16, 64, 256), (False, True)):
            if t * d * v <= 1 << 30:
                kind = "nce_head" if head else "nce"
                yield linear_nce.nce_case(
                    _name(kind, dtype, t=t, d=d, v=v), linear_nce.Shape(t, d, v, True, head), dtype, _CPU
                )


def vote_cases() -> Iterator[Case]:
    """Yield votes: one question and thousands, few samples and many."""
    for (q, k), weighted in product(((1, 8), (1, 64), (16, 16), (256, 64), (5000, 16)), (False, True)):
        kind = "vote_weighted" if weighted else "vote"
        yield vote.vote_case(f"{kind}_q{q}_k{k}", vote.Shape(q, k, weighted=weighted), _CPU)


def curve_cases() -> Iterator[Case]:
    """Yield curves. The exact curve has no baseline but our own implementations."""
    for (q, k), resamples in product(((1, 16), (16, 16), (200, 64)), (100, 1000)):
        if q * resamples > 1 << 16:
            continue
        case = maj_at_k.curve_case(f"curve_q{q}_k{k}_r{resamples}", maj_at_k.Shape(q, k, resamples), _CPU, slow=True)
        exact = [c.name for c in case.contestants if c.name.startswith("calm_fast_exact")]
        yield _without(case, *exact)
        if resamples == 100:
            others = [c.name for c in case.contestants if c.name not in exact]
            yield replace(_without(case, *others), name=f"curve_exact_q{q}_k{k}", headline="calm_fast_exact")


def _without(case: Case, *names: str) -> Case:
    """Return `case` without the contestants of these names."""
    return replace(case, contestants=tuple(c for c in case.contestants if c.name not in names))


def packed_linear_cases() -> Iterator[Case]:
    """Yield products with a kept weight against torch's."""
    for (k, rows), t in product(((128, 512), (256, 256), (1024, 2048), (2048, 1024)), (1, 4, 8, 16, 64, 256)):
        yield _packed_case(f"packed_k{k}_rows{rows}_t{t}", t, k, rows)


def _packed_case(name: str, t: int, k: int, rows: int) -> Case:
    def make(seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        return {"x": torch.randn(t, k, generator=g), "weight": torch.randn(rows, k, generator=g) * k**-0.5}

    def ours(inputs: Inputs) -> Thunk:
        from calm_fast._ops.packed_linear.api import linear, pack

        kept = pack(inputs["weight"])
        return lambda: {"out": linear(inputs["x"], kept)}

    def definition(inputs: Inputs, dtype: torch.dtype) -> Values:
        return {"out": F.linear(inputs["x"].to(dtype), inputs["weight"].to(dtype))}

    contestants = (
        Contestant("calm_fast", ours, ours=True),
        Contestant("torch_linear", lambda inputs: lambda: {"out": F.linear(inputs["x"], inputs["weight"])}),
    )
    moved = 4 * (t * k + rows * k + t * rows)
    sizes = {"T": t, "K": k, "rows": rows}
    return Case(
        "packed_linear", name, sizes, torch.float32, 2 * t * k * rows, moved, make, contestants, definition,
        "calm_fast", roundings=2,  # of a long sum in another order
    )  # fmt: skip


def model_cases() -> Iterator[Case]:
    """Yield whole composed models: generation and training steps of small ones."""
    talk = ModelShape(Part(384, 6, 6, 2, 1024), Part(192, 3, 3, 1, 512), 4096, b=1, m=16, connections=2, new=16)
    tiny = ModelShape(Part(128, 4, 2, 2, 352), Part(64, 2, 1, 1, 176), 1024, b=1, m=16, connections=2, new=16)
    for stem, s in (("talk", talk), ("tiny", tiny)):
        for b, dtype in product((1, 4), DTYPES):
            name = _name(f"generate_{stem}", dtype, b=b)
            case = generation_case(name, replace(s, b=b), dtype, _CPU, recompute=())
            # the bare loop is our model too, but not another implementation that "auto" could choose
            yield _without(case, "calm_fast_loop")
    for m, dtype in product((64, 128, 256), DTYPES):
        yield training_case(_name("train_talk", dtype, m=m), replace(talk, m=m, new=0), dtype, _CPU)


FAMILIES: dict[str, Sequence[Callable[[], Iterator[Case]]]] = {
    "cross_attention": (core_cases, layer_cases, packed_linear_cases),
    "dual_lora": (dual_lora_cases,),
    "linear_logprob": (logprob_cases,),
    "linear_nce": (nce_cases,),
    "vote": (vote_cases,),
    "maj_at_k": (curve_cases,),
    "model": (model_cases,),
}


def cases(op: str) -> list[Case]:
    """Return the cases of `op`, a key of the registry, for a CPU."""
    return [case for family in FAMILIES[op] for case in family()]
