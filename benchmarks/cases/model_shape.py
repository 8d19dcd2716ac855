"""Sizes, costs and random inputs of whole composed models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from calm_fast.benchmarks.baselines.composition import Part, random_model
from calm_fast.benchmarks.baselines.cross_attention import init_weights
from calm_fast.benchmarks.cases.cross_attention_layer import LayerShape
from calm_fast.benchmarks.registry import Inputs

OP = "model"


@dataclass(frozen=True)
class ModelShape:
    """An anchor, `augmenters` equal augmenters, and `connections` to each, spread over both depths.

    B sequences of M tokens. new > 0: M is the prompt length, and `new` tokens are generated after it; otherwise one
    training step. Connections have the anchor's heads and head dim.
    """

    anchor: Part
    augmenter: Part
    vocab: int
    b: int
    m: int
    connections: int
    augmenters: int = 1
    new: int = 0

    def sizes(self) -> dict[str, int]:
        found = {"B": self.b, "M": self.m, "DA": self.augmenter.width, "DB": self.anchor.width, "V": self.vocab}
        found |= {"layers_A": self.augmenter.depth, "layers_B": self.anchor.depth}
        found |= {"connections": self.connections, "augmenters": self.augmenters}
        return found | ({"new": self.new} if self.new else {})

    def pairs(self) -> list[list[tuple[int, int]]]:
        """Return the (augmenter layer, anchor layer) pairs of each augmenter."""
        from calm_fast.hf.connections import resolve_connections

        depths = [self.augmenter.depth] * self.augmenters
        return resolve_connections(f"uniform:{self.connections}", depths, self.anchor.depth)

    def reduced(self) -> ModelShape:
        """Return a shape small enough for float64: same widths, heads and connections; fewer layers and tokens."""
        few = max(self.connections, 2)
        anchor, augmenter = (replace(part, depth=min(part.depth, few)) for part in (self.anchor, self.augmenter))
        return replace(
            self, anchor=anchor, augmenter=augmenter, b=min(self.b, 2), m=min(self.m, 40), new=min(self.new, 5)
        )

    def layer(self, **tokens: Any) -> LayerShape:
        """Return the shape of one connection's layer; `tokens` replaces fields of it."""
        widths = {
            "da": self.augmenter.width,
            "db": self.anchor.width,
            "h": self.anchor.heads,
            "d": self.anchor.head_dim,
        }
        return LayerShape(**{"b": self.b, "m": self.m, "n": self.m, **widths, **tokens})

    def _first(self) -> int:
        return min(b for pairs in self.pairs() for _, b in pairs)

    def _connected(self) -> list[int]:
        """Return the anchor layer of every connection."""
        return [b for pairs in self.pairs() for _, b in pairs]

    def attention_flops(self) -> int:
        """Count all attention (augmenters, anchor, connections) over the pairs that a token may see."""
        a, b = self.augmenter, self.anchor
        if self.new:  # the last new token is never read
            read = self.m + self.new - 1
            pair = 4 * self.b * (read * (read + 1) // 2)
            whole = self.augmenters * a.depth * a.width + (b.depth + len(self._connected())) * b.width
            return pair * whole
        pair = 4 * self.b * (self.m * (self.m + 1) // 2)
        back = 5 * (b.depth - 1 - self._first()) * b.width // 2
        into = 7 * len(self._connected()) * b.width // 2
        return pair * (self.augmenters * a.depth * a.width + b.depth * b.width + back + into)

    def flops(self) -> int:
        """Count the work that must run: augmenters without LM head, the anchor, the connections.

        Augmenters run up to their last connected layer. Backward goes through the anchor down to its first connection,
        into none of its weights. Generation computes the logits of new tokens only.
        """
        a, b, first = self.augmenter, self.anchor, self._first()
        head = 2 * b.width * self.vocab
        if self.new:
            read = self.b * (self.m + self.new - 1)
            layers = 2 * read * (self.augmenters * a.depth * a.layer_weights() + b.depth * b.layer_weights())
            each = 4 * b.width * b.head_dim * b.heads + 4 * a.width * b.head_dim * b.heads
            return layers + head * self.b * self.new + each * read * len(self._connected()) + self.attention_flops()
        tokens = self.b * self.m
        layers = self.augmenters * a.depth * a.layer_weights() + (2 * b.depth - 1 - first) * b.layer_weights()
        step = self.layer(causal=True, train=True)
        core = 7 * 4 * self.b * (self.m * (self.m + 1) // 2) * b.heads * b.head_dim // 2
        # nothing below the first connection has a gradient, and neither has the H_B that it reads
        unused = 2 * tokens * b.width * b.head_dim * b.heads
        extra = sum(step.flops() - core - (unused if layer == first else 0) for layer in self._connected())
        return 2 * tokens * layers + 2 * head * tokens + extra + self.attention_flops()

    def bytes(self, itemsize: int) -> int:
        """Count weights and embeddings read once, and in training the connections' gradients written.

        Generation reads the weights for every new token, and the filled part of the caches.
        """
        a, b = self.augmenter, self.anchor
        heads, links = b.heads * b.head_dim, len(self._connected())
        parts = self.augmenters * a.depth * a.layer_weights() + b.depth * b.layer_weights() + b.width * self.vocab
        embedded = self.b * (self.augmenters * a.width + b.width)
        if self.new:
            folded = links * 2 * heads * (a.width + b.width)
            row = 2 * (
                self.augmenters * a.depth * a.kv_heads * a.head_dim + b.depth * b.kv_heads * b.head_dim + links * heads
            )
            filled = sum(self.b * row * (self.m + step) for step in range(self.new))
            return itemsize * (self.new * (parts + folded) + filled + embedded * (self.m + self.new - 1))
        factors = links * (2 * heads * b.width + b.width * a.width + 2 * heads * b.width + b.width)
        return itemsize * (parts + 2 * factors + embedded * self.m)

    def make(self, dtype: torch.dtype, device: torch.device) -> Callable[[int], Inputs]:
        """Return make(seed), which draws the models (transformers), each connection's weights and the tokens."""

        def make(seed: int) -> Inputs:
            g = torch.Generator(device).manual_seed(seed)
            a, b = self.augmenter, self.anchor
            pairs = self.pairs()
            links = sum(len(p) for p in pairs)
            return {
                "ids": torch.randint(0, self.vocab, (self.b, self.m + self.new), generator=g, device=device),
                "anchor": random_model(b, self.vocab, dtype, device, seed + 1),
                "augmenters": [
                    random_model(a, self.vocab, dtype, device, seed + 2 + i) for i in range(self.augmenters)
                ],
                "pairs": pairs,
                "weights": [
                    init_weights(a.width, b.width, b.heads, b.head_dim, dtype, device, seed + 100 + i)
                    for i in range(links)
                ],
            }

        return make
