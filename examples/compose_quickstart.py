"""Compose two language models, train the composition, generate, save, load. Runs in seconds on one CPU core.

Two tiny random Llamas stand in for real models: with yours, pass their paths or loaded models to compose().

    python examples/compose_quickstart.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from calm_fast import ComposedForCausalLM, compose

VOCAB = 64


def tiny_llama(width: int, layers: int) -> LlamaForCausalLM:
    """Return a small Llama with random weights."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def counting_batch(rows: int = 32, length: int = 16) -> torch.Tensor:
    """Return rows (rows, length) that count upwards from a random start, a task that a composition can learn."""
    start = torch.randint(2, VOCAB, (rows, 1))
    return 2 + (start + torch.arange(length)) % (VOCAB - 2)


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        # 1. Save two models, as a user would have them on disk.
        tiny_llama(64, 4).save_pretrained(Path(folder) / "anchor")
        tiny_llama(48, 6).save_pretrained(Path(folder) / "augmenter")

        # 2. Compose. (-1, -1) connects the embedding outputs; the other pairs are spread evenly.
        pairs = [(-1, -1), (0, 0), (2, 1), (5, 3)]
        model = compose(Path(folder) / "anchor", Path(folder) / "augmenter", connections=pairs)
        ids = counting_batch()
        assert torch.equal(model(ids).logits, model.anchor(ids).logits), "untrained, it must equal the anchor"

        # 3. Train. Only the cross-attention has gradients. transformers' Trainer works too.
        trainable = [p for p in model.parameters() if p.requires_grad]
        total = sum(p.numel() for p in model.parameters())
        print(f"{sum(p.numel() for p in trainable):,} of {total:,} parameters train")
        optimizer = torch.optim.AdamW(trainable, lr=3e-3)
        model.train()
        for step in range(151):
            batch = counting_batch()
            loss = model(batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 50 == 0:
                print(f"step {step:3d}  loss {loss.item():.3f}")

        # 4. Generate with a cache from prompts of different lengths (left padding).
        model.eval()
        prompts = torch.tensor([[0, 0, 10, 11, 12], [30, 31, 32, 33, 34]])
        mask = (prompts != 0).long()
        out = model.generate(prompts, attention_mask=mask, max_new_tokens=8, do_sample=False)
        for row in out.tolist():
            print("generated", row)

        # 5. Save the composition (its own tensors and references to its parts) and load it again.
        model.save_pretrained(Path(folder) / "composed")
        size = (Path(folder) / "composed" / "model.safetensors").stat().st_size
        print(f"saved {size / 1024:.0f} KiB")
        loaded = ComposedForCausalLM.from_pretrained(Path(folder) / "composed")
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        print("loaded: the same logits")


if __name__ == "__main__":
    main()
