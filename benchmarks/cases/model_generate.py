"""E2: generation with a composed model.

Every contestant decodes the same given tokens and reports the log-probability of each. Free choices would diverge: a
rounding error decides between near ties.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch

from calm_fast.benchmarks.baselines.composition import TRANSFORMERS, Engine, adding, augmenter_states, plain_engine
from calm_fast.benchmarks.baselines.cross_attention import PlainHook, ReleasedHook, rms_norm, unfolded_layer, visible
from calm_fast.benchmarks.cases.model_shape import OP, ModelShape
from calm_fast.benchmarks.cases.model_training import composed
from calm_fast.benchmarks.kept_weights import fixed_weights
from calm_fast.benchmarks.registry import Case, Contestant, Inputs, Target, Thunk, Values
from calm_fast.hf.cache_names import cache_argument


def _split(inputs: Inputs, s: ModelShape) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the prompt (B, P) and the new tokens (B, new)."""
    ids = inputs["ids"]
    return ids[:, : ids.shape[1] - s.new], ids[:, ids.shape[1] - s.new :]


def _log_probability(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the log-probability (B, 1) of tokens (B, 1) under logits (B, V), in at least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).gather(1, tokens)


class GivenTokens:
    """A logits processor that forces `generate` to given tokens and records their log-probabilities."""

    def __init__(self, prompt: torch.Tensor, tokens: torch.Tensor) -> None:
        self.length, self.tokens = prompt.shape[1], tokens
        self.found: list[torch.Tensor] = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = self.tokens[:, ids.shape[1] - self.length].unsqueeze(1)
        self.found.append(_log_probability(scores, token))
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def _generate(model: Any, prompt: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities (B, new) of `tokens` from transformers' generate, with the model's own cache."""
    given = GivenTokens(prompt, tokens)
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), logits_processor=[given], do_sample=False,
        max_new_tokens=tokens.shape[1],
    )  # fmt: skip
    assert torch.equal(out[:, prompt.shape[1] :], tokens)
    return torch.cat(given.found, 1)


def _ours(s: ModelShape) -> Callable[[Inputs], Thunk]:
    def prepare(inputs: Inputs) -> Thunk:
        model = composed(inputs)
        prompt, tokens = _split(inputs, s)
        return lambda: {"logprob": _generate(model, prompt, tokens)}

    return prepare


def _loop(s: ModelShape, inputs: Inputs, step: Callable[[int, torch.Tensor], torch.Tensor]) -> Thunk:
    """Return the thunk that decodes all new tokens. step(i, ids so far) returns the logits (B, V) of new token i."""
    ids, tokens = inputs["ids"], _split(inputs, s)[1]

    def run() -> Values:
        with torch.no_grad():
            length = ids.shape[1] - s.new
            found = [_log_probability(step(i, ids[:, : length + i]), tokens[:, i : i + 1]) for i in range(s.new)]
        return {"logprob": torch.cat(found, 1)}

    return run


def _our_loop(s: ModelShape) -> Callable[[Inputs], Thunk]:
    """Prepare our model in a bare loop like that of `_cached`, without transformers' generate."""

    def prepare(inputs: Inputs) -> Thunk:
        model = composed(inputs)
        kept: dict[str, Any] = {}

        def step(i: int, ids: torch.Tensor) -> torch.Tensor:
            past = {"cache": kept["cache"]} if i else {}
            out = model(input_ids=ids[:, -1:] if i else ids, use_cache=True, logits_to_keep=1, **past)
            kept["cache"] = out.cache
            return out.logits[:, 0]

        loop = _loop(s, inputs, step)

        def run() -> Values:
            with fixed_weights(model):
                return loop()

        return run

    return prepare


def _layers(inputs: Inputs, dtype: torch.dtype | None, **options: Any) -> Callable[..., torch.Tensor]:
    """Return the connections as unfolded layers; options as for `unfolded_layer`."""
    heads = inputs["anchor"].config.num_attention_heads
    weights = [{name: t.to(dtype) for name, t in w.items()} for w in inputs["weights"]]
    return lambda number, hb, ha, **more: unfolded_layer(weights[number], hb, ha, heads, **options, **more)


def _recompute(
    s: ModelShape, inputs: Inputs, engine: Engine = TRANSFORMERS, dtype: Any = None, sdpa: bool = False
) -> Thunk:
    """Prepare decoding without any cache: both models read all tokens again; logits of the last one only."""
    anchor, layer = inputs["anchor"], _layers(inputs, dtype, sdpa=sdpa)

    def step(i: int, ids: torch.Tensor) -> torch.Tensor:
        mask = None if sdpa else visible(ids.shape[1], ids.shape[1], ids.device, None, None, True)
        states = augmenter_states(engine, inputs, ids)
        after = adding(inputs, states, partial(layer, causal=True, mask=mask))
        return engine.head(anchor, engine.layers(anchor, ids, after)[:, -1:])[:, 0]

    return _loop(s, inputs, step)


def _released(
    s: ModelShape, inputs: Inputs, engine: Engine = TRANSFORMERS, dtype: Any = None, plain: bool = False
) -> Thunk:
    """Prepare the released layer and forward, recomputing every step, because its own cache changes results."""
    anchor = inputs["anchor"]
    heads = anchor.config.num_attention_heads
    hooks = [ReleasedHook({n: t.to(dtype) for n, t in w.items()}, heads).eval() for w in inputs["weights"]]
    run = [PlainHook(hook, heads) for hook in hooks] if plain else hooks

    def step(i: int, ids: torch.Tensor) -> torch.Tensor:
        states = augmenter_states(engine, inputs, ids, then=lambda logits: None)
        after = adding(inputs, states, lambda number, hb, ha: run[number](hb, ha))
        return engine.head(anchor, engine.layers(anchor, ids, after))[:, -1]

    return _loop(s, inputs, step)


def _prompt_reader(
    s: ModelShape, inputs: Inputs, engine: Engine = TRANSFORMERS, dtype: Any = None, sdpa: bool = True
) -> Thunk:
    """Prepare generation as CALM-pytorch does it, with fused attention.

    Every step runs the augmenter with its LM head on the prompt and the anchor on all tokens. Each token reads the
    whole prompt.
    """
    anchor, layer = inputs["anchor"], _layers(inputs, dtype, sdpa=sdpa, causal=False)
    length = inputs["ids"].shape[1] - s.new

    def step(i: int, ids: torch.Tensor) -> torch.Tensor:
        states = augmenter_states(engine, inputs, ids[:, :length], then=lambda logits: None)
        return engine.head(anchor, engine.layers(anchor, ids, adding(inputs, states, layer)))[:, -1]

    return _loop(s, inputs, step)


def _cached(s: ModelShape, sdpa: bool) -> Callable[[Inputs], Thunk]:
    """Prepare a careful user's loop, with caches of both models and of the connections' keys."""

    def prepare(inputs: Inputs) -> Thunk:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        anchor, layer = inputs["anchor"], _layers(inputs, None, sdpa=sdpa)
        caches: dict[str, Any] = {}

        def step(i: int, ids: torch.Tensor) -> torch.Tensor:
            if i == 0:
                caches["anchor"] = DynamicCache(config=anchor.config)
                caches["augmenters"] = [DynamicCache(config=model.config) for model in inputs["augmenters"]]
                caches["cross"] = [DynamicLayer() for _ in inputs["weights"]]
            new = ids if i == 0 else ids[:, -1:]
            mask = None if sdpa or i else visible(ids.shape[1], ids.shape[1], ids.device, None, None, True)
            states = augmenter_states(TRANSFORMERS, inputs, new, caches=caches["augmenters"])

            def read(number: int, hb: torch.Tensor, ha: torch.Tensor) -> torch.Tensor:
                return layer(number, hb, ha, causal=i == 0, mask=mask, cache=caches["cross"][number])

            hidden = TRANSFORMERS.layers(anchor, new, adding(inputs, states, read), cache=caches["anchor"])
            return TRANSFORMERS.head(anchor, hidden[:, -1:])[:, 0]

        return _loop(s, inputs, step)

    return prepare


def _parts(s: ModelShape) -> Callable[[Inputs], Thunk]:
    """Prepare the anchor alone in transformers' generate, and the augmenters alone over the same tokens, cached."""

    def prepare(inputs: Inputs) -> Thunk:
        from transformers import DynamicCache

        anchor, (prompt, tokens) = inputs["anchor"], _split(inputs, s)

        def run() -> Values:
            values = {"logprob": _generate(anchor, prompt, tokens)}
            for index, model in enumerate(inputs["augmenters"]):
                name = cast(str, cache_argument(model.model.forward))  # every decoder takes a cache
                new, past = prompt, {name: DynamicCache(config=model.config)}
                with torch.no_grad():
                    for i in range(s.new):
                        state = model.model(input_ids=new, use_cache=True, **past).last_hidden_state
                        new = tokens[:, i : i + 1]
                values[f"state_{index}"] = state[:, -1:]
            return values

        return run

    return prepare


def _causal_definition(s: ModelShape, connected: bool) -> Callable[[Inputs, torch.dtype], Values]:
    """Return one pass over prompt and tokens: as no token sees a later one, it gives the result of every step."""

    def values(inputs: Inputs, dtype: torch.dtype) -> Values:
        ids, tokens, engine = inputs["ids"][:, :-1], _split(inputs, s)[1], plain_engine(dtype)
        anchor, after = inputs["anchor"], None
        if connected:
            mask = visible(ids.shape[1], ids.shape[1], ids.device, None, None, True)
            layer = _layers(inputs, dtype, sdpa=False, causal=True, mask=mask)
            after = adding(inputs, augmenter_states(engine, inputs, ids), layer)
        logits = engine.head(anchor, engine.layers(anchor, ids, after)[:, -s.new :])
        found = {"logprob": _log_probability(logits.flatten(0, 1), tokens.reshape(-1, 1)).view(tokens.shape)}
        if not connected:
            for index, model in enumerate(inputs["augmenters"]):
                state = engine.layers(model, ids)[:, -1:]
                found[f"state_{index}"] = rms_norm(state, model.model.norm.weight.to(dtype))
        return found

    return values


def _released_definition(s: ModelShape, inputs: Inputs, dtype: torch.dtype) -> Values:
    return _released(s, inputs, plain_engine(dtype), dtype, plain=True)()


def _prompt_reader_definition(s: ModelShape, inputs: Inputs, dtype: torch.dtype) -> Values:
    return _prompt_reader(s, inputs, plain_engine(dtype), dtype, sdpa=False)()


LOOPS = {"eager_cache": False, "unfolded_sdpa_cache": True}  # baseline -> True for fused attention
# baseline -> how to prepare it, and its own definition if it computes something else
RECOMPUTE: dict[str, tuple[Callable[..., Thunk], Callable[..., Values] | None]] = {
    "eager_recompute": (_recompute, None),
    "released": (_released, _released_definition),
    "calm_pytorch": (_prompt_reader, _prompt_reader_definition),
}


def generation_case(
    name: str,
    s: ModelShape,
    dtype: torch.dtype,
    device: torch.device,
    targets: Sequence[Target] = (),
    *,
    recompute: Sequence[str] = tuple(RECOMPUTE),
    loops: Sequence[str] = tuple(LOOPS),
    share: float = 1.0,
) -> Case:
    """Return a case of generation.

    recompute: the baselines without caches, whose time grows quadratically. loops: the eager loops with caches.
    """
    small = s.reduced()
    contestants = [
        Contestant("calm_fast", _by_length(s, _ours), ours=True),
        Contestant("calm_fast_loop", _by_length(s, _our_loop), ours=True),
    ]
    contestants += [Contestant(which, _by_length(s, partial(_cached, sdpa=LOOPS[which]))) for which in loops]
    for which in recompute:
        run, own = RECOMPUTE[which]
        prepare = _by_length(s, partial(partial, run))
        contestants.append(Contestant(which, prepare, definition=own and partial(own, small)))
    parts = _by_length(s, _parts)
    contestants.append(Contestant("parts", parts, definition=_causal_definition(small, False), yardstick=True))
    return Case(
        OP, name, s.sizes(), dtype, s.flops(), s.bytes(dtype.itemsize), s.make(dtype, device), tuple(contestants),
        _causal_definition(small, True), "calm_fast", small.make(dtype, device), targets, None, share,
    )  # fmt: skip


def _by_length(s: ModelShape, build: Callable[[ModelShape], Callable[[Inputs], Thunk]]) -> Callable[[Inputs], Thunk]:
    """Return prepare(inputs) for the shape of the inputs: `s` or the smaller one of the correctness check."""

    def prepare(inputs: Inputs) -> Thunk:
        whole = inputs["ids"].shape[1] == s.m + s.new
        return build(s if whole else s.reduced())(inputs)

    return prepare
