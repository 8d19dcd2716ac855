"""The CALM key-value arithmetic experiment (arXiv 2401.02412, section 4.1) through the public API, end to end.

Read `data` (tasks), `training` (models, recipe), `parts` (A, B, A+B) and `evaluation`, then `run` here. `report` and
`speed` only present. `ablations` trains what the composition is compared with.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import calm_fast
from calm_fast._version import versions
from calm_fast.core.checks import bad_value
from calm_fast.core.files import write_json, write_text
from calm_fast.experiments.key_value_arithmetic import report, speed
from calm_fast.experiments.key_value_arithmetic.data import ROW
from calm_fast.experiments.key_value_arithmetic.evaluation import accuracies, examples
from calm_fast.experiments.key_value_arithmetic.parts import bars, one_thread, train_composition, train_parts
from calm_fast.experiments.key_value_arithmetic.training import Recipe, seeds

__all__ = ["Recipe", "run"]


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 2)


def _setup_rows(recipe: Recipe) -> list[tuple[str, str]]:
    tokens, size = ROW - 1, recipe.width // recipe.heads
    q = torch.empty(recipe.composition.rows, tokens, recipe.heads, size)
    return [
        ("composition's attention", str(calm_fast.explain("cross_attention", q, q, q, causal=True))),
        (
            "shape of one training batch",
            f"{q.shape[0]} rows x {tokens} tokens, {recipe.heads} heads of {size}, float32",
        ),
        ("A and B", "transformers LlamaForCausalLM, trained at the same time on one thread each"),
        ("composition", "calm_fast.compose and torch's AdamW, one thread"),
        (
            "machine",
            f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}; everything runs on the CPU",
        ),
    ]


def _recipe_rows(recipe: Recipe) -> list[tuple[str, str]]:
    train_keys = round(recipe.keys * recipe.train_fraction)
    unseen = recipe.keys - train_keys
    runs = {"A": recipe.a, "B": recipe.b, "composition": recipe.composition}
    return [
        (
            "keys",
            f"{recipe.keys}, values 0 to {recipe.max_value}; {train_keys} in composition, {unseen} unseen",
        ),
        ("models", f"{recipe.layers}-layer Llama, width {recipe.width}, {recipe.heads} heads"),
        *((f"training of {name}", f"{s.steps} steps of {s.rows} rows") for name, s in runs.items()),
        (
            "connections (A's layer, B's layer)",
            ", ".join(map(str, recipe.connections)) + "; -1 = embedding output",
        ),
        (
            "evaluation",
            f"{recipe.eval_rows} rows of unseen keys per task, every answer token and the end exact",
        ),
    ]


def _write(out: Path, story: report.Story, console: Console) -> None:
    results = story.results
    write_json(out / "results.json", results, indent=2)
    write_text(out / "report.html", report.html(story))
    report.print_table(results["accuracy"], console)
    for m in story.speed:
        console.print(
            f"Composition layer, {m.case.name}: {m.ratio:.2f}x eager ({m.ours_ms:.1f} ms against {m.eager_ms:.1f} ms)"
        )
    console.print(f"{results['seconds']['total']:.0f} s; wrote {out / 'results.json'} and {out / 'report.html'}")


def run(
    out_dir: str | os.PathLike[str],
    seed: int = 0,
    *,
    recipe: Recipe | None = None,
    progress: bool = True,
    measure_speed: bool = True,
) -> dict[str, Any]:
    """Train A, B and their composition, evaluate all three, write results.json and report.html to `out_dir`.

    Args:
        seed: decides keys, values, the split, every initial weight and every batch. On one machine with one torch
            version, the same seed gives the same losses and accuracies.
        recipe: the numbers of the experiment; default, `Recipe()`.
        progress: show progress bars and the table on the terminal.
        measure_speed: time the composition layer for the report.
    Returns:
        the content of results.json: {"accuracy": {task: {"A", "B", "AB"}} in percent, "seconds", "seed", "versions"}.
    Raises:
        ValueError: `seed` is negative.
    """
    if seed < 0:
        raise bad_value("key_value_arithmetic.run", "seed", "a non-negative int", str(seed))
    recipe = Recipe() if recipe is None else recipe
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    console, bar = Console(quiet=not progress), bars(progress)
    seconds: dict[str, float] = {}

    with one_thread(), _timed(seconds, "total"):
        console.print(f"Key-value arithmetic, seed {seed}: training A (keys) and B (numbers) at the same time")
        with _timed(seconds, "train_a_and_b"):
            world, models, losses = train_parts(recipe, seed, bar)
        trained, links = len(world.train_keys), len(recipe.connections)
        console.print(f"Composing: A and B are frozen, {links} connections train on {trained} of {recipe.keys} keys")
        with _timed(seconds, "train_composition"):
            models["AB"], losses["A+B"] = train_composition(recipe, seed, world, models, bar)
        stream = seeds(seed)["eval"]
        with _timed(seconds, "evaluate"):
            accuracy = accuracies(models, world, world.unseen_keys, recipe.eval_rows, stream)
            shown = examples(models["AB"], world, world.unseen_keys, stream)
        with _timed(seconds, "measure_speed"):
            measured = [speed.measure(case) for case in speed.CASES] if measure_speed else []

    results = {"accuracy": accuracy, "seconds": seconds, "seed": seed, "versions": versions()}
    _write(out, report.Story(results, losses, _setup_rows(recipe), shown, measured, _recipe_rows(recipe)), console)
    return results
