"""Do wrong rationales help? Plain LoRA against NAT and NCE on additions whose wrong rationales all drop their carries.

A tiny Llama is pre-trained on an unreliable source: worked additions, a share of which drops every carry. Then each
method of `calm_fast.nat` adapts it on few questions, with the same questions, steps, rank and learning rate, and it is
asked held-out questions. Every seed draws its own base model, questions and initial weights.

    python -m calm_fast.experiments.wrong_rationales --seeds 0 1 2 3 4 --out DIR
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from calm_fast import nat
from calm_fast._version import versions
from calm_fast.consistency.answers.equality import equivalent
from calm_fast.consistency.answers.extraction import extract_answer
from calm_fast.core.files import write_json
from calm_fast.core.progress import progress_bar
from calm_fast.experiments.intervals import interval
from calm_fast.hf.dual_lora import get_gates, record_gates
from calm_fast.hf.dual_lora_files import save_lora_adapter
from calm_fast.modules.fixed_weights import fixed_weights
from calm_fast.nat.data import Example, RationaleDataset, RightPadding

ARMS = ("base", "negative", "lora", "lora_long", "nat", "nce")
COMPARED = (("nat", "lora"), ("nce", "lora"), ("nat", "lora_long"), ("nce", "lora_long"))
_VOCABULARY = ("<pad>", "<eos>", "\n", *"0123456789+=, }?", "\\boxed{")
Pair = tuple[int, int]


@dataclass(frozen=True)
class Recipe:
    """Every number of the experiment. dropped: share of the pre-training documents that drop every carry."""

    digits: int = 3
    pretrain_digits: tuple[int, ...] = (1, 2, 3)
    dropped: float = 0.5
    pretrain_steps: int = 300
    pretrain_rows: int = 48
    pretrain_rate: float = 3e-3
    width: int = 64
    layers: int = 2
    questions: int = 200
    held_out: int = 300
    settings: nat.Settings = nat.Settings(
        steps=200, batch_size=16, learning_rate=5e-3, warmup=10, rank=4, alpha=8.0, gate_dim=32, value_dim=32,
        save_every=0, progress=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Split:
    """Questions of one seed: rows with right and wrong rationales to learn from, and held-out pairs of numbers."""

    rows: list[dict[str, Any]]
    held_out: list[Pair]


def question(pair: Pair) -> str:
    """Return the text of a question."""
    return f"{pair[0]}+{pair[1]}?"


def rationale(pair: Pair, drop_carries: bool = False) -> str:
    """Return column sums from the right, then the boxed answer; `drop_carries` drops every carry."""
    columns = list(zip(reversed(str(pair[0])), reversed(str(pair[1])), strict=True))
    carry, parts, answer = 0, [], ""
    for x, y in columns:
        total = int(x) + int(y) + carry
        parts.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        answer = f"{total % 10}{answer}"
        carry = 0 if drop_carries else total // 10
    return f"{','.join(parts)} \\boxed{{{'1' if carry else ''}{answer}}}"


def draw_pair(digits: int, rng: random.Random) -> Pair:
    """Draw two numbers of `digits` digits."""
    low, high = (0 if digits == 1 else 10 ** (digits - 1)), 10**digits - 1
    return rng.randint(low, high), rng.randint(low, high)


def split(recipe: Recipe, seed: int) -> Split:
    """Draw rows to learn from and held-out questions, which are no rows in either order of their numbers."""
    rng = random.Random(f"questions {seed}")
    drawn: dict[frozenset[int], Pair] = {}
    while len(drawn) < recipe.questions + recipe.held_out:
        pair = draw_pair(recipe.digits, rng)
        drawn.setdefault(frozenset(pair), pair)
    pairs = list(drawn.values())
    rows = [
        {
            "question": question(pair),
            "answer": f"\\boxed{{{sum(pair)}}}",
            "generated_answer": [rationale(pair), rationale(pair, drop_carries=True)],
        }
        for pair in pairs[: recipe.questions]
    ]
    return Split(rows, pairs[recipe.questions :])


def pretraining_examples(recipe: Recipe, held_out: Sequence[Pair], count: int, rng: random.Random) -> list[Example]:
    """Draw documents of the unreliable source, without held-out questions."""
    forbidden = {frozenset(pair) for pair in held_out}
    examples: list[Example] = []
    while len(examples) < count:
        pair = draw_pair(rng.choice(recipe.pretrain_digits), rng)
        if frozenset(pair) not in forbidden:
            examples.append(Example(question(pair), rationale(pair, rng.random() < recipe.dropped)))
    return examples


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each character, and one for the beginning of a box."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_VOCABULARY)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def pretrain(recipe: Recipe, held_out: Sequence[Pair], tokenizer: Any, seed: int) -> LlamaForCausalLM:
    """Train the base model of this seed: a new batch of documents at every step, cosine decay of the rate."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(_VOCABULARY), hidden_size=recipe.width, intermediate_size=4 * recipe.width,
        num_hidden_layers=recipe.layers, num_attention_heads=4, max_position_embeddings=128,
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model, rng, collate = LlamaForCausalLM(config), random.Random(f"pre-training {seed}"), RightPadding(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.pretrain_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = transformers.get_cosine_schedule_with_warmup(
        optimizer, min(50, recipe.pretrain_steps // 4), recipe.pretrain_steps
    )
    for _ in range(recipe.pretrain_steps):
        examples = pretraining_examples(recipe, held_out, recipe.pretrain_rows, rng)
        model(**collate(RationaleDataset(examples, tokenizer).items), use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def answers(model: LlamaForCausalLM, pairs: Sequence[Pair], tokenizer: Any) -> list[str | None]:
    """Return the final answers that the model generates greedily."""
    # all questions have the same number of digits, so that a batch needs no padding
    ids = torch.tensor([tokenizer(f"{question(pair)}\n")["input_ids"] for pair in pairs], device=model.device)
    longest = len(tokenizer(rationale((10 ** len(str(pairs[0][0])) - 1,) * 2))["input_ids"])
    with fixed_weights(model):
        written = model.eval().generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest + 2, do_sample=False
        )
    texts = [
        "".join(tokenizer.convert_ids_to_tokens(row, skip_special_tokens=True)) for row in written[:, ids.shape[1] :]
    ]
    return [extract_answer(text) for text in texts]


def accuracy(model: LlamaForCausalLM, pairs: Sequence[Pair], tokenizer: Any) -> float:
    """Return the percentage of questions whose final answer is right."""
    found = answers(model, pairs, tokenizer)
    return 100 * sum(equivalent(a, str(sum(pair))) for a, pair in zip(found, pairs, strict=True)) / len(pairs)


def run_seed(recipe: Recipe, seed: int) -> dict[str, Any]:
    """Train the base model and every method of one seed, and return held-out accuracies, gates and example counts."""
    tokenizer, data = make_tokenizer(), split(recipe, seed)
    base = pretrain(recipe, data.held_out, tokenizer, seed)
    right, wrong = (RationaleDataset(side, tokenizer) for side in nat.split_rationales(data.rows, progress=False))
    settings = replace(recipe.settings, seed=seed)

    def score(model: LlamaForCausalLM) -> float:
        return accuracy(model, data.held_out, tokenizer)

    scores = {"base": score(base)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for arm, factor in (("lora", 1), ("lora_long", 3)):
            model = copy.deepcopy(base)
            nat.plain_lora(model, right, 0, out / arm, replace(settings, steps=factor * settings.steps))
            scores[arm] = score(model)
        model = copy.deepcopy(base)
        nat.train_negative(model, wrong, 0, out / "negative", settings)
        scores["negative"] = score(model)
        save_lora_adapter(model, out / "adapter", "neg")
        teacher = copy.deepcopy(base)
        nat.train_nat(teacher, right, out / "adapter", 0, out / "nat", settings)
        record_gates(teacher)
        scores["nat"] = score(teacher)
        gates = {path: {"mean": g.mean, "std": g.std} for path, g in get_gates(teacher).items()}
        record_gates(teacher, False)
        student, _ = nat.distil_nce(teacher, right, 0, out / "nce", settings)
        scores["nce"] = score(cast(LlamaForCausalLM, student))
    return {
        "accuracy": {arm: scores[arm] for arm in ARMS},
        "gates": gates,
        "examples": {"right": len(right), "wrong": len(wrong)},
    }


def summarise(recipe: Recipe, seeds: Sequence[int], runs: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Return the content of results.json from the runs of the first len(runs) seeds."""
    scores = {arm: [r["accuracy"][arm] for r in runs] for arm in ARMS}
    differences = {f"{a} - {b}": [x - y for x, y in zip(scores[a], scores[b], strict=True)] for a, b in COMPARED}
    return {
        "accuracy": {arm: interval(values) | {"seeds": values} for arm, values in scores.items()},
        "difference": {pair: interval(values) | {"seeds": values} for pair, values in differences.items()},
        "gates": [r["gates"] for r in runs],
        "examples": [r["examples"] for r in runs],
        "seeds": list(seeds[: len(runs)]),
        "cpu_seconds": round(seconds, 1),
        "recipe": asdict(recipe),
        "machine": f"{platform.machine()}, {platform.system()}, 1 thread",
        "versions": versions(),
    }


def run(
    out: str | os.PathLike[str],
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    recipe: Recipe | None = None,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Run the experiment over `seeds` on one thread; write results.json to `out` after every seed and return it.

    Raises:
        ValueError: there is no seed, or one occurs twice.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"wrong_rationales: `seeds` must be different integers, at least one, got {list(seeds)}")
    recipe, out, runs = recipe or Recipe(), Path(out), []
    out.mkdir(parents=True, exist_ok=True)
    threads, start = torch.get_num_threads(), time.process_time()
    torch.set_num_threads(1)  # the same numbers for any number of cores
    try:
        with torch.random.fork_rng(devices=[]):
            for seed in progress_bar(seeds, desc="wrong rationales", unit="seed", shown=progress):
                runs.append(run_seed(recipe, seed))
                results = json.loads(json.dumps(summarise(recipe, seeds, runs, time.process_time() - start)))
                write_json(out / "results.json", results)
    finally:
        torch.set_num_threads(threads)
    return results


def table(results: dict[str, Any]) -> str:
    """Return means and intervals as Markdown."""
    lines = ["| | mean | 95 % interval | per seed |", "|---|---|---|---|"]
    for part in ("accuracy", "difference"):
        for name, row in results[part].items():
            bounds = "-" if row["low"] is None else f"[{row['low']:.1f}, {row['high']:.1f}]"
            seeds = ", ".join(f"{value:.1f}" for value in row["seeds"])
            lines.append(f"| {name} | {row['mean']:.1f} | {bounds} | {seeds} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m calm_fast.experiments.wrong_rationales", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("wrong_rationales_out"))
    options = parser.parse_args(arguments)
    results = run(options.out, options.seeds)
    print(table(results))
    print(f"{results['cpu_seconds']:.0f} CPU-seconds; wrote {options.out / 'results.json'}")


if __name__ == "__main__":
    main()
