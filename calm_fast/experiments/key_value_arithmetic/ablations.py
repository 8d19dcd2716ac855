"""What makes the composition work: the key-value arithmetic experiment with one part changed at a time.

The rows follow CALM's table of ablations (arXiv 2401.02412, Table 5: an augmenter that did not learn the
new data, one with random weights, one that reads the prompt only, LoRA of equal size), and add which layers are
connected, and how many, and an encoder as augmenter. All variants of a seed share A, B, the batches of the
composition's training and the rows of the evaluation. A finished variant is read from its file.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from calm_fast._version import versions
from calm_fast.core.checks import bad_value
from calm_fast.core.files import atomic_path, claim, write_json, write_text
from calm_fast.experiments.intervals import interval
from calm_fast.experiments.key_value_arithmetic import ablations_report
from calm_fast.experiments.key_value_arithmetic.data import World, mixture_composition
from calm_fast.experiments.key_value_arithmetic.encoder import mixture_encoder, naming_loss, tiny_bert
from calm_fast.experiments.key_value_arithmetic.evaluation import accuracies
from calm_fast.experiments.key_value_arithmetic.parts import Bars, bars, compose_parts, one_thread, train_parts
from calm_fast.experiments.key_value_arithmetic.training import (
    Causal,
    Recipe,
    Schedule,
    add_tokens,
    seeds,
    tiny_llama,
    token_world,
    train,
)

_WHERE = "ablations.run"
MAIN = "kv_arithmetic"  # the task whose difference to the standard composition is reported
# a world that is learned in seconds instead of minutes; half of the keys train the composition
SMALL = Recipe(
    keys=200,
    max_value=9,
    train_fraction=0.5,
    width=32,
    a=Schedule(steps=300, rows=64, weight_decay=0.01, rate=5e-3, warmup=20),
    b=Schedule(steps=400, rows=64, weight_decay=0.01, rate=5e-3, warmup=20),
    encoder=Schedule(steps=300, rows=64, weight_decay=0.01, rate=5e-3, warmup=20),
    composition=Schedule(steps=500, rows=64, weight_decay=0.01, rate=5e-3, warmup=20),
    eval_rows=1000,
)


@dataclass(frozen=True)
class Variant:
    """A model to train on the composition's data.

    augmenter: "A", "random" (A before its training), "B" (a copy of the anchor), "encoder" (a BERT that knows keys), or
    "" for LoRA on the anchor alone. connections: (augmenter layer, anchor layer). lora: kinds of layers that get an
    adapter, "linear" and "embedding". reads: how a bidirectional augmenter reads, "prompt" or "reencode".
    """

    title: str
    augmenter: str = ""
    connections: tuple[tuple[int, int], ...] = ()
    lora: tuple[str, ...] = ()
    reads: str | None = None


@dataclass
class Parts:
    """What all variants of a seed share. initial: A's weights before its training. encoder: None if no variant asks."""

    world: World
    a: Causal
    b: Causal
    initial: Causal
    alone: dict[str, Any] = field(default_factory=dict)
    encoder: Any = None


def variants(recipe: Recipe) -> dict[str, Variant]:
    """Return the variants by name, in the order in which they run."""
    last, standard = recipe.layers - 1, recipe.connections
    return {
        "standard": Variant(f"standard: A, {len(standard)} connections", "A", standard),
        "random": Variant("augmenter with random weights", "random", standard),
        "anchor": Variant("the anchor as its own augmenter", "B", standard),
        "lora": Variant("LoRA on B's linear layers", lora=("linear",)),
        "lora-keys": Variant("LoRA on B's linear layers and embedding", lora=("linear", "embedding")),
        "last-layer": Variant("last layers only", "A", ((last, last),)),
        "connections-1": Variant("1 connection, at the embedding", "A", ((last, -1),)),
        "connections-2": Variant("2 connections", "A", ((last, -1), (last, 0))),
        "connections-5": Variant(f"{len(standard) + 2} connections", "A", (*standard, (0, -1), (0, 0))),
        "prompt-only": Variant("A reads the prompt only", "A", standard, reads="prompt"),
        "encoder-prompt": Variant("BERT reads the prompt", "encoder", standard, reads="prompt"),
        "encoder-reencode": Variant("BERT re-encodes at every token", "encoder", standard, reads="reencode"),
    }


def trainable(model: torch.nn.Module) -> int:
    """Return the number of parameters that train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def with_lora(model: Causal, kinds: Sequence[str], parameters: int, seed: int) -> Causal:
    """Return a copy of `model` with PEFT's LoRA on its linear layers but the head, or also on its embedding.

    The rank is the one that comes nearest to `parameters` trainable parameters; the scale alpha / rank is 2. An adapter
    on the embedding gives each key a vector of its own, which B does not have: only with it can LoRA tell keys apart.
    """
    from peft import LoraConfig, inject_adapter_in_model

    model = copy.deepcopy(model)
    head, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
    sizes = [m.in_features + m.out_features for _, m in linear]
    names = [name for name, _ in linear]
    if "embedding" in kinds:
        sizes.append(sum(cast(torch.nn.Embedding, inputs).weight.shape))
        names += [name for name, m in model.named_modules() if m is inputs]
    rank = max(1, round(parameters / sum(sizes)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
        return cast(Causal, inject_adapter_in_model(config, model))


def build(variant: Variant, parts: Parts, recipe: Recipe, seed: int) -> Causal:
    """Return the untrained model of a variant, with gradients for its new parameters only."""
    if not variant.lora:
        known = {"A": parts.a, "random": parts.initial, "B": parts.b, "encoder": parts.encoder}
        augmenter: Any = known[variant.augmenter]
        if augmenter is parts.b:
            augmenter = copy.deepcopy(augmenter)
        return compose_parts(recipe, seed, parts.b, augmenter, variant.connections, variant.reads)
    size = trainable(compose_parts(recipe, seed, parts.b, parts.a, recipe.connections))
    return with_lora(parts.b, variant.lora, size, seeds(seed)["init_ab"])


def shared_parts(recipe: Recipe, seed: int, folder: Path, bar: Bars) -> Parts:
    """Train A and B and keep them in `folder`, or read them from there."""
    streams, world = seeds(seed), token_world(recipe, seed)
    weights, record = folder / "parts.safetensors", folder / "alone.json"
    initial = tiny_llama(recipe, world.vocab_size, streams["init_a"])
    if not record.is_file():  # written last
        start = time.process_time()
        world, models, _ = train_parts(recipe, seed, bar)
        state = {f"{name}.{key}": value for name, m in models.items() for key, value in m.state_dict().items()}
        with atomic_path(weights) as partial:
            save_file(state, partial)
        scores = {name: score(model, world, recipe, seed) for name, model in models.items()}
        write_json(record, {"accuracy": scores, "cpu_seconds": round(time.process_time() - start, 1)})
    state = load_file(weights)
    a = tiny_llama(recipe, world.vocab_size, streams["init_a"])
    b = tiny_llama(recipe, world.key_offset, streams["init_b"])
    add_tokens(b, world.vocab_size)
    for name, model in (("A", a), ("B", b)):
        prefix = f"{name}."
        model.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        model.eval()
    return Parts(world, a, b, initial.eval(), json.loads(record.read_text(encoding="utf-8")))


def shared_encoder(recipe: Recipe, seed: int, folder: Path, world: World, bar: Bars) -> Any:
    """Train the encoder and keep it in `folder`, or read it from there."""
    streams, weights = seeds(seed), folder / "encoder.safetensors"
    model = tiny_bert(recipe, world.vocab_size, streams["init_a"])
    if weights.is_file():
        model.load_state_dict(load_file(weights))
        return model.eval()
    progress = bar("BERT: keys to values", 0)
    train(model, mixture_encoder(world), recipe.encoder, streams["train_a"], progress, naming_loss)
    with atomic_path(weights) as partial:
        save_file(model.state_dict(), partial)
    return model


def score(model: Causal, world: World, recipe: Recipe, seed: int) -> dict[str, float]:
    """Return percentages of exact answers: the demo's three tasks on unseen keys, two of them on training keys too."""
    rows, stream = recipe.eval_rows, seeds(seed)["eval"]
    unseen = accuracies({"it": model}, world, world.unseen_keys, rows, stream)
    trained = accuracies({"it": model}, world, world.train_keys, rows, stream)
    known = {f"{task}_training_keys": trained[task]["it"] for task in ("substitution", MAIN)}
    return {task: cell["it"] for task, cell in unseen.items()} | known


def train_variant(variant: Variant, parts: Parts, recipe: Recipe, seed: int, bar: Bars) -> dict[str, Any]:
    """Train and score one variant; return the content of its file."""
    start, stream = time.process_time(), seeds(seed)["train_ab"]
    model = build(variant, parts, recipe, seed)
    progress = bar(f"seed {seed}: {variant.title}"[:40], 0)
    losses = train(model, mixture_composition(parts.world), recipe.composition, stream, progress)
    tail = losses[-100:]
    return {
        "variant": asdict(variant),
        "parameters": trainable(model),
        "accuracy": score(model, parts.world, recipe, seed),
        "loss": sum(tail) / len(tail),
        "cpu_seconds": round(time.process_time() - start, 1),
        "versions": versions(),
    }


def _finished(folder: Path, known: dict[str, Variant]) -> dict[str, Any]:
    """Return the records of all finished variants in the folder of a seed."""
    records = {}
    for name, variant in known.items():
        file = folder / f"{name}.json"
        if file.is_file():
            records[name] = json.loads(file.read_text(encoding="utf-8"))
            if records[name]["variant"] != json.loads(json.dumps(asdict(variant))):
                expected = f"a folder whose {folder.name}/{file.name} is of today's definition of {name}"
                raise bad_value(_WHERE, "out_dir", expected, "that of another definition; remove the file")
    return records


def summarise(
    recipe: Recipe, known: dict[str, Variant], runs: dict[int, dict[str, Any]], alone: dict[int, Any]
) -> dict[str, Any]:
    """Return the content of results.json.

    runs: seed -> variant -> its record. alone: seed -> record of A and B. Each cell has mean, low and high (95 %
    t-interval over seeds, None for one seed), and the value of each seed. difference: to the standard composition in
    key-value arithmetic on unseen keys, paired by seed.
    """

    def cell(values: dict[int, float]) -> dict[str, Any]:
        return interval(list(values.values())) | {"seeds": {str(s): round(v, 4) for s, v in values.items()}}

    rows = {}
    for name, variant in known.items():
        done = {seed: records[name] for seed, records in runs.items() if name in records}
        if not done:
            continue
        tasks = next(iter(done.values()))["accuracy"]
        row: dict[str, Any] = {"variant": asdict(variant), "parameters": next(iter(done.values()))["parameters"]}
        row["accuracy"] = {task: cell({s: r["accuracy"][task] for s, r in done.items()}) for task in tasks}
        row["loss"] = cell({s: r["loss"] for s, r in done.items()})
        paired = [s for s in done if "standard" in runs[s]]
        if name != "standard" and paired:
            values = {s: done[s]["accuracy"][MAIN] - runs[s]["standard"]["accuracy"][MAIN] for s in paired}
            row["difference"] = cell(values)
        row["cpu_seconds"] = {str(s): r["cpu_seconds"] for s, r in done.items()}
        row["versions"] = {str(s): r["versions"] for s, r in done.items()}
        rows[name] = row
    parts = {
        name: {task: cell({s: r["accuracy"][name][task] for s, r in alone.items()}) for task in first}
        for name, first in next(iter(alone.values()))["accuracy"].items()
    }
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, 1 thread"
    return {"variants": rows, "alone": parts, "seeds": list(alone), "recipe": asdict(recipe), "machine": machine}


def _check(seeds_: Sequence[int], names: Sequence[str], known: Sequence[str]) -> None:
    if not seeds_ or len(set(seeds_)) != len(seeds_) or min(seeds_) < 0:
        raise bad_value(_WHERE, "seeds", "different non-negative ints, at least one", str(list(seeds_)))
    if not names or len(set(names)) != len(names) or not set(names) <= set(known):
        raise bad_value(_WHERE, "variants", f"different ones of {', '.join(known)}", ", ".join(names) or "none")


def _check_peft(chosen: dict[str, Variant]) -> None:
    if any(variant.lora for variant in chosen.values()):
        try:
            import peft  # noqa: F401
        except ImportError as problem:
            raise ImportError(
                f"{_WHERE}: the variants lora and lora-keys need PEFT: pip install 'calm-fast[ablations]', or leave "
                "them out of `variants`"
            ) from problem


def run(
    out_dir: str | os.PathLike[str],
    seeds: Sequence[int] = (0, 1, 2),
    names: Sequence[str] | None = None,
    *,
    recipe: Recipe | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train and score variants for every seed; write results.json, ablations.md and ablations.html after each of them.

    All files are in `out_dir`, with a folder for each seed that keeps A, B and the finished variants. A second call
    trains only what is missing, and may name other seeds and variants. The tables hold all finished variants of the
    seeds of the call.

    Args:
        seeds: as in `key_value_arithmetic.run`: all that is drawn. All variants of a seed run before the next seed.
        names: names of `variants()`; default, all.
        recipe: the numbers of the experiment; `recipe.composition` is the schedule of every variant.
        progress: show progress bars and the table on the terminal.
    Returns:
        the content of results.json, see `summarise`.
    Raises:
        ValueError: seeds or names that are unknown or occur twice, or a folder of another recipe.
        ImportError: PEFT is missing and a variant needs it.
    """
    recipe = Recipe() if recipe is None else recipe
    known = variants(recipe)
    _check(seeds, list(known) if names is None else names, list(known))
    chosen = {name: variant for name, variant in known.items() if names is None or name in names}
    _check_peft(chosen)
    out, console, bar = Path(out_dir), Console(quiet=not progress), bars(progress)
    out.mkdir(parents=True, exist_ok=True)
    claim(out / "settings.json", asdict(recipe), "ablations", f"{_WHERE}: `out_dir`")
    runs: dict[int, dict[str, Any]] = {}
    alone: dict[int, Any] = {}
    with one_thread():
        for seed in seeds:
            folder = out / f"seed_{seed}"
            folder.mkdir(exist_ok=True)
            parts = shared_parts(recipe, seed, folder, bar)
            if any(variant.augmenter == "encoder" for variant in chosen.values()):
                parts.encoder = shared_encoder(recipe, seed, folder, parts.world, bar)
            alone[seed] = parts.alone
            for name, variant in chosen.items():
                file = folder / f"{name}.json"
                if not file.is_file():
                    write_json(file, train_variant(variant, parts, recipe, seed, bar))
                runs[seed] = _finished(folder, known)
                results: dict[str, Any] = json.loads(json.dumps(summarise(recipe, known, runs, alone)))
                write_json(out / "results.json", results)
                write_text(out / "ablations.md", ablations_report.markdown(results))
                write_text(out / "ablations.html", ablations_report.html(results))
    ablations_report.print_table(results, console)
    console.print(f"wrote results.json, ablations.md and ablations.html to {out}")
    return results
