"""A tiny composition behind a server on loopback."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "composing"))

from tiny import byte_level, save_model, sentencepiece  # noqa: E402

NAME = "tiny"


@contextmanager
def running(model: Any, tokenizer: Any) -> Iterator[str]:
    """Serve a model on a free port of loopback; gives the base URL."""
    import uvicorn

    from calm_fast.serving import build_app

    server = uvicorn.Server(uvicorn.Config(build_app(model, tokenizer, NAME), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    for _ in range(3000):
        if server.started:
            break
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(30)


def trained(model: Any) -> Any:
    """The composition with connections that change what the anchor writes."""
    torch.manual_seed(7)
    for connection in model.connections:
        torch.nn.init.normal_(connection.o_proj.weight, std=0.3)
    model.generation_config.eos_token_id = model.config.vocab_size - 1
    return model.eval()


def composition(folder: Path, other: bool = False) -> tuple[Any, Any]:
    """Return (a composition of two models that are saved in `folder`, the anchor's tokenizer).

    other: the augmenter has another tokenizer.
    """
    from calm_fast import compose

    tokenizer = byte_level(chat=True)
    parts = [
        save_model(folder / "anchor", tokenizer, 0),
        save_model(folder / "augmenter", sentencepiece() if other else tokenizer, 1, width=16),
    ]
    model = trained(compose(str(parts[0]), str(parts[1]), connections="uniform:2"))
    # random models write bytes that are no text, which the server's streams leave out
    texts = ((i, tokenizer.decode([i])) for i in range(len(tokenizer)))
    hidden = {i for i, text in texts if not (text.isascii() and text.isprintable())}
    # the end token too: two samples of 1,500 tokens ended within a second now and then
    model.generation_config.suppress_tokens = sorted(hidden | {model.generation_config.eos_token_id})
    return model, tokenizer
