"""The arguments of each part of a composed model: checks, one call per augmenter, and the family's own names."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, StaticCache

from calm_fast.core.checks import bad_value, describe, require_async, values_checked
from calm_fast.core.compatibility import tried
from calm_fast.hf.cache import ComposedCache
from calm_fast.hf.cache_names import NAMES, cache_argument, generate_argument
from calm_fast.hf.layers import device_of
from calm_fast.hf.masks import CAUSAL, Visibility, aligned_visibility, given_visibility, has_padding
from calm_fast.hf.masks import WHERE as WHERE
from calm_fast.hf.own_steps import MASK as OWN_MASK
from calm_fast.hf.own_steps import OwnStep, own_step
from calm_fast.hf.own_text import OwnText
from calm_fast.hf.recompute import check_rescaling, lacks_cache


class Tokens(TypedDict):
    """The token arguments of one model: input_ids (B, T), attention_mask (B, past + T), position_ids (1 or B, T)."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None


@dataclass(frozen=True)
class Signature:
    """The argument names that a family uses.

    cache, prepared, generated: name of the cache argument in the called module's forward, in the family's
    prepare_inputs_for_generation, and in transformers' generate. position_ids, logits_to_keep: True if forward takes
    this argument. stock: True if the family prepares inputs with transformers' own method, which changes nothing in a
    decode step without padding. home: the module that holds the model's first parameter, and the parameter's name in
    it. recomputes: why the family has no transformers Cache, or "". attention_mask, use_cache: False if such a family's
    forward does not take this argument.
    """

    cache: str
    prepared: str
    generated: str
    position_ids: bool
    logits_to_keep: bool
    stock: bool = False
    home: tuple[nn.Module, str] | None = None
    recomputes: str = ""
    attention_mask: bool = True
    use_cache: bool = True

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        called: nn.Module | None = None,
        *,
        where: str = "Signature.of",
        argument: str = "model",
        encoder_decoder: bool = False,
    ) -> Signature:
        """Read the signature of `model`.

        called: the module inside it that will be called; default, the model itself. where, argument: the function and
        its argument that an error names. encoder_decoder: True takes an encoder-decoder.

        Raises ValueError for any other encoder-decoder, for one without a transformers Cache, for an RWKV that changes
        its weights, and for a forward whose cache argument has no known name: such a model must not run as if it had no
        cache.
        """
        name = type(model).__name__
        if model.config.is_encoder_decoder and not encoder_decoder:
            raise bad_value(where, argument, "a decoder-only model", f"{name}, an encoder-decoder")
        check_rescaling(model, where, argument)
        why = lacks_cache(model)
        if why and encoder_decoder:
            raise bad_value(where, argument, "a model with a transformers Cache", f"{name}, which {why}")
        called = model if called is None else called
        taken = inspect.signature(called.forward).parameters
        cache = "" if why else cache_argument(called.forward)
        if cache is None:
            got = ", ".join(taken)
            raise ValueError(
                f"{type(called).__name__}.forward: the cache argument must be named {' or '.join(NAMES)}, got the "
                f"arguments {got}. If forward is wrapped, wrap it with functools.wraps; if the model has no cache, "
                f"define _supports_default_dynamic_cache() to return False. {tried('transformers')}"
            )
        names = inspect.signature(model.forward).parameters
        prepare = getattr(type(model), "prepare_inputs_for_generation", None)
        prepared = None if prepare is None else cache_argument(prepare)
        stock = prepare is GenerationMixin.prepare_inputs_for_generation and not model.is_remote_code()
        home = next(((m, name) for m in model.modules() for name, p in m._parameters.items() if p is not None), None)
        return cls(
            cache,
            prepared or generate_argument(),
            generate_argument(),
            "position_ids" in names,
            "logits_to_keep" in names,
            stock,
            home,
            why,
            not why or "attention_mask" in taken,
            not why or "use_cache" in taken or any(p.kind is p.VAR_KEYWORD for p in taken.values()),
        )

    def device(self, model: PreTrainedModel) -> torch.device:
        """Return model.device without its walk through the modules: every decode step asks."""
        parameter = None if self.home is None else self.home[0]._parameters.get(self.home[1])
        if parameter is None:
            return model.device
        # an offloaded parameter is on the meta device
        return device_of(self.home[0], model) if parameter.is_meta and self.home else parameter.device


def check_ids(name: str, ids: Any, empty: bool = True) -> None:
    """Raise ValueError unless `ids` is an int64 or int32 tensor (batch, tokens). empty: it may hold no token."""
    if not isinstance(ids, torch.Tensor):
        raise bad_value(WHERE, name, "a tensor of token ids (batch, tokens)", describe(ids))
    if ids.ndim != 2:
        raise bad_value(WHERE, name, "2-dimensional (batch, tokens)", f"shape {tuple(ids.shape)}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise bad_value(WHERE, name, "int64 or int32 token ids", str(ids.dtype))
    if not empty and ids.shape[1] == 0:
        got = f"shape {tuple(ids.shape)}. To generate without a prompt, begin with the tokenizer's BOS token"
        raise bad_value(WHERE, name, "at least one token per row", got)


def kept_positions(keep: int | torch.Tensor, ids: torch.Tensor) -> int | torch.Tensor:
    """Return `logits_to_keep` for ids (B, M) such that a CPU does not copy the head's weight for every row.

    Of a number of last tokens, transformers gives the head a slice (B, keep, D) of the states, which torch cannot fold
    into one matrix: it multiplies row by row, each with its own copy of the weight (B 8, a weight of 49,152 x 576 in
    bfloat16: 2.8 s instead of 14 ms). Of positions (keep,) the head gets states of their own.
    """
    if not isinstance(keep, int) or ids.device.type != "cpu" or ids.shape[0] == 1 or not 0 < keep < ids.shape[1]:
        return keep
    return torch.arange(ids.shape[1] - keep, ids.shape[1])


def check_tensors(**given: Any) -> None:
    """Raise ValueError unless each argument is a tensor or None, as transformers models take them."""
    for name, value in given.items():
        if value is not None and not isinstance(value, torch.Tensor):
            raise bad_value(WHERE, name, "a tensor (batch, tokens) or None", describe(value))
        if name == "position_ids" and value is not None and value.ndim != 2:
            expected = "2-dimensional (batch, tokens), as every part reads it"
            raise bad_value(WHERE, name, expected, f"shape {tuple(value.shape)}")


def check_vocabulary(name: str, ids: torch.Tensor, models: Iterable[PreTrainedModel]) -> None:
    """Raise ValueError unless every model embeds every id. The ids are read only where `values_checked` allows it."""
    if not values_checked(ids) or ids.numel() == 0:
        return
    # asked at every call: the caller shares the parts and may resize them
    rows = [(getattr(model.get_input_embeddings(), "num_embeddings", None), model) for model in models]
    known = [(count, type(model).__name__) for count, model in rows if isinstance(count, int)]
    if not known:
        return
    count, owner = min(known)
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= count:
        expected = f"token ids from 0 to {count - 1} ({owner} embeds {count})"
        raise bad_value(WHERE, name, expected, str(low if low < 0 else high))


class AugmenterCall(NamedTuple):
    """The token arguments of one augmenter, and the interval of them that each anchor token reads.

    step: what happens to the cache first, for an augmenter with tokens of its own. reading: of a bidirectional one.
    """

    inputs: Tokens
    visibility: Visibility
    step: OwnStep | None = None
    reading: Any = None


def per_augmenter(name: str, value: Any, count: int) -> list[torch.Tensor | None]:
    """Return the value of argument `name` for each of `count` augmenters. Raises ValueError for anything else."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count or not all(v is None or isinstance(v, torch.Tensor) for v in values):
        got = describe(value) if not isinstance(value, (list, tuple)) else f"{len(value)}: {describe(value)}"
        raise bad_value(WHERE, name, f"a tensor, or a list with a tensor or None for each of {count} augmenters", got)
    return values


class Past(NamedTuple):
    """What came before a call.

    tokens: the number of the anchor's tokens in `cache`. cached: True if this call has or starts a cache, False if not,
    None if it would start one by default.
    """

    tokens: int
    cached: bool | None
    cache: ComposedCache | None = None

    def own(self) -> dict[int, OwnText]:
        """Return the texts of the augmenters that have read tokens of their own, by augmenter."""
        return self.cache.own if self.tokens > 0 and self.cache is not None else {}

    def own_text(self, index: int, ids: torch.Tensor) -> OwnText:
        """Return the text of augmenter `index` in the cache, which new `ids` (B, N) continue.

        Raises ValueError if it has read the anchor's tokens so far.
        """
        if (text := self.own().get(index)) is not None:
            return text
        if self.tokens > 0:
            expected = f"None with this cache, because augmenter {index} has read the anchor's tokens"
            raise bad_value(WHERE, "augmenter_input_ids", expected, "a value. Pass it from the first call on")
        return OwnText(ids[:, :0], 0)

    def fixed(self, index: int, mask: torch.Tensor | None) -> str:
        """Return why rows of augmenter `index` must get equal numbers of tokens, or "" if they need not."""
        if self.cache is None or mask is None or self.tokens == 0:
            return ""
        return self.cache.fixed_rows(index, f"augmenter {index}")


def augmenter_calls(
    count: int, inputs: Tokens, external: dict[str, Any], past: Past
) -> tuple[list[AugmenterCall], bool]:
    """Return (the call of every augmenter, True if no cache can be kept: for several documents per row, or a hole).

    inputs: the anchor's token arguments. external: augmenter_input_ids, augmenter_attention_mask,
    augmenter_position_ids, lo and hi, each None, a tensor, or a list with one entry per augmenter.
    Rows hold several documents if their positions restart without a mask and a cache, as in transformers.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    batch, new = ids.shape
    positions = None if past.cached else inputs["position_ids"]
    aligned = aligned_visibility(mask, positions, batch, past.tokens, new, past.cached)
    packed = mask is None and aligned.lo is not None

    if all(value is None for value in external.values()):
        if past.own():
            raise _without_own_tokens(min(past.own()))
        return [AugmenterCall(inputs, aligned)] * count, packed or not aligned.cacheable
    values_of = {name: per_augmenter(name, value, count) for name, value in external.items()}
    calls = []
    for index in range(count):
        given = {name: values[index] for name, values in values_of.items()}
        lo, hi = given.pop("lo"), given.pop("hi")
        if hi is None and any(value is not None for value in (lo, *given.values())):
            expected = "given with `lo` or an augmenter's own tokens, to say which of them each token reads"
            raise bad_value(WHERE, "hi", expected, "None")
        own_ids = given["augmenter_input_ids"]
        if own_ids is None:
            if any(value is not None for value in given.values()):
                expected = "given with an augmenter's own mask or positions"
                raise bad_value(WHERE, "augmenter_input_ids", expected, "None")
            if index in past.own():
                raise _without_own_tokens(index)
            if hi is not None and lo is None and packed:
                expected = "given with `hi` for rows of several documents, to say where each one begins"
                raise bad_value(WHERE, "lo", expected, "None")
            visible = aligned
            if hi is not None:
                seen = past.tokens
                visible = given_visibility(lo, hi, "attention_mask", mask, batch, new, seen, new, past.cached)
            calls.append(AugmenterCall(inputs, visible))
            continue
        assert hi is not None  # checked above
        own = Tokens(
            input_ids=own_ids,
            attention_mask=given["augmenter_attention_mask"],
            position_ids=given["augmenter_position_ids"],
        )
        _check_own_tokens(own, batch)
        calls.append(_own_call(index, own, lo, hi, new, past))
    return calls, packed or not all(call.visibility.cacheable for call in calls)


def _own_call(
    index: int, own: Tokens, lo: torch.Tensor | None, hi: torch.Tensor, new: int, past: Past
) -> AugmenterCall:
    """Return the call of augmenter `index` with tokens of its own. new: M, the number of the anchor's tokens."""
    ids, mask, positions = own["input_ids"], own["attention_mask"], own["position_ids"]
    if past.cached is False:
        visible = given_visibility(lo, hi, OWN_MASK, mask, len(ids), new, 0, ids.shape[1], False)
        return AugmenterCall(own, visible)
    step = own_step(past.own_text(index, ids), ids, mask, positions, lo, hi, new, past.fixed(index, mask))
    read = Tokens(input_ids=step.ids, attention_mask=step.mask, position_ids=step.positions)
    return AugmenterCall(read, step.visibility, step)


def _without_own_tokens(index: int) -> ValueError:
    expected = f"given in every call with this cache, because augmenter {index} has read tokens of its own"
    got = "None. Pass (batch, 0) ids where it has no new token, with `hi`"
    return bad_value(WHERE, "augmenter_input_ids", expected, got)


def _check_own_tokens(tokens: Tokens, batch: int) -> None:
    """Raise ValueError unless an augmenter's own tokens are (batch, N) ids with fitting positions."""
    ids, positions = tokens["input_ids"], tokens["position_ids"]
    check_ids("augmenter_input_ids", ids)
    if ids.shape[0] != batch:
        raise bad_value(WHERE, "augmenter_input_ids", f"of batch size {batch}", f"shape {tuple(ids.shape)}")
    if positions is None:
        return
    n = ids.shape[1]
    if positions.ndim < 2 or positions.shape[-1] != n or positions.shape[-2] not in (1, batch):
        expected = f"of shape ({batch}, {n}), one position per new token"
        raise bad_value(WHERE, "augmenter_position_ids", expected, f"shape {tuple(positions.shape)}")


def remember(cache: ComposedCache, past: int, inputs: Tokens, calls: list[AugmenterCall]) -> None:
    """Note in `cache` that its rows have padding, which later calls with it must say again.

    past: number of the anchor's tokens before this call. Raises ValueError if rows with padding go on without a mask
    (a GPU, which is not asked whether a mask hides anything, asserts it).
    """
    if past == 0:
        cache.padded, cache.own = False, {}
    if inputs["attention_mask"] is None:
        if cache.padded is not False:
            expected = "given in every call with this cache, because its rows have padding"
            problem = bad_value(WHERE, "attention_mask", expected, "None. Pass the mask of all tokens so far")
            if cache.padded is True:
                raise problem
            require_async(~cache.padded, str(problem))
            cache.padded = False
    elif (past == 0 or inputs["input_ids"].shape[1] > 1) and calls[0].inputs is inputs:
        if cache.padded is not True and calls[0].visibility is not CAUSAL:
            tracing = torch.compiler.is_compiling()
            cache.padded = True if tracing else has_padding(inputs["attention_mask"])  # of all tokens so far


def _knows_length(cache: Cache | None, past: int) -> bool:
    """Return True if a family that asks `cache` for the number of past tokens gets `past`.

    A truncated hybrid may ask an attention layer that never runs.
    """
    if not isinstance(cache, DynamicCache):
        return True
    attention = next((layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)), None)
    return attention is None or attention.get_seq_length() == past


def part_inputs(
    model: PreTrainedModel, signature: Signature, tokens: Tokens, cache: Cache | None, past: int
) -> dict[str, Any]:
    """Return the keyword arguments of one part, on its device.

    With a cache they are prepared as the family prepares its own decoding.
    """
    device = signature.device(model)
    inputs: dict[str, Any] = {**tokens}
    for name, value in inputs.items():
        inputs[name] = None if value is None else value.to(device)
    if not signature.attention_mask:
        del inputs["attention_mask"]
    if not signature.position_ids:
        del inputs["position_ids"]
    elif inputs["position_ids"] is None and not _knows_length(cache, past):
        ids = inputs["input_ids"]
        inputs["position_ids"] = torch.arange(past, past + ids.shape[1], device=ids.device)[None]
    if cache is None:
        return inputs | ({"use_cache": False} if signature.use_cache else {})
    inputs["use_cache"] = True
    unmasked = inputs["attention_mask"] is None
    plain = type(cache) is DynamicCache and (unmasked or inputs.get("position_ids") is not None)
    plain = plain or (type(cache) is StaticCache and unmasked)
    if (signature.stock and plain) or not hasattr(model, "prepare_inputs_for_generation"):
        return inputs | {signature.cache: cache}
    inputs[signature.prepared] = cache
    prepared: dict[str, Any] = model.prepare_inputs_for_generation(  # type: ignore[operator]  # of GenerationMixin
        **inputs, is_first_iteration=past == 0
    )
    prepared.pop("logits_to_keep", None)  # some families fill in their own, but the caller's value counts
    for name in NAMES:  # code for another release may prepare under another name than forward takes
        if name != signature.cache and name in prepared:
            prepared[signature.cache] = prepared.pop(name)
    _check_prepared(model, prepared, signature.cache, cache, tokens["input_ids"].shape)
    return prepared


def _check_prepared(
    model: PreTrainedModel, prepared: dict[str, Any], name: str, cache: Cache, shape: torch.Size
) -> None:
    """Raise ValueError if the family's own preparation lost the cache or tokens: the text would go on without them."""
    ids = prepared.get("input_ids")
    read = shape if ids is None else ids.shape  # none: the family embeds them itself
    if prepared.get(name) is cache and read == shape:
        return
    lost = f"input_ids {tuple(read)}" if prepared.get(name) is cache else ", ".join(prepared)
    raise ValueError(
        f"{type(model).__name__}.prepare_inputs_for_generation: it must return the cache that it gets as `{name}` and "
        f"all tokens {tuple(shape)}, got {lost}. Return both, or pass use_cache=False. {tried('transformers')}"
    )
