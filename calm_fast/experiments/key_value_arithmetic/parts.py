"""A, B and the composition of one seed: how each is made and trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

import calm_fast
from calm_fast import ComposedForCausalLM
from calm_fast.core.progress import progress_bar
from calm_fast.experiments.key_value_arithmetic.data import World, mixture_a, mixture_b, mixture_composition
from calm_fast.experiments.key_value_arithmetic.training import (
    Causal,
    Recipe,
    add_tokens,
    seeds,
    tiny_llama,
    token_world,
    train,
)

Bars = Callable[[str, int], Callable[[range], Any]]


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: matrices this small gain little from two, and lose much on a busy machine.

    The numbers of a seed also become independent of the machine's number of cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train_alone(*args: Any) -> list[float]:
    """Run train() on one torch thread. Each Python thread has its own thread count, so it is set here."""
    with one_thread():
        return train(*args)


def bars(enabled: bool) -> Bars:
    """Return a function of (title, line) that gives a progress bar for the steps of one training."""

    def bar(title: str, line: int) -> Callable[[range], Any]:
        options = {"desc": f"{title:<18}", "position": line, "mininterval": 0.5, "unit": "step"}
        return lambda steps: progress_bar(steps, shown=enabled, **options)

    return bar


def train_parts(recipe: Recipe, seed: int, bar: Bars) -> tuple[World, dict[str, Causal], dict[str, list[float]]]:
    """Train A and B at the same time; return the world of keys, the models, and their losses."""
    streams, world = seeds(seed), token_world(recipe, seed)
    a = tiny_llama(recipe, world.vocab_size, streams["init_a"])
    b = tiny_llama(recipe, world.key_offset, streams["init_b"])  # B's own vocabulary: everything but keys
    jobs = {
        "A": (a, mixture_a(world), recipe.a, streams["train_a"], bar("A: keys to values", 0)),
        "B": (b, mixture_b(world), recipe.b, streams["train_b"], bar("B: arithmetic", 1)),
    }
    with ThreadPoolExecutor(len(jobs)) as pool:
        running = {name: pool.submit(_train_alone, *job) for name, job in jobs.items()}
        losses = {name: job.result() for name, job in running.items()}
    add_tokens(b, world.vocab_size)
    return world, {"A": a, "B": b}, losses


def compose_parts(
    recipe: Recipe,
    seed: int,
    anchor: Causal,
    augmenter: Any,
    connections: Sequence[tuple[int, int]],
    reads: str | None = None,
) -> ComposedForCausalLM:
    """Compose two models with the public API; the new weights are drawn from the seed. reads: see `bidirectional`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds(seed)["init_ab"])
        links = list(connections)
        composed = calm_fast.compose(anchor, augmenter, links, num_heads=recipe.heads, bidirectional=reads)
    assert isinstance(composed, ComposedForCausalLM)  # the anchor is a causal LM
    return composed


def train_composition(
    recipe: Recipe, seed: int, world: World, parts: dict[str, Causal], bar: Bars
) -> tuple[Causal, list[float]]:
    """Compose A and B and train on `world.train_keys`; return the composition and its losses."""
    composed = compose_parts(recipe, seed, parts["B"], parts["A"], recipe.connections)
    mixture, progress = mixture_composition(world), bar("A+B: composition", 0)
    return composed, train(composed, mixture, recipe.composition, seeds(seed)["train_ab"], progress)
