"""A composition behind transformers' own server, with the OpenAI protocol: what `calm-fast serve` does."""

from calm_fast.core.compatibility import importing

with importing("transformers"):
    from calm_fast.serving.run import build_app, serve

__all__ = ["build_app", "serve"]
