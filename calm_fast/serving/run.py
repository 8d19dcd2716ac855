"""The application, and running it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from calm_fast.composing.models import composition_tokenizer, untrained
from calm_fast.core.checks import bad_value
from calm_fast.core.devices import usable_device
from calm_fast.hf import ComposedForCausalLM

_WHERE = "serve"
PATHS = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"}


def build_app(model: Any, tokenizer: Any, name: str) -> Any:
    """Return an ASGI application that answers requests of the OpenAI protocol with one model.

    Requests are answered one after the other, on one thread; the n samples of a request are one batch.

    model: a causal LM of transformers, in eval mode; compositions and dual-LoRA models included. tokenizer: its fast
    tokenizer. name: what clients call it.
    Raises:
        ImportError: fastapi, uvicorn or openai is missing, or this release of transformers has another server.
        ValueError: the tokenizer is not a fast one, or the model is in training mode.
    """
    check_installed()
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import GenerationState

    from calm_fast.serving.disconnects import Disconnects
    from calm_fast.serving.errors import tell_errors
    from calm_fast.serving.handlers import Chat, OneModel, Text

    if not getattr(tokenizer, "is_fast", False):
        raise bad_value(_WHERE, "tokenizer", "a fast tokenizer, whose text can be streamed", type(tokenizer).__name__)
    if any(module.training for module in model.modules()):
        expected = "in eval mode, because dropout would change every answer"
        raise bad_value(_WHERE, "model", expected, "one in training mode. Call model.eval()")
    manager, state = OneModel(model, tokenizer, name), GenerationState()
    own = {"chat_handler": Chat(manager, state), "completion_handler": Text(manager, state)}
    # releases differ in the handlers of other endpoints, which are not offered
    others = [name for name in inspect.signature(build_server).parameters if name.endswith("_handler")]
    given: dict[str, Any] = dict.fromkeys(others) | own
    app: Any = build_server(model_manager=manager, generation_state=state, **given)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in PATHS]
    tell_errors(app)
    app.add_middleware(Disconnects)
    return app


def check_installed() -> None:
    """Raise ImportError that says what to install unless transformers' server can run, as it is used here."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ImportError(f"{_WHERE}: needs fastapi, uvicorn and openai; pip install 'calm-fast[serve]'")
    try:
        from transformers.cli.serving.server import build_server

        from calm_fast.serving import handlers  # noqa: F401  imports all that is used of the server

        given = inspect.signature(build_server).parameters
        missing = {"model_manager", "chat_handler", "completion_handler", "generation_state"} - given.keys()
    except ImportError as problem:
        missing = {str(problem)}
    if missing:
        raise ImportError(
            f"{_WHERE}: needs the server of transformers (transformers.cli.serving) as 5.17 to 5.24 have it; "
            f"{transformers.__version__} lacks {', '.join(sorted(missing))}. Install one of these releases"
        )


def serve(
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str | None = None,
    dtype: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serve a saved composition until the process is interrupted.

    Args:
        folder: of the composition. name: what clients call it; default, the folder's name. host, port: where to
            listen; the default host takes connections of this machine only, and there is no authentication.
            device: default, a GPU if there is one. dtype: of the parts, default as they are saved.
    Raises:
        ImportError: a package is missing. ValueError: the folder holds no composition with its models.
    """
    check_installed()
    import uvicorn

    target = usable_device(_WHERE, device)
    more: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    model = ComposedForCausalLM.from_pretrained(folder, **more)
    tokenizer = composition_tokenizer(_WHERE, os.fspath(folder), model.config.anchor_path)
    model.to(target)
    if untrained(model):
        say("warning: W_o of every connection is zero, so the composition writes what its anchor writes")
    name = Path(folder).resolve().name if name is None else name
    app = build_app(model, tokenizer, name)
    say(f"serving {name} on http://{host}:{port}/v1, one request at a time")
    uvicorn.run(app, host=host, port=port, log_level="warning")
