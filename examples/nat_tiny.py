"""Learn from wrong rationales on a tiny model, in three stages: negative LoRA, NAT and NCE (arXiv 2312.12832).

A byte-level BPE tokenizer and a tiny Llama are made from the rows, so nothing is downloaded. To use a real model, load
it and its tokenizer instead, or run `calm-fast nat`. It takes a few minutes on two CPU cores.

    python examples/nat_tiny.py                    # ../shared/data beside the checkout
    python examples/nat_tiny.py --data FILE        # JSONL rows: question, answer, generated_answer (list)
    python examples/nat_tiny.py --generated        # additions made here
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from calm_fast import get_gates, nat, record_gates, save_dual_lora, save_lora_adapter
from calm_fast.nat.data import RightPadding

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "math_gpt35_dev.jsonl.gz"


def generated_rows(count: int, seed: int = 0) -> list[dict]:
    """Return additions, each with a right rationale and one that drops the carry."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        a, b = rng.randint(10, 49), rng.randint(10, 49)
        carry, units = divmod(a % 10 + b % 10, 10)
        tens = a // 10 + b // 10
        wrong, right = 10 * tens + units, 10 * (tens + carry) + units
        texts = [f"The units give {units}, the tens {x // 10}: \\boxed{{{x}}}." for x in (right, wrong)]
        rows.append({"question": f"What is {a} + {b}?", "answer": f"\\boxed{{{right}}}", "generated_answer": texts})
    return rows


def load_rows(options: argparse.Namespace) -> list[dict]:
    if options.generated:
        return generated_rows(options.limit, options.seed)
    if not options.data.is_file():
        sys.exit(
            f"nat_tiny: --data must be a file of rows, got {options.data}, which is not there. Pass --data FILE (JSONL "
            "rows with question, answer and generated_answer, .gz or plain), or --generated for additions made here."
        )
    return nat.read_rows(options.data, options.limit)


def train_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")


def pretrain(tokenizer: PreTrainedTokenizerFast, texts: list[str], steps: int, max_length: int) -> LlamaForCausalLM:
    """Train a tiny Llama on next-token prediction on random rows."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=2 * max_length, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    print(f"base: {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    items = [{"input_ids": ids, "labels": ids} for ids in tokenizer(texts)["input_ids"]]
    items = [{key: ids[:max_length] + [1] for key, ids in item.items()} for item in items]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98))
    for step in range(steps):
        batch = RightPadding(0)([items[i] for i in torch.randint(len(items), (8,))])
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, steps // 5) == 0 or step == steps - 1:
            print(f"pre-training step {step}: loss {loss.item():.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, data: nat.RationaleDataset) -> float:
    """Return the mean loss on right rationales of questions that no stage uses."""
    batches = [RightPadding(0)(data.items[i : i + 8]) for i in range(0, min(len(data), 64), 8)]
    losses = [model.eval()(**{key: t.to(model.device) for key, t in batch.items()}).loss for batch in batches]
    return torch.stack(losses).mean().item()


def show(stage: str, history: list[dict], start: float) -> None:
    """Print the first, middle and last logged loss."""
    picked = [history[i] for i in sorted({0, len(history) // 2, len(history) - 1})]
    curve = "  ".join(f"step {int(e['step'])}: {e['loss']:.3f}" for e in picked)
    print(f"{stage:9} loss  {curve}   ({time.perf_counter() - start:.0f} s so far)", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="JSONL rows, .gz or plain")
    parser.add_argument("--generated", action="store_true", help="use additions made here instead of a file")
    parser.add_argument("--limit", type=int, default=150, help="questions")
    parser.add_argument(
        "--steps", type=int, default=150, help="optimizer steps of each stage; pre-training takes twice as many"
    )
    parser.add_argument("--max-length", type=int, default=256, help="tokens of an example")
    parser.add_argument("--out", type=Path, help="folder to keep adapters and checkpoints in")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rows = load_rows(options)
    torch.manual_seed(options.seed)
    start = time.perf_counter()

    # 1. Rows: hold out the last tenth of the questions; split the rationales of the others into right and wrong ones.
    cut = max(1, len(rows) // 10)
    right, wrong = nat.split_rationales(rows[:-cut])
    unseen, _ = nat.split_rationales(rows[-cut:], progress=False)
    if not unseen:
        sys.exit("nat_tiny: --limit must leave a held-out question with a right rationale, got none; raise it")
    print(f"{len(rows)} questions: {len(right)} right and {len(wrong)} wrong rationales to learn from")

    # 2. A tokenizer and a base model.
    texts = [f"{e.question}\n{e.rationale}" for e in right + wrong]
    tokenizer = train_tokenizer(texts, 1500)
    base = pretrain(tokenizer, texts, 2 * options.steps, options.max_length)
    rights, wrongs, held_out = (
        nat.RationaleDataset(side, tokenizer, options.max_length) for side in (right, wrong, unseen)
    )
    settings = nat.Settings(
        steps=options.steps, warmup=min(20, options.steps // 5), learning_rate=2e-3, gate_dim=32, value_dim=32,
        save_every=0, seed=options.seed, progress=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        out = options.out or Path(scratch)
        base.save_pretrained(out / "base")
        tokenizer.save_pretrained(out / "base")

        # 3. Stage 1: train a negative LoRA on the wrong rationales, and save it as a PEFT adapter.
        model = LlamaForCausalLM.from_pretrained(out / "base")
        show("negative", nat.train_negative(model, wrongs, 0, out / "checkpoints" / "negative", settings), start)
        save_lora_adapter(model, out / "negative", "neg")

        # 4. Stage 2, NAT: train positive LoRA, gate and value on the right rationales over the frozen negative LoRA.
        teacher = LlamaForCausalLM.from_pretrained(out / "base")
        history = nat.train_nat(teacher, rights, out / "negative", 0, out / "checkpoints" / "nat", settings)
        show("NAT", history, start)
        save_dual_lora(teacher, out / "nat")

        # 5. Show the gate of each layer. The coefficient of the negative LoRA is p_neg - 1/2, so that the layer
        #    subtracts it below 1/2 and adds it above.
        record_gates(teacher)
        losses = {"base": held_out_loss(base, held_out), "NAT": held_out_loss(teacher, held_out)}
        for path, gate in get_gates(teacher).items():
            print(f"gate  {path:35} p_neg {gate.mean:.3f} +- {gate.std:.3f}  over {gate.tokens} tokens")
        record_gates(teacher, False)

        # 6. Stage 3, NCE: train one LoRA to imitate the NAT model, most of all where that differs from the negative.
        student, history = nat.distil_nce(teacher, rights, 0, out / "checkpoints" / "student", settings)
        show("NCE", history, start)
        save_lora_adapter(student, out / "student", "pos")
        losses["student"] = held_out_loss(student, held_out)

    print("held-out loss  " + "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
    if options.out:
        print(f"adapters are in {options.out}: negative/ and student/ (PEFT), nat/")


if __name__ == "__main__":
    main()
