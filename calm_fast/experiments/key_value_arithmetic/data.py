"""Vocabulary and task batches of the key-value arithmetic experiment (CALM, section 4.1).

Every row is `x op y <mark> answer <eos>` with a two-operand expression, so all answers start in the same column. A
batch is one rectangular int64 tensor. It needs no attention mask: padding is on the right, and attention is causal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from calm_fast.core.checks import bad_value

PAD, EOS, PLUS, MINUS, EQUALS, COLON = range(6)
SPECIALS = ("<pad>", "<eos>", "+", "-", "=", ":")
EXPRESSION = 3  # tokens of `x op y`
ANSWER_START = EXPRESSION + 1  # column of the first answer token: after `=` or `:`
ROW = ANSWER_START + EXPRESSION + 1  # the longest row: `x op y : u op v <eos>`
IGNORE = -100  # label of a token that carries no loss (the transformers convention)


@dataclass(frozen=True)
class World:
    """The keys, their values and their token ids, all drawn from one seed.

    values: (keys,) int64, the number behind each key.
    train_keys, unseen_keys: int64 key indices. The composition trains on the first; results are for the second.
    """

    values: torch.Tensor
    train_keys: torch.Tensor
    unseen_keys: torch.Tensor
    max_value: int

    @staticmethod
    def create(seed: int, *, keys: int = 2000, max_value: int = 19, train_fraction: float = 0.2) -> World:
        """Draw `keys` values in [0, max_value] and a disjoint split of the keys, from `seed` alone."""
        rng = torch.Generator().manual_seed(seed)
        values = torch.randint(0, max_value + 1, (keys,), generator=rng)
        order = torch.randperm(keys, generator=rng)
        cut = int(round(keys * train_fraction))
        if not 0 < cut < keys:
            expected = "a fraction that leaves keys on both sides of the split"
            raise bad_value("World.create", "train_fraction", expected, f"{train_fraction} of {keys} keys")
        return World(values, order[:cut], order[cut:], max_value)

    @property
    def number_offset(self) -> int:
        """Token id of the number 0. Each number from -max_value to 2*max_value has one token."""
        return len(SPECIALS) + self.max_value

    @property
    def key_offset(self) -> int:
        """Token id of key k0."""
        return len(SPECIALS) + 3 * self.max_value + 1

    @property
    def vocab_size(self) -> int:
        return self.key_offset + len(self.values)

    def number(self, x: torch.Tensor) -> torch.Tensor:
        """Return the token ids of the integers x, of any shape."""
        return x + self.number_offset

    def key(self, k: torch.Tensor) -> torch.Tensor:
        """Return the token ids of the key indices k, of any shape."""
        return k + self.key_offset

    def decode(self, ids: list[int]) -> str:
        """Return readable text for token ids, for reports and tests."""
        words = []
        for i in ids:
            if i < len(SPECIALS):
                words.append(SPECIALS[i])
            elif i < self.key_offset:
                words.append(str(i - self.number_offset))
            else:
                words.append(f"k{i - self.key_offset}")
        return " ".join(words)


@dataclass(frozen=True)
class Batch:
    """input_ids (n, ROW) int64 and labels (n, ROW) int64: input_ids on answer tokens, IGNORE elsewhere."""

    input_ids: torch.Tensor
    labels: torch.Tensor

    @staticmethod
    def cat(parts: list[Batch]) -> Batch:
        return Batch(torch.cat([p.input_ids for p in parts]), torch.cat([p.labels for p in parts]))

    def __len__(self) -> int:
        return self.input_ids.shape[0]


def _operands(pool: torch.Tensor, n: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two independent draws of n members of `pool`."""
    pick = torch.randint(0, len(pool), (2, n), generator=rng)
    return pool[pick[0]], pool[pick[1]]


def _operator(n: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return n operator tokens and their signs, +1 or -1."""
    minus = torch.randint(0, 2, (n,), generator=rng)
    return torch.where(minus == 1, MINUS, PLUS), 1 - 2 * minus


def _batch(columns: list[torch.Tensor | int], answer_start: int, n: int) -> Batch:
    """Build rows from columns, each a tensor (n,) or one token for all rows, padded on the right to ROW."""
    ids = torch.full((n, ROW), PAD, dtype=torch.int64)
    for position, column in enumerate(columns):
        ids[:, position] = column
    labels = torch.full_like(ids, IGNORE)
    labels[:, answer_start : len(columns)] = ids[:, answer_start : len(columns)]
    return Batch(ids, labels)


def substitution(world: World, pool: torch.Tensor, n: int, rng: torch.Generator) -> Batch:
    """Return rows `k1 op k2 : v1 op v2 <eos>`: the values of an expression of keys."""
    k1, k2 = _operands(pool, n, rng)
    op, _ = _operator(n, rng)
    v1, v2 = world.number(world.values[k1]), world.number(world.values[k2])
    return _batch([world.key(k1), op, world.key(k2), COLON, v1, op, v2, EOS], ANSWER_START, n)


def facts(world: World, pool: torch.Tensor, n: int, rng: torch.Generator) -> Batch:
    """Return rows with a key followed at once by its value: half `k v`, half `k1 op k2 v2`.

    They make A's state at a key carry the value, where the composition can read it.
    """
    first = n // 2
    k = pool[torch.randint(0, len(pool), (first,), generator=rng)]
    a = _batch([world.key(k), world.number(world.values[k])], 1, first)
    k1, k2 = _operands(pool, n - first, rng)
    op, _ = _operator(n - first, rng)
    b = _batch([world.key(k1), op, world.key(k2), world.number(world.values[k2])], EXPRESSION, n - first)
    return Batch.cat([a, b])


def numeric(world: World, n: int, rng: torch.Generator) -> Batch:
    """Return rows `a op b = c <eos>`."""
    a, b = torch.randint(0, world.max_value + 1, (2, n), generator=rng)
    op, sign = _operator(n, rng)
    return _batch([world.number(a), op, world.number(b), EQUALS, world.number(a + sign * b), EOS], ANSWER_START, n)


def echo(world: World, n: int, rng: torch.Generator) -> Batch:
    """Return rows `a op b : a op b <eos>`: the answers of substitution, which B must be able to write."""
    a, b = world.number(torch.randint(0, world.max_value + 1, (2, n), generator=rng))
    op, _ = _operator(n, rng)
    return _batch([a, op, b, COLON, a, op, b, EOS], ANSWER_START, n)


def kv_arithmetic(world: World, pool: torch.Tensor, n: int, rng: torch.Generator) -> Batch:
    """Return rows `k1 op k2 = c <eos>`, which neither A nor B can answer alone."""
    k1, k2 = _operands(pool, n, rng)
    op, sign = _operator(n, rng)
    c = world.number(world.values[k1] + sign * world.values[k2])
    return _batch([world.key(k1), op, world.key(k2), EQUALS, c, EOS], ANSWER_START, n)


def mixed_arithmetic(world: World, pool: torch.Tensor, n: int, rng: torch.Generator) -> Batch:
    """Return rows of arithmetic with one key and one number, the key on either side."""
    k = pool[torch.randint(0, len(pool), (n,), generator=rng)]
    v = world.values[k]
    x = torch.randint(0, world.max_value + 1, (n,), generator=rng)
    left = torch.randint(0, 2, (n,), generator=rng) == 1
    op, sign = _operator(n, rng)
    first = torch.where(left, world.key(k), world.number(x))
    second = torch.where(left, world.number(x), world.key(k))
    c = world.number(torch.where(left, v + sign * x, x + sign * v))
    return _batch([first, op, second, EQUALS, c, EOS], ANSWER_START, n)


Mixture = list[tuple[float, Callable[[int, torch.Generator], Batch]]]


def mixture_a(world: World) -> Mixture:
    """Return A's training data: half substitution, half facts, over all keys, because A knows them all."""
    everything = torch.arange(len(world.values))
    return [
        (0.5, lambda n, rng: substitution(world, everything, n, rng)),
        (0.5, lambda n, rng: facts(world, everything, n, rng)),
    ]


def mixture_b(world: World) -> Mixture:
    """Return B's training data: numbers only, never a key."""
    return [(0.7, lambda n, rng: numeric(world, n, rng)), (0.3, lambda n, rng: echo(world, n, rng))]


def mixture_composition(world: World) -> Mixture:
    """Return the composition's training data: only `train_keys`, and numeric rows that preserve B's own skill."""
    pool = world.train_keys
    return [
        (0.4, lambda n, rng: kv_arithmetic(world, pool, n, rng)),
        (0.15, lambda n, rng: mixed_arithmetic(world, pool, n, rng)),
        (0.3, lambda n, rng: substitution(world, pool, n, rng)),
        (0.15, lambda n, rng: numeric(world, n, rng)),
    ]


def draw(mixture: Mixture, rows: int, rng: torch.Generator) -> Batch:
    """Return a batch of `rows` rows with the mixture's shares, rounded; the first task takes the remainder."""
    counts = [int(round(rows * share)) for share, _ in mixture]
    counts[0] += rows - sum(counts)
    return Batch.cat([make(n, rng) for n, (_, make) in zip(counts, mixture, strict=True) if n > 0])
