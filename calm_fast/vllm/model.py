"""A saved composition as a model of vLLM: both models and the connections keep keys and values in vLLM's cache.

Written against vLLM 0.32, and run there on a CPU in float32, one process. Nobody has run it on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader import DefaultModelLoader
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model

from calm_fast.core.checks import bad_value
from calm_fast.modules.cross_attention import CrossAttention
from calm_fast.modules.cross_attention_weights import Weights, read_parameters, stack_keys_values
from calm_fast.modules.rms import rms_normalise
from calm_fast.vllm.parts import WHERE, check_composition, check_files, parts_of, wanted_weights

LOADERS = ("auto", "safetensors", "dummy")
Layer = tuple[torch.Tensor, torch.Tensor]  # what a layer of vLLM returns: (hidden, residual), both (T, width)


def check_engine(vllm_config: VllmConfig) -> None:
    """Raise ValueError naming the setting of the engine under which compositions were never run."""
    parallel, load_format = vllm_config.parallel_config, vllm_config.load_config.load_format
    allowed: list[tuple[str, Any, Any]] = [
        ("enforce_eager", vllm_config.model_config.enforce_eager, True),
        ("tensor_parallel_size", parallel.tensor_parallel_size, 1),
        ("pipeline_parallel_size", parallel.pipeline_parallel_size, 1),
        ("prefill_context_parallel_size", getattr(parallel, "prefill_context_parallel_size", 1), 1),
        ("enable_dbo", parallel.enable_dbo, False),
        ("quantization", vllm_config.model_config.quantization, None),
        ("speculative_config", vllm_config.speculative_config, None),
        ("enable_lora", vllm_config.lora_config is not None, False),
        ("kv_cache_dtype", vllm_config.cache_config.cache_dtype, "auto"),
    ]
    for name, value, only in allowed:
        if value != only:
            raise bad_value(WHERE, name, f"{only!r} for a composition", repr(value))
    if load_format not in LOADERS:
        expected = f"one of {', '.join(LOADERS)}: the others do not read the files of the parts"
        raise bad_value(WHERE, "load_format", expected, repr(load_format))


class Connection(CrossAttention):
    """A CrossAttention over tokens of many requests in one flat batch, with its keys and values in vLLM's cache.

    An augmenter that reads the anchor's tokens has a key for each of them, and a query reads those up to its own: this
    is vLLM's attention of a decoder, with keys and values that come from the augmenter.
    """

    def __init__(self, *args: Any, vllm_config: VllmConfig, prefix: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attn = Attention(
            self.num_heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
        )
        self.weights: Weights | None = None

    def _fold(self) -> Weights:
        """Return the weights with the norm's weight in W_q, and P in W_k and W_v."""
        params = read_parameters(self)
        assert params is not None  # the children are those that CrossAttention makes
        w = Weights(*(None if p is None else p.detach() for p in params))  # type: ignore[arg-type]  # in its order
        if w.scale is not None:
            w = w._replace(scale=None, q=w.q * w.scale)
        return stack_keys_values(w, fold=True)

    def forward(self, hidden: torch.Tensor, state: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # flat
        """Return the residual (T, DB) for the anchor's states `hidden` (T, DB) and the augmenter's `state` (T, DA)."""
        if self.weights is None:
            self.weights = self._fold()
        w = self.weights
        normed = hidden if self.norm is None else rms_normalise(hidden, self.eps)
        keys, values = linear(state, w.k, w.k_bias).chunk(2, dim=-1)
        out = self.attn(linear(normed, w.q, w.q_bias), keys.contiguous(), values.contiguous())
        update = linear(out, w.o, w.o_bias)
        return update if w.post is None else rms_normalise(update, self.eps) * w.post


class ComposedForCausalLM(nn.Module):
    """A composition whose augmenters read the anchor's tokens causally, built of vLLM's own classes of the families.

    All of it runs in vLLM's dtype, the connections too. The augmenters run first, on the same flat batch of tokens; the
    anchor then adds the residuals of its connections after their layers.

    Raises ValueError naming what cannot be served: of the composition, of the engine, of the parts' files.
    """

    anchor: Any  # vLLM's model of its family

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        config = model_config.hf_config
        if prefix:
            raise bad_value(WHERE, "prefix", "'', a composition is no part of another model", repr(prefix))
        check_engine(vllm_config)
        check_composition(config, model_config.max_model_len)
        self.parts = parts_of(config, model_config.model)
        for part in self.parts:
            check_files(part)
            module = init_vllm_registered_model(vllm_config, hf_config=part.config, prefix=part.name)
            self.add_module(part.name, module)
        self.secondary_weights = [
            DefaultModelLoader.Source(p.source, p.revision, prefix=f"{p.name}.", fall_back_to_pt=False)
            for p in self.parts
        ]
        built: list[Any] = [self.get_submodule(part.name) for part in self.parts]
        anchor, *augmenters = built
        width = self.parts[0].config.hidden_size
        self.connections = nn.ModuleList()
        self.states: dict[tuple[int, int], torch.Tensor] = {}  # of the call that runs
        by_layer: dict[int, list[tuple[int, tuple[int, int]]]] = {}
        for k, pairs in enumerate(config.connections):
            for a, b in pairs:
                index = len(self.connections)
                by_layer.setdefault(b, []).append((index, (k, a)))
                sizes = (width, self.parts[1 + k].config.hidden_size)
                own = {"vllm_config": vllm_config, "prefix": f"connections.{index}"}
                self.connections.append(Connection(*sizes, **config.cross_attention, **own))
            for a in sorted({a for a, _ in pairs}):
                augmenters[k].model.layers[a].register_forward_hook(partial(self._read, (k, a)))
        for b, readers in by_layer.items():
            anchor.model.layers[b].register_forward_hook(partial(self._add, readers))
        self.bodies: list[Any] = [augmenter.model for augmenter in augmenters]

    def _read(self, key: tuple[int, int], layer: nn.Module, args: Any, output: Layer) -> None:
        hidden, residual = output
        self.states[key] = hidden + residual

    def _add(self, readers: list[tuple[int, tuple[int, int]]], layer: nn.Module, args: Any, output: Layer) -> Layer:
        hidden, residual = output
        state = hidden + residual
        for index, key in readers:
            hidden = hidden + self.connections[index](state, self.states[key])
        return hidden, residual

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the anchor's embeddings (T, DB) of input_ids (T,)."""
        embedded: torch.Tensor = self.anchor.embed_input_ids(input_ids)
        return embedded

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the anchor's last hidden states (T, DB) for input_ids (T,) at positions (T,).

        Raises ValueError for inputs_embeds, which the augmenters could not read.
        """
        if input_ids is None or inputs_embeds is not None:
            raise bad_value(WHERE, "inputs_embeds", "None: augmenters read token ids", "a prompt of embeddings")
        try:
            for body in self.bodies:
                body(input_ids, positions, None)
            output: torch.Tensor = self.anchor(input_ids, positions)
            return output
        finally:
            self.states.clear()

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return the anchor's logits (T, vocabulary)."""
        logits: torch.Tensor | None = self.anchor.compute_logits(hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the composition's own tensors and those of its parts, and return the names of what was loaded."""
        for connection in self.connections:
            connection.weights = None  # type: ignore[assignment]  # folded at the next call
        loaded: set[str] = AutoWeightsLoader(self).load_weights(wanted_weights(self.parts, weights))
        return loaded
