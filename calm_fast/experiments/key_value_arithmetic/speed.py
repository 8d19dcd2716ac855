"""The composition layer against a plain eager transcription of its equation, measured in this process."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from calm_fast import CrossAttention, explain


@dataclass(frozen=True)
class Case:
    """One measured shape: B x M anchor tokens of width DB read as many augmenter tokens of width DA."""

    name: str
    batch: int
    tokens: int
    augmenter_dim: int
    anchor_dim: int
    heads: int
    training: bool


@dataclass(frozen=True)
class Measurement:
    """Median milliseconds of both sides, timed in turns, and the largest error of each side against float64."""

    case: Case
    eager_ms: float
    ours_ms: float
    eager_error: float
    ours_error: float
    choice: str
    threads: int

    @property
    def ratio(self) -> float:
        return self.eager_ms / self.ours_ms


CASES = (
    Case("inference", 1, 512, 1024, 2048, 16, training=False),
    Case("training step", 4, 512, 512, 768, 12, training=True),
)


def eager_layer(layer: CrossAttention, anchor: torch.Tensor, augmenter: torch.Tensor) -> torch.Tensor:
    """Return H_B + W_o softmax(q k^T / sqrt(D)) v, causal, with every product on its own: (B, M, DB) like `anchor`."""
    assert layer.proj is not None and layer.norm is not None  # the layer's defaults
    batch, tokens, _ = anchor.shape
    states = layer.proj(augmenter)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(batch, -1, layer.num_heads, layer.head_dim).transpose(1, 2)

    q, k, v = (
        heads(layer.q_proj(layer.norm(anchor))),
        heads(layer.k_proj(states)),
        heads(layer.v_proj(states)),
    )
    scores = q @ k.transpose(-1, -2) / math.sqrt(layer.head_dim)
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=anchor.device).triu(1)
    read = F.softmax(scores.masked_fill(later, float("-inf")), dim=-1) @ v
    return anchor + layer.o_proj(read.transpose(1, 2).reshape(batch, tokens, -1))


def _layer_and_inputs(case: Case, seed: int) -> tuple[CrossAttention, torch.Tensor, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = CrossAttention(case.anchor_dim, case.augmenter_dim, case.heads)
        torch.nn.init.normal_(layer.o_proj.weight, std=case.anchor_dim**-0.5)  # the initial zeros would hide errors
        anchor = torch.randn(case.batch, case.tokens, case.anchor_dim)
        augmenter = torch.randn(case.batch, case.tokens, case.augmenter_dim)
    return layer, anchor, augmenter


def _check(case: Case) -> tuple[float, float]:
    """Return the errors (eager, ours) against float64 on a shorter sequence.

    Raises RuntimeError if ours is worse than the error rule allows.
    """
    short = Case(case.name, 1, 64, case.augmenter_dim, case.anchor_dim, case.heads, case.training)
    layer, anchor, augmenter = _layer_and_inputs(short, seed=1)
    with torch.no_grad():
        ours = layer(anchor, augmenter, causal=True)
        eager = eager_layer(layer, anchor, augmenter)
        truth = eager_layer(layer.double(), anchor.double(), augmenter.double())
    errors = [(x.double() - truth).abs().max().item() for x in (eager, ours)]
    rounding = truth.abs().max().item() * torch.finfo(torch.float32).eps
    if not errors[1] <= 2 * errors[0] + 4 * rounding:
        raise RuntimeError(
            f"CrossAttention: its error must be at most twice eager's {errors[0]:.2e}, got {errors[1]:.2e}; not timed"
        )
    return errors[0], errors[1]


def _step(case: Case, run: Callable[[], torch.Tensor], parameters: list[torch.Tensor]) -> float:
    """Return the milliseconds of one forward, or in training of one forward and backward."""
    start = time.perf_counter()
    if case.training:
        run().square().mean().backward()
    else:
        with torch.no_grad():
            run()
    elapsed = 1e3 * (time.perf_counter() - start)
    for parameter in parameters:
        parameter.grad = None
    return elapsed


def measure(case: Case, seconds: float = 2.0, rounds: int = 15) -> Measurement:
    """Check both sides against float64, then time them in turns for about `seconds` (at least 3 rounds)."""
    eager_error, ours_error = _check(case)
    layer, anchor, augmenter = _layer_and_inputs(case, seed=2)
    # in training the anchor's states pass the gradient on to the layers below; the augmenter is frozen
    anchor.requires_grad_(case.training)
    parameters: list[torch.Tensor] = [*layer.parameters(), anchor]
    sides = {
        "eager": lambda: eager_layer(layer, anchor, augmenter),
        "ours": lambda: layer(anchor, augmenter, causal=True),
    }
    for run in sides.values():
        _step(case, run, parameters)
    times: dict[str, list[float]] = {name: [] for name in sides}
    end = time.perf_counter() + seconds
    while len(times["eager"]) < 3 or (time.perf_counter() < end and len(times["eager"]) < rounds):
        for name, run in sides.items():
            times[name].append(_step(case, run, parameters))
    shape = (case.batch, case.tokens, case.heads, case.anchor_dim // case.heads)
    q = torch.empty(shape, requires_grad=case.training)
    return Measurement(
        case,
        eager_ms=statistics.median(times["eager"]),
        ours_ms=statistics.median(times["ours"]),
        eager_error=eager_error,
        ours_error=ours_error,
        choice=str(explain("cross_attention", q, q, q, causal=True)),
        threads=torch.get_num_threads(),
    )
