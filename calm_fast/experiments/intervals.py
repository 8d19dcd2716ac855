"""Means over seeds and their t-intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence


def t_quantile(df: int, level: float = 0.975) -> float:
    """Return a quantile of Student's t, by bisection on Simpson's integral of its density."""
    log_scale = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)

    def above_half(x: float, cells: int = 2000) -> float:
        step = x / cells
        heights = [math.exp(log_scale - (df + 1) / 2 * math.log1p((i * step) ** 2 / df)) for i in range(cells + 1)]
        return step / 3 * (heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2]))

    low, high = 0.0, 100.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if above_half(middle) < level - 0.5 else (low, middle)
    return low


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean and 95 % t-interval over seeds; the bounds are None for a single seed."""
    mean, count = sum(values) / len(values), len(values)
    if count < 2:
        return {"mean": mean, "low": None, "high": None}
    half = t_quantile(count - 1) * math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1) / count)
    return {"mean": mean, "low": mean - half, "high": mean + half}
