"""The cache under every name: names that users write, names of transformers releases, and an unknown name."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, OTHERS, composed_model, prompts, randomize
from transformers import (
    DynamicCache,
    FlaubertWithLMHeadModel,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    XLMWithLMHeadModel,
)
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import ModelOutput

from calm_fast.consistency.sampling.prefix import PrefixReader
from calm_fast.consistency.sampling.scoring import score_sequences
from calm_fast.hf import ComposedCache, ComposedForCausalLM, compose
from calm_fast.hf.cache_names import (
    NAMES,
    cache_argument,
    cache_of,
    generate_argument,
    given_cache,
    has_own_cache,
    with_cache,
)
from calm_fast.hf.inputs import Signature
from calm_fast.hf.recompute import lacks_cache

GREEDY = {"max_new_tokens": 6, "do_sample": False}
each_name = pytest.mark.parametrize("name", NAMES)
# the name that LlamaForCausalLM itself takes in the installed release
OWN = cache_argument(LlamaForCausalLM.forward)


@dataclass
class LogitsAndCache(ModelOutput):
    """Outputs of a release whose only name for the cache is ``cache``."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: Cache | None = None


class NewNameOnly(LlamaForCausalLM):
    """A Llama of a release without the old names."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> LogitsAndCache:
        told = {"attention_mask": attention_mask, "position_ids": position_ids, "labels": labels}
        told |= {"use_cache": use_cache, "logits_to_keep": logits_to_keep, OWN: cache}
        found = super().forward(input_ids, **told)
        return LogitsAndCache(loss=found.loss, logits=found.logits, cache=cache_of(found))


class OldNameOnly(LlamaForCausalLM):
    """A Llama as older remote code writes it."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        told = {"attention_mask": attention_mask, "position_ids": position_ids, "labels": labels, OWN: past_key_values}
        return super().forward(input_ids, use_cache=use_cache, **told)


class PreparesAnotherName(LlamaForCausalLM):
    """A Llama of remote code whose preparation gives the cache a name that nobody reads."""

    def prepare_inputs_for_generation(self, input_ids: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask"), "past": past_key_values}


class PreparesTheLastToken(LlamaForCausalLM):
    """A Llama of older remote code, which takes everything but the last token for cached."""

    def prepare_inputs_for_generation(self, input_ids: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return {"input_ids": input_ids[:, -1:], OWN: past_key_values, "use_cache": True}


class UnknownName(LlamaForCausalLM):
    """A Llama of a release that has renamed the cache again."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, memory: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, attention_mask=attention_mask, **kwargs, **{OWN: memory})


class DictCache(LlamaForCausalLM):
    """A model whose ``cache`` is not a transformers Cache, as in XLM."""

    def forward(self, input_ids: Any = None, cache: dict[str, torch.Tensor] | None = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, **kwargs)


def made(kind: type[LlamaForCausalLM], seed: int = 0) -> LlamaForCausalLM:
    """Return a model of `kind` with the weights of the Llama family for `seed`."""
    llama = FAMILIES["llama"].model(seed)
    model = kind(llama.config).eval()
    model.load_state_dict(llama.state_dict())
    return model


# ---- what users write ----------------------------------------------------------------------------------------------


@pytest.mark.old_names
@each_name
@torch.no_grad()
def test_forward_takes_and_returns_every_name(name: str) -> None:
    composed, ids = composed_model("llama"), prompts()
    first = composed(ids[:, :5])
    assert isinstance(first.cache, ComposedCache) and first.past_key_values is first.cache
    rest = composed(ids[:, 5:], **{name: first.cache})
    torch.testing.assert_close(rest.logits, composed(ids, use_cache=False).logits[:, 5:], rtol=0, atol=1e-4)
    assert rest.cache is first.cache and rest.cache.get_seq_length() == 9
    without = composed(ids, use_cache=False)
    assert without.cache is None and without.past_key_values is None


@torch.no_grad()
def test_the_cache_keeps_its_place_among_the_arguments() -> None:
    composed, ids = composed_model("llama"), prompts()
    cache = composed(ids[:, :5]).cache
    assert composed(ids[:, 5:], None, None, cache).cache is cache


@pytest.mark.old_names
@each_name
def test_generate_takes_and_returns_every_name(name: str) -> None:
    composed, ids = composed_model("llama"), prompts()
    first = composed.generate(ids, **GREEDY | {"max_new_tokens": 2}, return_dict_in_generate=True)
    assert isinstance(first.cache, ComposedCache) and first.past_key_values is first.cache
    more = {name: first.cache, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(composed.generate(first.sequences, **more), composed.generate(ids, **GREEDY))


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_two_names_at_once_are_named(call: str) -> None:
    composed, ids = composed_model("llama"), prompts()
    both = {"cache": composed.new_cache(), "past_key_values": composed.new_cache()}
    with pytest.raises(ValueError, match="under one name, got `cache` and `past_key_values`"):
        getattr(composed, call)(ids, **both)


def filled() -> DynamicCache:
    """Return a cache with one token in it."""
    cache = DynamicCache()
    cache.update(torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4), 0)
    return cache


@each_name
@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("foreign", [filled, tuple])
def test_a_cache_of_another_kind_is_refused_under_the_name_it_came_by(name: str, call: str, foreign: Any) -> None:
    """Also in releases that do not mark the caller's own cache, which would be wrapped with empty augmenter caches."""
    composed, ids = composed_model("llama"), prompts()
    with pytest.raises(ValueError, match=f"`{name}` must be .* got (tuple|a DynamicCache)"):
        getattr(composed, call)(ids, **{name: foreign()})


def test_trainer_never_gathers_the_cache_as_a_prediction(tmp_path: Path) -> None:
    composed, rows = composed_model("llama"), prompts(4)
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    found = Trainer(model=composed, args=arguments, eval_dataset=data).predict(data)
    assert isinstance(found.predictions, type(found.label_ids)) and found.predictions.shape[:2] == (4, 9)


# ---- what a transformers release calls it --------------------------------------------------------------------------


@pytest.mark.old_names
@pytest.mark.parametrize("kind", [NewNameOnly, OldNameOnly])
def test_a_forward_that_knows_one_name_alone_is_composed_and_generates(kind: type[LlamaForCausalLM]) -> None:
    ids = prompts()
    plain = randomize(compose(FAMILIES["llama"].model(0), FAMILIES["llama"].model(1), [(0, 1), (2, 2)]))
    composed = randomize(compose(made(kind, 0), made(kind, 1), [(0, 1), (2, 2)]))
    assert torch.equal(composed(ids).logits, plain(ids).logits)
    assert isinstance(composed(ids).past_key_values, ComposedCache)
    for how in (GREEDY, GREEDY | {"num_beams": 2}, GREEDY | {"attention_mask": torch.ones_like(ids)}):
        assert torch.equal(composed.generate(ids, **how), plain.generate(ids, **how))
    composed(ids, labels=ids).loss.backward()


def test_a_forward_that_knows_the_new_name_alone_shares_its_prompt_in_scoring() -> None:
    model, llama = made(NewNameOnly), FAMILIES["llama"].model(0)
    assert PrefixReader(model).shares
    asked = [[5, 6, 7]], [[[8, 9], [10], [11, 12, 13]]]
    (found,), (expected,) = score_sequences(model, *asked), score_sequences(llama, *asked)
    assert torch.equal(found.sum, expected.sum)


@pytest.mark.old_names
def test_outputs_without_the_field_are_put_into_some_that_have_it() -> None:
    @dataclass
    class Bare(ModelOutput):
        loss: torch.Tensor | None = None
        logits: torch.Tensor | None = None

    cache, logits = DynamicCache(), torch.ones(1)
    found = with_cache(Bare(logits=logits), cache, generate_argument())
    assert found.logits is logits and found.cache is cache and found.past_key_values is cache
    assert cache_of(Bare(logits=logits)) is None and cache_of(found) is cache


@pytest.mark.parametrize("name", ["llama", "mamba", "qwen3_next"])
def test_every_family_takes_its_cache_under_a_known_name(name: str) -> None:
    model = (FAMILIES | OTHERS)[name].model()
    signature = Signature.of(model)
    assert signature.cache in NAMES and signature.generated == generate_argument()
    with torch.no_grad():
        outputs = model(prompts(), use_cache=True)
        assert isinstance(cache_of(outputs), Cache)
        model(prompts(2, 1), **{signature.cache: cache_of(outputs), "use_cache": True})


# ---- an unknown name -----------------------------------------------------------------------------------------------


def test_an_unknown_name_is_an_error_that_says_what_was_tried() -> None:
    model = made(UnknownName)
    text = r"UnknownName\.forward: the cache argument must be named cache or .*got the arguments input_ids, .*memory"
    for call in (lambda: compose(model, model, "uniform:1"), lambda: PrefixReader(model)):
        with pytest.raises(ValueError, match=text):
            call()
    with pytest.raises(ValueError, match=text):
        score_sequences(model, [[5, 6]], [[[7]]])


def test_a_dict_is_a_cache_of_the_familys_own() -> None:
    assert cache_argument(DictCache.forward) is None and lacks_cache(made(DictCache))
    assert PrefixReader(made(DictCache)).signature is None
    signature = Signature.of(made(DictCache))
    assert signature.cache == "" and signature.recomputes == "has a cache of its own, a dict"


@pytest.mark.parametrize("kind", [XLMWithLMHeadModel, FlaubertWithLMHeadModel])
def test_families_whose_cache_is_a_dict_are_known(kind: Any) -> None:
    assert has_own_cache(kind.forward) and cache_argument(kind.forward) is None


def test_a_wrapper_that_hides_the_signature_is_named() -> None:
    model = FAMILIES["llama"].model(0)
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with pytest.raises(ValueError, match=r"got the arguments args, kwargs\. If forward is wrapped, wrap it"):
        PrefixReader(model)
    model.forward = functools.wraps(forward)(model.forward)
    assert PrefixReader(model).shares


def test_generate_without_a_known_name_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def renamed(self: Any, input_ids: Any, memory: Any = None, **kwargs: Any) -> Any: ...

    monkeypatch.setattr("calm_fast.hf.cache_names.GenerationMixin.prepare_inputs_for_generation", renamed)
    generate_argument.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"the cache argument must be named cache or .* transformers \S+ is inst"):
            generate_argument()
    finally:
        monkeypatch.undo()
        generate_argument.cache_clear()


class Forgetful(LlamaForCausalLM):
    """A Llama whose forward takes the cache but does not pass it on to the layers."""

    def forward(self, input_ids: Any = None, cache: Cache | None = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, **kwargs)


def test_a_cache_that_is_not_filled_is_told() -> None:
    model, llama = made(Forgetful), FAMILIES["llama"].model(0)
    asked = [[5, 6, 7]], [[[8, 9], [10]]]
    with pytest.warns(UserWarning, match="Forgetful: every prompt is read anew .* did not keep 3 tokens in the cache"):
        (found,) = score_sequences(model, *asked)
    torch.testing.assert_close(found.sum, score_sequences(llama, *asked)[0].sum, rtol=0, atol=1e-5)


def test_cache_layers_of_an_unknown_kind_are_told() -> None:
    class Compressed(DynamicLayer): ...

    class OwnLayers(PrefixReader):
        def new_cache(self) -> Cache:
            cache = DynamicCache()
            cache.layers = [Compressed(), Compressed()]
            return cache

    with pytest.warns(UserWarning, match=r"LlamaForCausalLM: every prompt .* cache layers of type Compressed are not"):
        reader = OwnLayers(FAMILIES["llama"].model(0))
    assert not reader.shares


@pytest.mark.parametrize("name", ["mamba", "qwen3_next", "rwkv"])
def test_a_known_recurrent_state_is_no_surprise(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not PrefixReader(OTHERS[name].model()).shares


@pytest.mark.parametrize("name", ["rwkv", "recurrent_gemma"])
def test_families_without_a_cache_are_known_as_such(name: str) -> None:
    model = OTHERS[name].model()
    assert lacks_cache(model)
    composed = compose(FAMILIES["llama"].model(), model, "uniform:1")
    assert lacks_cache(composed) == f"{type(model).__name__} {lacks_cache(model)}"
    for one in (model, composed):
        reader = PrefixReader(one)
        assert reader.signature is None and not reader.shares


def test_a_family_can_say_that_it_has_no_cache() -> None:
    class Stateless(UnknownName):
        @classmethod
        def _supports_default_dynamic_cache(cls) -> bool:
            return False

    model = made(Stateless)
    asked = [[5, 6, 7]], [[[8, 9], [10]]]
    (found,), (expected,) = score_sequences(model, *asked), score_sequences(FAMILIES["llama"].model(0), *asked)
    torch.testing.assert_close(found.sum, expected.sum, rtol=0, atol=1e-5)
    composed = compose(model, FAMILIES["llama"].model(1), "uniform:1")
    assert torch.equal(composed(prompts()).logits, model(prompts(), use_cache=False).logits)
    with pytest.raises(ValueError, match="`use_cache` must be False or None, because Stateless keeps its state"):
        composed(prompts(), use_cache=True)


def test_given_cache_names_what_came() -> None:
    cache = object()
    assert given_cache(cache=None, past_key_values=cache) == ("past_key_values", cache)
    assert given_cache(cache=None, past_key_values=None) == ("cache", None)


def test_a_composition_reads_its_signature_under_the_newest_name() -> None:
    assert cache_argument(ComposedForCausalLM.forward) == "cache"


@pytest.mark.parametrize("kind", [PreparesAnotherName, PreparesTheLastToken])
@pytest.mark.parametrize("place", ["anchor", "augmenter"])
def test_a_preparation_that_loses_the_cache_or_tokens_is_refused(kind: type[LlamaForCausalLM], place: str) -> None:
    plain = FAMILIES["llama"].model(0)
    part = kind(plain.config).eval()
    part.load_state_dict(plain.state_dict())
    others = FAMILIES["llama"].model(1)
    model = compose(*((part, others) if place == "anchor" else (others, part)), "uniform:2").eval()
    ids = prompts()
    with torch.no_grad(), pytest.raises(ValueError, match=rf"{kind.__name__}.prepare_inputs_for_generation: it must"):
        model(ids, cache=model(ids, use_cache=True).cache)
