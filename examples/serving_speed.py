"""Requests a second and the time to the first token: a plain loop of generate, and `calm-fast serve` with real clients.

    python examples/serving_speed.py [--requests 12] [--tokens 32]

A composition of two small random models on a CPU: what is compared is the server's share. Prints JSON. The rounds of
all ways alternate, and the median counts. Needs the extra `serve`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import torch
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from calm_fast import compose
from calm_fast.serving import build_app

PROMPT = "The quick brown fox jumps over the lazy dog, and then it rests. " * 2


def made(folder: str) -> tuple[Any, Any]:
    """A composition of random models with one tokenizer of bytes."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"<eos>": 256}
    rust = Tokenizer(models.BPE(vocabulary, []))
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<eos>", pad_token="<eos>")
    for name, width, layers in (("anchor", 384, 8), ("augmenter", 192, 6)):
        torch.manual_seed(layers)
        config = LlamaConfig(
            vocab_size=257, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
            num_attention_heads=6, pad_token_id=256, bos_token_id=None, eos_token_id=256,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(f"{folder}/{name}")
        tokenizer.save_pretrained(f"{folder}/{name}")
    model = compose(f"{folder}/anchor", f"{folder}/augmenter", connections="uniform:4").eval()
    with torch.no_grad():
        model.anchor.lm_head.weight[256] = 0  # the end hardly ever comes: every answer has the tokens asked for
    return model, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = made(folder)
    server = uvicorn.Server(uvicorn.Config(build_app(model, tokenizer, "m"), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    inputs = tokenizer(PROMPT, return_tensors="pt")

    def plain(tokens: int = args.tokens) -> None:
        model.generate(**inputs, max_new_tokens=tokens, do_sample=False)

    def ask(**changes: Any) -> Any:
        settings = {"model": "m", "prompt": PROMPT, "max_tokens": args.tokens, "temperature": 0.0} | changes
        return client.completions.create(**settings)

    def first() -> None:
        with ask(stream=True) as stream:
            next(iter(stream))

    def together() -> None:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: ask(), range(args.requests)))

    def loop(call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(args.requests):
                call()

        return run

    ways: dict[str, tuple[Callable[[], Any], float]] = {  # what runs, and how many samples it gives
        "plain loop": (loop(plain), args.requests),
        "one client": (loop(ask), args.requests),
        "four clients": (together, args.requests),
        "n samples in one request": (lambda: ask(n=args.requests, temperature=1.0), args.requests),
        "plain, one token": (lambda: plain(1), 1),
        "stream, first token": (first, 1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.rounds + 1):  # the first is not counted
        for name, (call, _) in ways.items():
            begin = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    found = {
        name: {"seconds": round(s, 4), "samples_per_second": round(ways[name][1] / s, 2)} for name, s in medians.items()
    }
    print(
        json.dumps(
            {"requests": args.requests, "tokens": args.tokens, "torch": torch.__version__, "ways": found}, indent=1
        )
    )
    server.should_exit = True
    thread.join(timeout=10)


if __name__ == "__main__":
    main()
