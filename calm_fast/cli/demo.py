"""`calm-fast demo`: the key-value arithmetic experiment, and its ablations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calm_fast.cli.common import folder

_SEEDS = (0, 1, 2)


def demo(
    out: Annotated[
        Path,
        typer.Option(help="Folder for results.json and report.html; the ablations get a folder of their own in it."),
    ] = Path("demo_out"),
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of keys, weights and batches. Default: 0.")] = None,
    ablations: Annotated[
        bool, typer.Option("--ablations", help="Train what the composition is compared with, over --seeds; resumable.")
    ] = False,
    seeds: Annotated[str | None, typer.Option(help="With --ablations. Default: 0,1,2.")] = None,
    variants: Annotated[
        str | None, typer.Option(help="With --ablations: names separated by commas. Default: all of them.")
    ] = None,
    small: Annotated[
        bool,
        typer.Option("--small", help="With --ablations: 200 keys with values 0 to 9, in seconds for each variant."),
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="With --ablations: training steps of every variant. Default: 2500, with --small 500."),
    ] = None,
) -> None:
    """Compose two small language models end to end: key-value arithmetic on keys the composition never saw.

    Trains A (knows keys), B (knows numbers) and their composition, in about 4 minutes on 2 CPU cores. Prints the
    accuracies beside the paper's and writes results.json and report.html.

    With --ablations: the same with an augmenter of random weights, the anchor as its own augmenter, LoRA of equal size
    on the anchor, and other connections. Writes results.json, ablations.md and ablations.html into OUT/ablations, where
    a second call finds what is finished.
    """
    if not ablations:
        given = {"--seeds": seeds, "--variants": variants, "--small": small, "--steps": steps}
        for option, value in given.items():
            if value not in (None, False):
                raise typer.BadParameter("needs --ablations", param_hint=option)
        with folder(out):
            from calm_fast.experiments import key_value_arithmetic

            key_value_arithmetic.run(out, seed or 0)
        return
    if seed is not None:
        raise typer.BadParameter("is for one run; --ablations takes --seeds", param_hint="--seed")
    chosen = _SEEDS if seeds is None else _numbers(seeds)
    with folder(out / "ablations"):
        from dataclasses import replace

        from calm_fast.experiments.key_value_arithmetic import Recipe
        from calm_fast.experiments.key_value_arithmetic import ablations as experiment

        recipe = experiment.SMALL if small else Recipe()
        if steps is not None:
            recipe = replace(recipe, composition=replace(recipe.composition, steps=steps))
        try:
            names = None if variants is None else [name.strip() for name in variants.split(",")]
            experiment.run(out / "ablations", chosen, names, recipe=recipe)
        except ValueError as problem:
            raise typer.BadParameter(str(problem)) from problem


def _numbers(text: str) -> tuple[int, ...]:
    """Return the integers of a list like 0,1,2."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as problem:
        raise typer.BadParameter(
            f"must be integers separated by commas, got {text!r}", param_hint="--seeds"
        ) from problem
