"""Errors for bad input name the argument, what it must be and what came. One rule finds the layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, OTHERS, composed_model, prompts, randomize
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from calm_fast.hf import compose, find_layers, resolve_connections
from calm_fast.hf.hooks import running
from calm_fast.hf.masks import CAUSAL, aligned_visibility


@pytest.mark.parametrize(
    ("spec", "depths", "expected"),
    [
        ("uniform:1", [3], [[(0, 0)]]),
        ("uniform:2", [3], [[(0, 0), (2, 7)]]),
        ("uniform:3", [4], [[(0, 0), (2, 4), (3, 7)]]),  # 1.5 and 3.5 round half to even
        ("uniform:4", [8], [[(0, 0), (2, 2), (5, 5), (7, 7)]]),
        ("uniform:6", [2], [[(0, 0), (0, 1), (0, 3), (1, 4), (1, 6), (1, 7)]]),
        ("uniform:2", [3, 5], [[(0, 0), (2, 7)], [(0, 0), (4, 7)]]),
        ([(2, 7), (-1, -1)], [3], [[(2, 7), (-1, -1)]]),
        ([[2, 7], [0, 0]], [3], [[(2, 7), (0, 0)]]),
        ([(0, 0), (1, 1)], [3, 3], [[(0, 0), (1, 1)]] * 2),
        (["uniform:1", [(2, 7)]], [3, 3], [[(0, 0)], [(2, 7)]]),
        ([[(0, 0)], [(1, 1), (2, 2)]], [3, 3], [[(0, 0)], [(1, 1), (2, 2)]]),
    ],
)
def test_connections_resolve(spec: Any, depths: list[int], expected: list[Any]) -> None:
    assert resolve_connections(spec, depths, 8) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("uniform", "got 'uniform'"),
        ("uniform:0", "n >= 1, got 'uniform:0'"),
        ("uniform:-2", "got 'uniform:-2'"),
        ("uniform:2.5", "got 'uniform:2.5'"),
        ("every:2", "got 'every:2'"),
        ("uniform:9", "at most as many pairs as the deeper model has layers .3 in .*, 8 in .*, got 'uniform:9'"),
        ([], "at least one pair"),
        ([(3, 0)], r"augmenter layers in \[-1, 3\).*got 3 in \(3, 0\)"),
        ([(0, 8)], r"anchor layers in \[-1, 8\).*got 8 in \(0, 8\)"),
        ([(-2, 0)], r"augmenter layers in \[-1, 3\).*got -2"),
        ([(0, -2)], "anchor layers .* got -2"),
        ([(0, 1), (2, 2), (0, 1)], r"different pairs, got \(0, 1\) twice"),
        ([(0.0, 1)], "got"),
        ([(True, 1)], "got"),
        ([(0, 1, 2)], "got"),
        ([(0, 1), "uniform:2"], "got"),
        ([0, 1], r"or one of these per augmenter, got \[0, 1\]"),
        (3, "got 3"),
        (None, "got None"),
        (["uniform:2", "uniform:2"], r"one entry per augmenter \(1\), got 2"),
        ([[("0", 1)]], "got"),
    ],
)
def test_bad_connections_are_refused(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"compose: `connections` must be .*{message}"):
        resolve_connections(spec, [3], 8)


def llama(**kwargs: Any) -> Any:
    return FAMILIES["llama"].model(0, **kwargs)


def encoder_decoder() -> Any:
    return T5ForConditionalGeneration(T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: (llama(), []), "compose: `augmenters` must be at least one model, got none"),
        (lambda: (llama(), torch.nn.Linear(2, 2)), "`augmenters` must be a transformers model or a path, got Linear"),
        (lambda: (None, llama()), "`anchor` must be a transformers model or a path, got NoneType"),
        (
            lambda: ("/nowhere/anchor", llama()),
            "`anchor` must be .* got '/nowhere/anchor', a folder that does not exist",
        ),
        (lambda: (llama(), "./nowhere"), "`augmenters` must be .* got './nowhere', a folder that does not exist"),
        (lambda: (llama(), [Path("nowhere")]), "`augmenters` must be .* got 'nowhere', a folder that does not exist"),
        (lambda: ("models/", llama()), "`anchor` must be .* got 'models/', a folder that does not exist"),
        (
            lambda: ("models/anchor", llama()),
            "`anchor` must be .* got 'models/anchor', a folder that does not exist in .* hub",
        ),
        (
            lambda: (llama(), ["nowhere"]),
            "`augmenters` must be .* got 'nowhere', a folder that does not exist in .* hub",
        ),
        (lambda: (llama().model, llama()), "`anchor` must be a causal language model, .*got LlamaModel"),
        (
            lambda: (llama(), llama(vocab=90)),
            "`augmenters` must be .* 0 to 96, got augmenter 0 .* embeds 90 token ids.*`vocab_size`",
        ),
        (lambda: (llama(), [llama(), llama(vocab=64)]), "`augmenters` must be .*, got augmenter 1 .* embeds 64"),
        (
            lambda: (llama(), with_lists(3, 3)),
            "compose: `augmenter_layers` must be given .*LlamaForCausalLM has 2: model.layers, model.more",
        ),
        (lambda: (with_lists(0, 2), llama()), "compose: `anchor_layers` must be given .*LlamaForCausalLM has 0: none"),
        (
            lambda: (OTHERS["mamba"].model(width=13), llama()),
            "`num_heads` must be given for MambaForCausalLM, .* width 13 is no multiple of 16 to 64",
        ),
        (
            lambda: (llama(), encoder_decoder()),
            "`augmenters` must be a decoder-only model, got T5ForConditionalGeneration",
        ),
        (lambda: (composed_model("llama"), llama()), "`anchor` must be a model that is no composition, got a Composed"),
    ],
)
def test_models_that_cannot_be_composed_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose(*arguments(), "uniform:2")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"anchor_layers": "model.norm"}, "compose: `anchor_layers` must be .* of LlamaForCausalLM, got 'model.norm'"),
        ({"augmenter_layers": "model.blocks"}, "compose: `augmenter_layers` must be .*, got 'model.blocks'"),
        ({"augmenter_layers": ["model.layers", None]}, r"`augmenter_layers` must be .*\(1\), got 2 paths"),
        ({"num_heads": 5}, "num_heads"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads"),
        ({"connections": [(7, 0)]}, "`connections` must be "),
        ({"dtype": "float31"}, "`dtype` must be a floating-point dtype .*, got 'float31'"),
        ({"dtype": torch.int64}, "`dtype` must be a floating-point dtype .*, got torch.int64"),
        ({"dtype": 16}, "`dtype` must be .*, got 16"),
        ({"model_kwargs": "bf16"}, "`model_kwargs` must be a dict .*, got str 'bf16'"),
        ({"vocab_size": "x"}, "`vocab_size` must be a positive integer or None, got str 'x'"),
        ({"vocab_size": 0}, "`vocab_size` must be .*, got int 0"),
    ],
)
def test_bad_compose_arguments_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        compose(llama(), llama(), **({"connections": "uniform:2"} | kwargs))


def test_a_smaller_vocabulary_is_accepted_where_its_ids_suffice() -> None:
    composed = compose(llama(), llama(vocab=90), "uniform:1", vocab_size=90)
    assert composed(prompts().clamp(max=89)).logits.shape[-1] == 97


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"input_ids": None}, "`input_ids` must be a tensor of token ids .*, got None"),
        ({"input_ids": "1+2?"}, "`input_ids` must be a tensor of token ids .*, got str '1\\+2\\?'"),
        ({"input_ids": prompts()[0]}, r"`input_ids` must be 2-dimensional \(batch, tokens\), got shape \(9,\)"),
        ({"input_ids": prompts().float()}, "`input_ids` must be int64 or int32 token ids, got torch.float32"),
        ({"input_ids": prompts() + 97}, "`input_ids` must be token ids from 0 to 96 .Llama.* embeds 97.*, got 1"),
        ({"input_ids": prompts() - 97}, "`input_ids` must be token ids from 0 to 96 .*, got -"),
        ({"input_ids": ones(2, 1) * 97}, "`input_ids` must be .* from 0 to 96 .*, got 97"),
        (
            {"augmenter_input_ids": ones(2, 3) * 97, "hi": ones(2, 9)},
            "`augmenter_input_ids` must be .* 0 to 96 .*, got 97",
        ),
        ({"augmenter_input_ids": ones(3), "hi": ones(2, 9)}, r"`augmenter_input_ids` must be .*, got shape \(3,\)"),
        ({"inputs_embeds": torch.zeros(2, 9, 32)}, "`inputs_embeds` must be None, got a value. Pass `input_ids`"),
        ({"attention_mask": ones(2, 8)}, r"`attention_mask` must be of shape \(2, 9\).*got shape \(2, 8\)"),
        ({"attention_mask": ones(2, 1, 9, 9)}, r"`attention_mask` must be .*got shape \(2, 1, 9, 9\)"),
        (
            {"attention_mask": ones(2, 9) - torch.eye(9)[3:5].int(), "use_cache": True},
            "`attention_mask` must be .* where a cache is kept, got .*zeros between ones.*use_cache=False",
        ),
        ({"attention_mask": [[1] * 9] * 2}, "`attention_mask` must be a tensor .* or None, got list"),
        ({"attention_mask": ones(2, 9).numpy()}, "`attention_mask` must be a tensor .* or None, got ndarray"),
        ({"attention_mask": "ones"}, "`attention_mask` must be a tensor .* or None, got str 'ones'"),
        ({"position_ids": [list(range(9))]}, "`position_ids` must be a tensor .* or None, got list"),
        ({"labels": prompts().tolist()}, "`labels` must be a tensor .* or None, got list"),
        ({"cache": object()}, "`cache` must be a ComposedCache, or an empty cache .*, got object"),
        ({"augmenter_input_ids": prompts()}, "`hi` must be given with `lo` or .* got None"),
        ({"lo": ones(2, 9)}, "`hi` must be given with `lo` or .* got None"),
        (
            {"augmenter_attention_mask": ones(2, 9), "hi": ones(2, 9)},
            "`augmenter_input_ids` must be given with .* got None",
        ),
        ({"hi": [ones(2, 9), ones(2, 9)]}, "`hi` must be a tensor, or a list .* 1 augmenters"),
        ({"hi": [3]}, r"`hi` must be a tensor.*, got 1: list \[3\]"),
        ({"hi": ones(2, 8)}, "hi"),
    ],
)
def test_bad_forward_arguments_are_refused(kwargs: dict[str, Any], message: str) -> None:
    composed = composed_model("llama")
    with pytest.raises((ValueError, TypeError), match=message):
        composed(**({"input_ids": prompts()} | kwargs))
    assert running() is None


@pytest.mark.parametrize("mask", [[[1] * 9] * 2, ones(2, 9).numpy()], ids=["list", "numpy"])
def test_a_mask_that_is_no_tensor_is_refused_by_generate(mask: Any) -> None:
    with pytest.raises(ValueError, match="`attention_mask` must be a tensor .* or None, got (list|ndarray)"):
        composed_model("llama").generate(prompts(), attention_mask=mask, max_new_tokens=2)


def test_ids_that_only_the_anchor_embeds_are_refused() -> None:
    composed = compose(llama(), llama(vocab=90), "uniform:1", vocab_size=90)
    with pytest.raises(ValueError, match="`input_ids` must be token ids from 0 to 89 .*, got 93"):
        composed(ones(1, 4) * 93)
    hi = torch.full((1, 4), 4, dtype=torch.int32)  # an augmenter that reads its own tokens does not limit the anchor's
    assert composed(ones(1, 4) * 93, augmenter_input_ids=ones(1, 4), hi=hi).logits.shape == (1, 4, 97)


def test_layers_named_by_path_are_used() -> None:
    path = "transformer.h"  # CTRL's layers are plain modules; the generic rule finds them by their number
    anchor, augmenter = OTHERS["ctrl"].model(0), OTHERS["ctrl"].model(1)
    assert find_layers(anchor)[0] == path
    composed = randomize(compose(anchor, augmenter, "uniform:2", augmenter_layers=path))
    ids, how = prompts(), {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(composed.generate(ids, **how), composed.generate(ids, use_cache=False, **how))
    # they train like any others, but transformers has no way to checkpoint them
    composed.train()
    composed(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in composed.connections.parameters())
    with pytest.raises(ValueError, match="`anchor` must be a model whose layers transformers can checkpoint, got CTRL"):
        composed._set_gradient_checkpointing(enable=True)  # what every release's ..._checkpointing_enable calls


def with_lists(layers: int, more: int) -> Any:
    """Return a Llama of 3 layers by its config, with lists of `layers` and `more` layers."""
    model, other = llama(), llama()
    model.model.layers = model.model.layers[:layers]
    model.model.more = other.model.layers[:more]
    if layers == 0:
        model.model.more = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(more))
    return model


class HeadAsDecoder(LlamaForCausalLM):
    """A model whose get_decoder() leads to a module without layers, as ModernBERT's decoder does."""

    def get_decoder(self) -> Any:
        return self.lm_head


def test_layers_are_found_where_several_lists_or_a_wrong_decoder_would_mislead() -> None:
    model = with_lists(3, 2)
    assert find_layers(model) == ("model.layers", model.model.layers)
    assert find_layers(HeadAsDecoder(llama().config))[0] == "model.layers"
    with pytest.raises(ValueError, match="find_layers: `path` must be given .*has 2: model.layers, model.more"):
        find_layers(with_lists(2, 2))


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_found_by_the_generic_rule(name: str) -> None:
    model = FAMILIES[name].model()
    path, layers = find_layers(model)
    assert model.get_submodule(path) is layers and len(layers) == 3
    assert find_layers(model, path) == (path, layers)


def test_visibility_of_padding_documents_and_steps() -> None:
    assert aligned_visibility(None, None, 2, 0, 3) is CAUSAL
    assert aligned_visibility(ones(2, 3), None, 2, 0, 3) is CAUSAL
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    lo, hi, causal, *_ = aligned_visibility(mask, None, 2, 0, 4)
    assert not causal and lo.dtype == hi.dtype == torch.int32
    assert lo.tolist() == [[2] * 4, [0] * 4]
    assert hi.tolist() == [[2, 2, 3, 4], [1, 2, 3, 0]]
    lo, hi, *_ = aligned_visibility(mask[:1], None, 1, 3, 1)
    assert (lo.tolist(), lo.dtype, hi) == ([[2]], torch.int32, None)  # from the first real token up to the query itself
    assert aligned_visibility(ones(2, 4), None, 2, 3, 1) is CAUSAL
    lo, hi, *_ = aligned_visibility(mask, None, 2, 3, 1)
    assert lo.tolist() == [[2], [0]] and hi.tolist() == [[4], [0]]  # the second row's token is padding
    lo, hi, *_ = aligned_visibility(torch.tensor([[0, 0, 0], [0, 1, 1]]), None, 2, 2, 1)
    assert lo.tolist() == [[0], [1]] and hi.tolist() == [[0], [3]]
    with pytest.raises(ValueError, match="zeros between ones"):
        aligned_visibility(torch.tensor([[1, 0, 1]]), None, 1, 2, 1)
    lo, hi, *_ = aligned_visibility(None, torch.tensor([[0, 1, 0, 1, 2]]), 2, 0, 5)
    assert lo.tolist() == [[0, 0, 2, 2, 2]] * 2 and hi.tolist() == [[1, 2, 3, 4, 5]] * 2


@pytest.mark.parametrize("name", ["augmenter_input_ids", "hi"])
def test_generate_refuses_other_tokens_of_the_augmenter(name: str) -> None:
    model = composed_model("llama")
    ids = torch.randint(1, 90, (1, 4))
    with pytest.raises(ValueError, match=f"generate: `{name}` must be None"):
        model.generate(ids, max_new_tokens=2, **{name: ids})


def test_a_prompt_holds_a_token() -> None:
    model, none = composed_model("llama"), prompts()[:, :0]
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"`input_ids` must be at least one token per row, got shape \(2, 0\)"):
            call(none)
