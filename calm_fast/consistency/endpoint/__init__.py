"""Samples from a model behind the OpenAI protocol: vLLM, SGLang, llama.cpp, `calm-fast serve`, a hosted model."""

from calm_fast.consistency.endpoint.client import Drawn, Endpoint

__all__ = ["Drawn", "Endpoint"]
