"""Whole composed models: random models, their plain definition, and a user's own composition around transformers.

Every function takes decoders of the Llama family as transformers builds them. `after(index, hidden)` may replace the
output of layer `index`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F

from calm_fast.benchmarks.baselines.cross_attention import EPS, explicit_attention, rms_norm
from calm_fast.hf.cache_names import cache_argument

After = Callable[[int, torch.Tensor], torch.Tensor]
Model = Any  # a LlamaForCausalLM; torch types the submodules of a Module as `Tensor | Module`


@dataclass(frozen=True)
class Part:
    """The sizes of a decoder: width, layers, query and KV heads, inner width of the MLP."""

    width: int
    depth: int
    heads: int
    kv_heads: int
    inner: int

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def layer_weights(self) -> int:
        """Return the number of weights in the matrices of one layer."""
        return 2 * self.width * self.head_dim * (self.heads + self.kv_heads) + 3 * self.width * self.inner


def random_model(part: Part, vocab: int, dtype: torch.dtype, device: torch.device, seed: int) -> Model:
    """Return a frozen LlamaForCausalLM with random weights; its hidden states keep a spread of about 1."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=part.width, num_hidden_layers=part.depth, num_attention_heads=part.heads,
        num_key_value_heads=part.kv_heads, head_dim=part.head_dim, intermediate_size=part.inner, vocab_size=vocab,
        initializer_range=part.width**-0.5, rms_norm_eps=EPS, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.requires_grad_(False).eval()


def run_layers(
    model: Model, ids: torch.Tensor, after: After | None = None, depth: int | None = None, cache: Any = None
) -> torch.Tensor:
    """Return the output (B, M, width) of layer `depth` - 1 (None: the last), from transformers' own layers.

    ids (B, M) int64. cache: a transformers Cache that holds the tokens before these.
    """
    decoder = model.model
    hidden: torch.Tensor = decoder.embed_tokens(ids)
    past = 0 if cache is None else cache.get_seq_length()
    positions = torch.arange(past, past + ids.shape[1], device=ids.device)[None]
    rotary = decoder.rotary_emb(hidden, positions)
    name = cast(str, cache_argument(decoder.layers[0].forward))  # every decoder layer takes a cache
    kept = {name: cache, "use_cache": cache is not None}
    for index, layer in enumerate(list(decoder.layers)[:depth]):
        hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary, **kept)
        hidden = hidden if after is None else after(index, hidden)
    return hidden


def head(model: Model, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits (B, M, V)."""
    logits: torch.Tensor = model.lm_head(model.model.norm(hidden))
    return logits


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy () of each next token in at least float32, as transformers computes it."""
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), ids[:, 1:].flatten())


def plain_layers(
    model: Model, ids: torch.Tensor, dtype: torch.dtype, after: After | None = None, depth: int | None = None
) -> torch.Tensor:
    """Return the result of `run_layers` without a cache, from the family's equations, every step in `dtype`."""
    decoder, c = model.model, model.config
    hidden = F.embedding(ids, decoder.embed_tokens.weight.to(dtype))
    wide = torch.promote_types(dtype, torch.float32)  # bfloat16 angles would encode other positions
    d, m = c.head_dim, ids.shape[1]
    frequencies = c.rope_parameters["rope_theta"] ** -(torch.arange(0, d, 2, device=ids.device).to(wide) / d)
    angles = torch.arange(m, device=ids.device).to(wide)[:, None] * frequencies
    cos, sin = (torch.cat((t, t), -1).to(dtype) for t in (angles.cos(), angles.sin()))

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), -1) * sin

    seen = torch.ones(m, m, dtype=torch.bool, device=ids.device).tril()
    for index, layer in enumerate(list(decoder.layers)[:depth]):
        attention, mlp = layer.self_attn, layer.mlp
        x = rms_norm(hidden, layer.input_layernorm.weight.to(dtype))
        q, k, v = (
            F.linear(x, getattr(attention, f"{name}_proj").weight.to(dtype)).unflatten(-1, (-1, d)).transpose(1, 2)
            for name in "qkv"
        )
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (rotate(k), v))
        attended = explicit_attention(rotate(q), k, v, seen, d**-0.5).transpose(1, 2).flatten(-2)
        hidden = hidden + F.linear(attended, attention.o_proj.weight.to(dtype))
        x = rms_norm(hidden, layer.post_attention_layernorm.weight.to(dtype))
        gate, up, down = (getattr(mlp, f"{name}_proj").weight.to(dtype) for name in ("gate", "up", "down"))
        hidden = hidden + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
        hidden = hidden if after is None else after(index, hidden)
    return hidden


def plain_head(model: Model, hidden: torch.Tensor) -> torch.Tensor:
    """Return the result of `head`, every step in hidden's dtype."""
    return F.linear(rms_norm(hidden, model.model.norm.weight.to(hidden.dtype)), model.lm_head.weight.to(hidden.dtype))


@dataclass(frozen=True)
class Engine:
    """The code that runs the models: transformers' layers, or the plain definition in one dtype."""

    layers: Callable[..., torch.Tensor]
    head: Callable[[Model, torch.Tensor], torch.Tensor]


TRANSFORMERS = Engine(run_layers, head)


def plain_engine(dtype: torch.dtype) -> Engine:
    """Return the plain definition with every step in `dtype`; it has no cache."""

    def layers(model: Model, ids: torch.Tensor, after: After | None = None, depth: int | None = None) -> torch.Tensor:
        return plain_layers(model, ids, dtype, after, depth)

    return Engine(layers, plain_head)


def augmenter_states(
    engine: Engine,
    inputs: Mapping[str, Any],
    ids: torch.Tensor,
    then: Callable[[torch.Tensor], Any] | None = None,
    caches: Sequence[Any] | None = None,
) -> list[dict[int, torch.Tensor]]:
    """Return each augmenter's hidden states at its connected layers, layer -> (B, M, DA).

    Layers above the last connected one and the LM head run only for `then`, which gets the logits. caches: one per
    augmenter, if the engine supports them.
    """
    found = []
    caches = caches or [None] * len(inputs["augmenters"])
    with torch.no_grad():
        for model, pairs, cache in zip(inputs["augmenters"], inputs["pairs"], caches, strict=True):
            wanted = {a for a, _ in pairs}
            states: dict[int, torch.Tensor] = {}
            cached = {} if cache is None else {"cache": cache}
            keep = partial(_keep, wanted, states)
            last = engine.layers(model, ids, keep, 1 + max(wanted) if then is None else None, **cached)
            if then is not None:
                then(engine.head(model, last))
            found.append(states)
    return found


def _keep(wanted: set[int], states: dict[int, torch.Tensor], layer: int, hidden: torch.Tensor) -> torch.Tensor:
    """Store `hidden` in `states` if its layer is wanted; return it unchanged."""
    if layer in wanted:
        states[layer] = hidden
    return hidden


def adding(
    inputs: Mapping[str, Any], states: Sequence[Mapping[int, torch.Tensor]], layer: Callable[..., torch.Tensor]
) -> After:
    """Return an `after` that adds the residual of every connection.

    layer(connection, hb, ha) returns hb plus its residual. All connections at one anchor layer read the same hb.
    """
    connections = [(augmenter, a, b) for augmenter, pairs in enumerate(inputs["pairs"]) for a, b in pairs]

    def after(index: int, hidden: torch.Tensor) -> torch.Tensor:
        total = None
        for number, (augmenter, a, b) in enumerate(connections):
            if b == index:
                out = layer(number, hidden, states[augmenter][a])
                total = out if total is None else total + (out - hidden)
        return hidden if total is None else total

    return after
