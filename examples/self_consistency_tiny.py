"""Self-consistency on a tiny model, end to end: sample, score, vote, resume, and vote again over the written file.

A character-level Llama learns in seconds to add digits, with the steps written out, from examples of which some are
wrong. A vote over its samples is right more often than a single sample. Nothing is downloaded; to use a real model,
load it and its tokenizer instead. It takes a quarter of a minute on one CPU core.

    python examples/self_consistency_tiny.py
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from calm_fast import SelfConsistency, score_sequences

LETTERS = "0123456789+=?, \\boxed{}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *dict.fromkeys(LETTERS)])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    letters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>")


def rationale(a: int, b: int, c: int, slip: int = 0) -> str:
    """Return the text of both sums; `slip` is an error in the first one."""
    first = a + b + slip
    return f"{a}+{b}={first}, {first}+{c}={first + c} \\boxed{{{first + c}}}"


def train(tokenizer: PreTrainedTokenizerFast, steps: int, rng: random.Random) -> LlamaForCausalLM:
    """Train a model on the next tokens of rationales, three in ten of which have a slip."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        texts = []
        for _ in range(32):
            numbers = [rng.randint(0, 5) for _ in range(3)]
            slip = rng.choice((1, 2, 3)) if rng.random() < 0.3 else 0
            texts.append(f"{numbers[0]}+{numbers[1]}+{numbers[2]}?" + rationale(*numbers, slip) + "<eos>")
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"trained: loss {loss.item():.3f} after {steps} steps")
    return model.eval()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="training steps (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=40, help="how many to ask (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # matrices this small are slower with more
    rng, tokenizer = random.Random(0), make_tokenizer()
    model = train(tokenizer, options.steps, rng)

    numbers = [[rng.randint(0, 5) for _ in range(3)] for _ in range(options.questions)]
    questions = [f"{a}+{b}+{c}?" for a, b, c in numbers]
    answers = [str(sum(row)) for row in numbers]
    # the model continues a question itself; the default would put a newline behind it
    settings = {"max_new_tokens": 32, "temperature": 1.0, "prompt": "{question}", "progress": False}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "samples.jsonl"
        run = SelfConsistency(model, tokenizer, n=16, **settings)
        run(questions[: options.questions // 2], answers[: options.questions // 2], out=out)
        results = run(questions, answers, out=out)  # resumes after the questions in the file

        print(f"{results[0].question} -> {results[0].answer}   " + "   ".join(results[0].rationales[:3]))
        single = sum(float(r.answers[0] == r.reference) for r in results) / len(results)
        accuracy = sum(r.credit for r in results) / len(results)
        print(f"first sample {single:.2f}, adaptive vote over 16 {accuracy:.2f}")

        count = SelfConsistency(rule="count", progress=False).from_samples(out)  # existing samples need no model
        print(f"plain majority over the same samples {sum(r.credit for r in count) / len(count):.2f}")

        early = SelfConsistency(model, tokenizer, n=16, confidence=0.9, **settings)(questions, answers)
        drawn = sum(len(r.rationales) for r in early) / len(early)
        print(f"stopping early: {drawn:.1f} samples a question, {sum(r.credit for r in early) / len(early):.2f}")

    (scores,) = score_sequences(
        model, [questions[0]], [[rationale(*numbers[0]), rationale(*numbers[0], slip=1)]], tokenizer=tokenizer
    )
    print(f"log-probability of the right rationale {scores.sum[0]:.2f}, of one with a slip {scores.sum[1]:.2f}")


if __name__ == "__main__":
    main()
