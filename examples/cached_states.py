"""Measure what cached augmenter states save: step time and disk, on two random models. Needs no download.

python examples/cached_states.py --steps 4
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from calm_fast.hf import AugmenterStateCache, cache_augmenter_states, compose


def model(width: int, layers: int, seed: int) -> LlamaForCausalLM:
    """Return a random Llama."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=16384,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def collate(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Make a batch of rows of equal length."""
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def seconds(composed: Any, make: Any, batches: list[Any]) -> list[tuple[float, float]]:
    """Return wall and CPU seconds of a training step on each batch, loading included."""
    found = []
    optimizer = torch.optim.AdamW(composed.connections.parameters(), 1e-4)
    for rows in batches:
        begin = time.perf_counter(), time.process_time()
        composed(**make(rows)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    return found


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    given = parser.parse_args()
    composed = compose(model(576, 11, 0), model(448, 8, 1), "uniform:4", same_ids=True).train()
    anchor, augmenter = (sum(p.numel() for p in part.parameters()) for part in (composed.anchor, composed.augmenters))
    print(f"anchor {anchor / 1e6:.1f} M, augmenter {augmenter / 1e6:.1f} M parameters")
    generator = torch.Generator().manual_seed(0)
    count = (given.steps + 1) * given.rows
    rows = torch.randint(16384, (count, given.length), generator=generator).tolist()
    batches = [rows[k : k + given.rows] for k in range(0, count, given.rows)]
    makes: dict[str, Any] = {"A runs": collate}
    for name, dtype in (("float32 states", torch.float32), ("bfloat16 states", torch.bfloat16)):
        folder = tempfile.mkdtemp()
        begin = time.perf_counter()
        composed.eval()
        cache: AugmenterStateCache = cache_augmenter_states(
            composed, rows, folder, collate, dtype=dtype, batch_size=given.rows, shard_rows=16 * given.rows
        )
        print(
            f"{name}: {cache.bytes_per_token} bytes per token, {cache.nbytes() / (count * given.length):.0f} on disk "
            f"with all, {cache.nbytes() / 2**30:.4f} GiB, written in {time.perf_counter() - begin:.1f} s"
        )
        makes[name] = cache.collator(collate)
    composed.train()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in makes}
    for k, batch in enumerate(batches):
        for name, make in makes.items():  # one after the other, so that a busy machine slows all of them
            found = seconds(composed, make, [batch])
            times[name] += found if k else []  # the first step warms up
    for name, found in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"{name}: median of {len(found)} steps {wall:.2f} s, {cpu:.2f} s of CPU")


if __name__ == "__main__":
    main()
