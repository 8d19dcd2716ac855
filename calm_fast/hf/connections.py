"""The layers that are connected: "uniform:n", or explicit (augmenter layer, anchor layer) pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from calm_fast.core.checks import bad_value

Pair = tuple[int, int]
EMBEDDING = -1  # index of the hidden state that enters layer 0, on both sides
EXPECTED = '"uniform:n" or a list of (augmenter layer, anchor layer) pairs'


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(_is_index(v) for v in value)


def _spread(depth: int, count: int) -> list[int]:
    """Return round(linspace(0, depth - 1, count)), halves to even, in exact arithmetic."""
    if count == 1:
        return [0]
    indices = []
    for step in range(count):
        whole, rest = divmod(step * (depth - 1), count - 1)
        up = 2 * rest > count - 1 or (2 * rest == count - 1 and whole % 2 == 1)
        indices.append(whole + up)
    return indices


def _uniform(spec: str, augmenter_depth: int, anchor_depth: int) -> list[Pair]:
    kind, _, count = spec.partition(":")
    if kind != "uniform" or not count.isdecimal() or int(count) < 1:
        raise bad_value("compose", "connections", f"{EXPECTED} with n >= 1", repr(spec))
    n = int(count)
    if n > max(augmenter_depth, anchor_depth):
        depths = f"{augmenter_depth} in the augmenter, {anchor_depth} in the anchor"
        raise bad_value(
            "compose", "connections", f"at most as many pairs as the deeper model has layers ({depths})", repr(spec)
        )
    return list(zip(_spread(augmenter_depth, n), _spread(anchor_depth, n), strict=True))


def _resolve_one(spec: Any, augmenter_depth: int, anchor_depth: int) -> list[Pair]:
    if isinstance(spec, str):
        return _uniform(spec, augmenter_depth, anchor_depth)
    if not isinstance(spec, (list, tuple)) or not all(_is_pair(item) for item in spec):
        raise bad_value("compose", "connections", EXPECTED, repr(spec))
    pairs = [(int(a), int(b)) for a, b in spec]
    if not pairs:
        raise bad_value("compose", "connections", "at least one pair", "an empty list")
    for a, b in pairs:
        for side, index, depth in (("augmenter", a, augmenter_depth), ("anchor", b, anchor_depth)):
            if not EMBEDDING <= index < depth:
                expected = f"pairs with {side} layers in [-1, {depth}) (-1 is the embedding output)"
                raise bad_value("compose", "connections", expected, f"{index} in ({a}, {b})")
    if len(set(pairs)) != len(pairs):
        twice = next(pair for i, pair in enumerate(pairs) if pair in pairs[:i])
        raise bad_value("compose", "connections", "different pairs", f"{twice} twice")
    return pairs


def resolve_connections(spec: Any, augmenter_depths: Sequence[int], anchor_depth: int) -> list[list[Pair]]:
    """Turn the ``connections`` argument of compose() into one list of (augmenter layer, anchor layer) per augmenter.

    `spec` is "uniform:n" or a list of pairs, which applies to every augmenter, or a list with one of these per
    augmenter. "uniform:n" gives n pairs; both indices are round(linspace(0, depth - 1, n)) of their own model's depth.
    -1 is the embedding output on either side. Raises ValueError for anything else, naming ``connections``.
    """
    shared = isinstance(spec, str) or (isinstance(spec, (list, tuple)) and all(_is_pair(item) for item in spec))
    if shared:
        specs = [spec] * len(augmenter_depths)
    elif isinstance(spec, (list, tuple)) and not any(_is_pair(item) or _is_index(item) for item in spec):
        specs = list(spec)
        if len(specs) != len(augmenter_depths):
            expected = f"a list with one entry per augmenter ({len(augmenter_depths)})"
            raise bad_value("compose", "connections", expected, str(len(specs)))
    else:
        raise bad_value("compose", "connections", f"{EXPECTED}, or one of these per augmenter", repr(spec))
    return [_resolve_one(one, depth, anchor_depth) for one, depth in zip(specs, augmenter_depths, strict=True)]
