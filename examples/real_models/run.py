"""Compose real models, and see whether the anchor answers what only the augmenter knows.

    python examples/real_models/run.py [--out DIR] [--seeds 0 1 2] [--anchors gemma3 smollm2]

1. SmolLM2-135M is taught made-up facts, as statements (facts.py). It is the augmenter.
2. An anchor that never sees a statement is composed with it: Gemma-3-270M, whose tokenizer is another one, or SmolLM2
   as it was before the teaching. Both models are frozen; the connections are trained on questions about some names.
3. A LoRA adapter of the same size is trained on the anchor alone, on the same rows in the same order.
4. Anchor, augmenter, LoRA and composition answer questions about the names held out.

Losses are in bits per byte of the answer, because tokens of two tokenizers cannot be compared. An answer is right if
every token of it, the full stop included, is the most likely one. DIR gets results.json and report.md.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from convert import convert
from facts import Row, World, make_world
from report import report
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import calm_fast
from calm_fast._version import versions
from calm_fast.hf import AlignedCollator, cache_augmenter_states

PAD = -100


@dataclass(frozen=True)
class Recipe:
    """The numbers of a run."""

    training_names: int = 400
    held_out_names: int = 120
    teaching_batch: int = 64
    teaching_steps: int = 300  # stops earlier, when the statements are known
    teaching_lr: float = 2e-3
    batch: int = 32
    steps: int = 150
    lr: float = 1e-3
    lora_lr: float = 5e-4
    connections: str = "uniform:5"
    dtype: str = "auto"  # of the products: bfloat16 where it is faster; weights that train are float32
    threads: int = 2


def fastest_dtype() -> str:
    """Return the dtype in which this CPU multiplies faster: some have no instruction for bfloat16."""
    seconds = {}
    for name in ("float32", "bfloat16"):
        x, weight = (torch.ones(size, dtype=getattr(torch, name)) for size in ((512, 576), (1536, 576)))
        functional.linear(x, weight)
        begin = time.perf_counter()
        for _ in range(3):
            functional.linear(x, weight)
        seconds[name] = time.perf_counter() - begin
    return min(seconds, key=lambda name: seconds[name])


def load(folder: Path, dtype: str) -> tuple[Any, Any]:
    """Return the frozen model and the tokenizer in a folder.

    Eager attention: on a CPU the backward pass of torch's fused attention costs more than all products of short rows.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.requires_grad_(False), AutoTokenizer.from_pretrained(folder)


def answers(model: Any, batch: dict[str, Any], dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss (B,) of the labelled tokens in nats, and whether all of them are the most likely (B,).

    Only the logits that predict them are made: the model's states enter the LM head at those tokens.
    """
    labels = batch["labels"][:, 1:]
    wanted = labels != PAD
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model  # LoRA's layers are inside
    with torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32"):
        states = whole.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1][wanted]
        logits = whole.get_output_embeddings()(states).float()
    rows, gold = wanted.nonzero()[:, 0], labels[wanted]
    none = torch.zeros(len(labels))
    loss = none.index_add(0, rows, functional.cross_entropy(logits, gold, reduction="none"))
    wrong = none.index_add(0, rows, (logits.argmax(-1) != gold).float())
    return loss, wrong == 0


@torch.no_grad()
def judge(model: Any, collate: Any, rows: list[Row], recipe: Recipe) -> dict[str, float]:
    """Return the loss in bits per byte of the answers, its standard error over rows, and how many answers are right."""
    model.eval()
    bits: list[float] = []
    right = 0
    for start in range(0, len(rows), recipe.batch):
        part = rows[start : start + recipe.batch]
        losses, good = answers(model, collate(part), recipe.dtype)
        sizes = [len(row["completion"].encode()) for row in part]
        bits += [loss / math.log(2) / size for loss, size in zip(losses.tolist(), sizes, strict=True)]
        right += int(good.sum())
    error = statistics.stdev(bits) / len(bits) ** 0.5 if len(bits) > 1 else 0.0
    return {"bits_per_byte": statistics.mean(bits), "standard_error": error, "right": right, "rows": len(rows)}


def batches(rows: list[Row], size: int, seed: int) -> Iterator[list[Row]]:
    """Yield batches for ever, each epoch in a new order."""
    chance = random.Random(seed)
    while True:
        order = rows[:]
        chance.shuffle(order)
        yield from (order[i : i + size] for i in range(0, len(order) - size + 1, size))


def train(
    model: Any, collate: Any, rows: list[Row], recipe: Recipe, steps: int, lr: float, seed: int, name: str
) -> dict[str, Any]:
    """Train the parameters that require gradients; return losses, steps and seconds.

    All but the composition's training, which goes on to generalise, ends once an epoch had at most one wrong answer in
    200: what is taught is known by heart then, and LoRA on the anchor has nothing else to learn.
    """
    begin = time.perf_counter()
    size = min(recipe.teaching_batch if name == "teaching" else recipe.batch, len(rows))
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr, weight_decay=0.01)
    warm_up = max(1, steps // 15)
    losses: list[float] = []
    wrong: list[int] = []
    step = 0
    for step, part in zip(range(1, steps + 1), batches(rows, size, seed), strict=False):
        scale = min(1.0, step / warm_up) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        model.train()
        loss, right = answers(model, collate(part), recipe.dtype)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.mean().item())
        wrong.append(int((~right).sum()))
        if step % 20 == 0 or step == 1:
            seconds = time.perf_counter() - begin
            print(f"  {name}: step {step} of {steps}, loss {losses[-1]:.3f}, {seconds:.0f} s", flush=True)
        epoch = -(-len(rows) // size)
        if name != "composition" and step >= epoch and sum(wrong[-epoch:]) * 200 <= len(rows):
            break
    return {"losses": losses, "steps": step, "seconds": time.perf_counter() - begin}


def teach(folder: Path, world: World, recipe: Recipe, seed: int, out: Path) -> dict[str, Any]:
    """Teach the model in `folder` the statements, and write it with its tokenizer into `out`.

    Only the MLPs of its second quarter are trained: facts are kept there, and later layers can still read them.
    """
    model, tokenizer = load(folder, recipe.dtype)
    depth = len(model.model.layers)
    for layer in model.model.layers[depth // 4 : depth // 2 + 1]:
        layer.mlp.float().requires_grad_(True)
    collate = AlignedCollator([None], tokenizer, add_eos=False)
    rows = world.statements()
    record = train(model, collate, rows, recipe, recipe.teaching_steps, recipe.teaching_lr, seed, "teaching")
    record["statements"] = judge(model, collate, rows, recipe)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return record


def with_lora(model: Any, parameters: int) -> Any:
    """Return `model` with a LoRA adapter on every linear layer but the head, of about so many parameters."""
    from peft import LoraConfig, get_peft_model

    head = model.get_output_embeddings()
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
    rank = max(1, round(parameters / sum(m.in_features + m.out_features for _, m in linear)))
    names = sorted({name.split(".")[-1] for name, _ in linear})
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names))


def trainable(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def samples(model: Any, tokenizer: Any, rows: list[Row], count: int = 6) -> list[dict[str, str]]:
    """Return greedy answers beside the true ones."""
    shown = []
    for row in rows[:count]:
        prompt = tokenizer(row["prompt"], return_tensors="pt")
        ids = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        shown.append({"prompt": row["prompt"], "answer": text, "true": row["completion"]})
    return shown


def one_anchor(name: str, anchor: Path, taught: Path, world: World, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Compose one anchor with the taught augmenter, train LoRA on it too, and return what was measured."""
    print(f" anchor {name}", flush=True)
    torch.manual_seed(seed)
    training, held_out = world.questions(world.training), world.questions(world.held_out)
    model, tokenizer = load(anchor, recipe.dtype)
    plain = AlignedCollator([None], tokenizer, add_eos=False)
    record: dict[str, Any] = {"seed": seed, "name": name, "anchor": judge(model, plain, held_out, recipe)}

    augmenter, augmenter_tokenizer = load(taught, recipe.dtype)
    composed = calm_fast.compose(model, augmenter, recipe.connections, dtype=torch.float32)
    own = AlignedCollator([None], augmenter_tokenizer, add_eos=False)
    record["augmenter"] = judge(augmenter, own, held_out, recipe)
    collate = AlignedCollator(composed, tokenizer, add_eos=False)
    record["parameters"] = {"composition": trainable(composed)}
    with tempfile.TemporaryDirectory() as folder:  # the augmenter is frozen: it reads each row once, not in every epoch
        sizes = {"batch_size": recipe.batch, "shard_rows": recipe.batch}
        cache = cache_augmenter_states(composed, training, folder, collate, **sizes, progress=False)
        cached = cache.collator(collate)
        record["composing"] = train(composed, cached, training, recipe, recipe.steps, recipe.lr, seed, "composition")
    record["composition"] = judge(composed, collate, held_out, recipe)
    record["composition_on_training_names"] = judge(composed, collate, training, recipe)
    record["samples"] = samples(composed, tokenizer, held_out)
    composed.save_pretrained(taught.parent / f"composed_{name}_{seed}")
    del composed, augmenter

    model, _ = load(anchor, recipe.dtype)  # a fresh one: the composition's hooks are on the other
    adapted = with_lora(model, record["parameters"]["composition"])
    record["parameters"]["lora"] = trainable(adapted)
    record["adapting"] = train(adapted, plain, training, recipe, recipe.steps, recipe.lora_lr, seed, "LoRA")
    record["lora"] = judge(adapted, plain, held_out, recipe)
    record["lora_on_training_names"] = judge(adapted, plain, training, recipe)
    return record


def run(anchors: dict[str, Path], augmenter: Path, out: Path, recipe: Recipe, seeds: list[int]) -> dict[str, Any]:
    """Run every anchor and seed, write results.json and report.md into `out`, and return the results."""
    begin = time.perf_counter()
    torch.set_num_threads(recipe.threads)
    if recipe.dtype == "auto":
        recipe = replace(recipe, dtype=fastest_dtype())
    out.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {recipe.threads} threads"
    results: dict[str, Any] = {"recipe": asdict(recipe), "versions": versions(), "machine": machine}
    results |= {"teaching": [], "runs": []}
    for seed in seeds:
        print(f"seed {seed}, products in {recipe.dtype}", flush=True)
        torch.manual_seed(seed)
        world = make_world(seed, recipe.training_names, recipe.held_out_names)
        taught = out / f"taught_{seed}"
        results["teaching"].append({"seed": seed, **teach(augmenter, world, recipe, seed, taught)})
        for name, anchor in anchors.items():
            results["runs"].append(one_anchor(name, anchor, taught, world, recipe, seed))
            results["seconds"] = time.perf_counter() - begin
            results["memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
            (out / "report.md").write_text(report(results))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("real_models_out"), help="folder of the results")
    parser.add_argument("--cache", type=Path, help="folder of the converted models; default, a cache of the user")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--anchors", nargs="+", choices=("gemma3", "smollm2"), default=["gemma3"])
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args())
    cache, out, seeds, anchors = (options.pop(name) for name in ("cache", "out", "seeds", "anchors"))
    folders = {name: convert(name, cache) for name in dict.fromkeys([*anchors, "smollm2"])}
    run({name: folders[name] for name in anchors}, folders["smollm2"], out, Recipe(**options), seeds)
    print((out / "report.md").read_text())


if __name__ == "__main__":
    main()
