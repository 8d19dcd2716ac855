"""Time eight samples a question from SmolLM2-135M-Instruct: SelfConsistency beside transformers' generate.

    python examples/real_models/sampling.py [--repeats 3] [--threads 2]

Every sample has the same number of tokens (the end token is one that is never drawn), so times can be compared. The
methods take turns; a first round is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from convert import convert
from transformers import AutoModelForCausalLM, AutoTokenizer

from calm_fast import SelfConsistency

SAMPLES, NEW_TOKENS = 8, 64
NEVER_DRAWN = 5  # a token of SmolLM2's source code corpora
QUESTIONS = (
    "A baker sells 12 loaves in the morning and 9 in the afternoon. How many loaves is that?",
    "Tom has 3 boxes with 8 pencils each. How many pencils does he have?",
    "A train travels 60 miles in an hour. How far does it travel in 4 hours?",
    "There are 24 students in 4 equal groups. How many are in a group?",
    "Anna reads 15 pages a day. How many pages does she read in a week?",
    "A shirt costs 20 dollars and is sold for 25 percent less. What is its price now?",
    "Ben had 50 marbles, lost 13 and found 5. How many does he have now?",
    "A rectangle is 7 cm wide and 9 cm long. What is its area?",
    "Four friends share 36 apples equally. How many does each one get?",
    "A tank holds 100 litres and 40 percent of it is used. How many litres are left?",
)


def methods(model: Any, tokenizer: Any) -> dict[str, Callable[[], None]]:
    """Return each method by name. Each one draws SAMPLES samples of NEW_TOKENS tokens for every question."""
    run = SelfConsistency(
        model, tokenizer, n=SAMPLES, rule="count", max_new_tokens=NEW_TOKENS, temperature=0.7, prompt="chat"
    )
    turns = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [tokenizer.apply_chat_template(t, add_generation_prompt=True, tokenize=False) for t in turns]

    def ours() -> None:
        run(list(QUESTIONS))

    @torch.no_grad()
    def generate(texts: list[str]) -> None:
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        ids = model.generate(
            **batch, do_sample=True, temperature=0.7, top_k=0, num_return_sequences=SAMPLES, max_new_tokens=NEW_TOKENS
        )
        if ids.shape[1] - batch["input_ids"].shape[1] != NEW_TOKENS:
            raise RuntimeError("generate ended a sample early, so the times cannot be compared")

    def one_by_one() -> None:
        for prompt in prompts:
            generate([prompt])

    return {
        "SelfConsistency": ours,
        "generate, a question at a time": one_by_one,
        "generate, all questions in a batch": lambda: generate(prompts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = convert("smollm2", None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = NEVER_DRAWN, tokenizer.pad_token_id
    seconds: dict[str, list[float]] = {}
    for repeat in range(options.repeats + 1):
        for name, method in methods(model, tokenizer).items():
            begin = time.perf_counter()
            method()
            if repeat:
                seconds.setdefault(name, []).append(time.perf_counter() - begin)
    ours = seconds["SelfConsistency"]
    for name, theirs in seconds.items():
        ratios = ", ".join(f"{b / a:.2f}" for a, b in zip(ours, theirs, strict=True))
        print(f"{name}: median {statistics.median(theirs):.1f} s; time by that of SelfConsistency: {ratios}")


if __name__ == "__main__":
    main()
