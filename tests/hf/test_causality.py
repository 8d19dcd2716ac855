"""Parts that read future tokens are refused, and nothing else is: one run on two rows that differ in the last token."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
from families import FAMILIES, OTHERS, prompts
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    LlamaModel,
)

from calm_fast.hf import ComposedForCausalLM, causality, compose

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def llama(seed: int = 0) -> Any:
    return FAMILIES["llama"].model(seed)


def bert(cls: Any = BertLMHeadModel, **kwargs: Any) -> Any:
    torch.manual_seed(2)
    return cls(BertConfig(**SIZES, max_position_embeddings=64, **kwargs)).eval()


def gemma(bidirectional: bool) -> Any:
    torch.manual_seed(2)
    sizes = {"num_key_value_heads": 2, "head_dim": 8, "use_bidirectional_attention": bidirectional}
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **sizes)).eval()


@pytest.mark.seam(
    attach="a part that reads future tokens (an encoder, a BERT without `is_decoder`, a bidirectional Gemma 3)",
    to="composition",
    result="refused",
    why="earlier tokens would learn about later ones; use a causal model",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (lambda: (llama(), bert(BertModel)), "`augmenters` must be models that read no .*, got augmenter 0 .BertModel"),
        (
            lambda: (llama(), [llama(1), bert()]),
            "`augmenters` .* got augmenter 1 .*is_decoder=False.. Load it",
        ),
        (lambda: (bert(), llama()), "`anchor` must be a causal model, got BertLMHeadModel, .*is_decoder=False"),
        (lambda: (llama(), gemma(True)), "`augmenters` .*its config says use_bidirectional_attention=True"),
        (lambda: (gemma(True), llama()), "`anchor` .*its config says use_bidirectional_attention=True"),
    ],
)
def test_a_part_that_reads_the_future_is_refused(parts: Any, message: str, dtype: torch.dtype) -> None:
    # the usual spread of 0.02: the last token changes earlier states by less than 1 %
    anchor, augmenters = parts()
    for model in (anchor, *(augmenters if isinstance(augmenters, list) else [augmenters])):
        model.to(dtype)
    with pytest.raises(ValueError, match=f"compose: {message}"):
        compose(anchor, augmenters, "uniform:2")
    assert isinstance(compose(anchor, augmenters, "uniform:2", probe=False), ComposedForCausalLM)


def looping() -> Any:
    """Return a model that runs its layer 1 twice per forward."""
    model, inside = llama(1), []

    def again(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        if inside:
            return None
        inside.append(True)
        try:
            return module(output, *args[1:], **kwargs)
        finally:
            inside.clear()

    model.model.layers[1].register_forward_hook(again, with_kwargs=True)
    return model


def with_streams() -> Any:
    """Return a model whose layer 1 gives two residual streams, which layer 2 adds up."""
    model = llama(1)
    layers = model.model.layers
    split, join = layers[1].forward, layers[2].forward
    layers[1].forward = lambda hidden, *args, **kwargs: torch.stack([split(hidden, *args, **kwargs)] * 2)
    layers[2].forward = lambda hidden, *args, **kwargs: join(hidden.sum(0), *args, **kwargs)
    return model


class Lengthens(LlamaForCausalLM):
    """A model whose layers see one token more than it is given, as those with a prompt of their own do."""

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        out = super().forward(torch.cat([input_ids[:, :1], input_ids], dim=1), **kwargs)
        out.logits = out.logits[:, 1:]
        return out


PROBED = {
    "loops": (looping, "run once per forward, got a LlamaDecoderLayer of {part} that ran twice"),
    "carries two streams": (
        with_streams,
        r"\(batch, tokens, width\), here \(2, 4, 32\) in .*got shape \(2, 2, 4, 32\)",
    ),
}


@pytest.mark.parametrize("part", ["the anchor", "augmenter 0"])
@pytest.mark.parametrize("kind", PROBED)
def test_layers_that_cannot_be_connected_are_refused_by_compose(kind: str, part: str) -> None:
    make, message = PROBED[kind]
    parts = (make(), llama()) if part == "the anchor" else (llama(), make())
    with pytest.raises(ValueError, match="compose: `connections` must be of layers .*" + message.format(part=part)):
        compose(*parts, [(0, 0), (1, 1)])
    assert isinstance(compose(*parts, [(1, 1)], probe=False), ComposedForCausalLM)
    assert not compose(*parts, [(0, 0)]).unproven  # the layers that run once can be connected


def test_an_anchor_that_lengthens_its_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`connections` .* here \(2, 4, 32\) in Lengthens, got shape \(2, 5, 32\)"):
        compose(Lengthens(llama().config).eval(), llama(), "uniform:2")


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gemma3_text", "mamba", "qwen3_next"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_families_pass(name: str, dtype: torch.dtype) -> None:
    family = {**FAMILIES, **OTHERS}[name]
    composed = compose(family.model(0).to(dtype), family.model(1).to(dtype), "uniform:2", num_heads=4)
    assert not composed.unproven


def test_causal_variants_of_the_same_classes_pass() -> None:
    assert not compose(llama(), [bert(is_decoder=True), gemma(False)], "uniform:2").unproven


class ReadsItsPrompt(LlamaForCausalLM):
    """A prefix language model: the headless body is causal, but the model gives it a mask that is not."""

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        batch, tokens = input_ids.shape
        mask = torch.zeros(batch, 1, tokens, tokens)
        return super().forward(input_ids, attention_mask=mask, **kwargs)


def test_an_anchor_that_builds_its_own_masks_is_tried_as_a_whole() -> None:
    with pytest.raises(ValueError, match="`anchor` must be a causal model, got ReadsItsPrompt, .*probe=False"):
        compose(ReadsItsPrompt(llama().config).eval(), llama(), "uniform:2")
    assert not compose(llama(), ReadsItsPrompt(llama().config).eval(), "uniform:2").unproven  # only its body is called


def last_token_noise(size: float) -> Any:
    """Return a hook that changes every state by `size`, with a sign that depends on the last token."""

    def hook(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        fixed = output.detach()
        return output + size * fixed * fixed[:, -1:, :1].sign()

    return hook


@pytest.mark.parametrize(("size", "refused"), [(1e-7, False), (1e-2, True)])
def test_the_rounding_of_a_router_is_told_from_a_leak(size: float, refused: bool) -> None:
    augmenter = llama(1)
    ids = torch.arange(97)
    # the two last tokens that are tried must give both signs in the first layer's output
    augmenter.get_input_embeddings().weight.data[:, 0] = torch.where(ids % 2 == 0, 50.0, -50.0)
    augmenter.model.layers[1].register_forward_hook(last_token_noise(size))
    if refused:
        with pytest.raises(ValueError, match="`augmenters` must be models that read no future token"):
            compose(llama(), augmenter, "uniform:3")
    else:
        assert not compose(llama(), augmenter, "uniform:3").unproven


@pytest.mark.parametrize("make", [lambda: bert(), lambda: llama(1)])
def test_a_part_that_cannot_run_yet_is_tried_at_the_first_forward(make: Any) -> None:
    augmenter, broken = make(), [True]

    def no_kernel(*_: Any) -> None:
        if broken[0]:
            raise RuntimeError("no kernel for this device")

    augmenter.base_model.register_forward_pre_hook(no_kernel)
    composed = compose(llama(), augmenter, "uniform:2")
    assert composed.unproven
    with pytest.raises(RuntimeError, match="no kernel for this device"):
        composed(prompts())
    broken[0] = False
    if isinstance(augmenter.base_model, LlamaModel):
        assert composed(prompts()).logits.shape == (2, 9, 97) and not composed.unproven
    else:
        with pytest.raises(ValueError, match="ComposedForCausalLM: `augmenters` must be models that read no future"):
            composed(prompts())


def test_the_probe_leaves_no_trace() -> None:
    anchor, augmenter = FAMILIES["falcon"].model(0), llama(1)  # Falcon has dropout
    embeddings = augmenter.get_input_embeddings()
    torch.manual_seed(5)
    composed = compose(anchor, augmenter, "uniform:2", probe=True)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    compose(anchor, augmenter, "uniform:2", probe=False)
    assert torch.equal(state, torch.get_rng_state())
    assert not embeddings._forward_hooks and all(p.grad is None for p in composed.parameters())


def test_a_loaded_composition_is_checked_again(tmp_path: Any) -> None:
    composed = compose(llama(), gemma(False), "uniform:2")
    composed.save_pretrained(tmp_path)
    other = gemma(True)
    with pytest.raises(ValueError, match="from_pretrained: `augmenters` must be models that read no future token"):
        ComposedForCausalLM.from_pretrained(tmp_path, anchor=llama(), augmenters=other, check_parts=False)


@pytest.mark.seam(
    attach="packed rows (`position_ids` that restart) and a part that mixes documents (OPT, BLOOM, MPT, Mamba)",
    to="composition",
    result="refused",
    why="its later documents would read the earlier ones; give each document a row of its own, with padding",
)
@pytest.mark.parametrize("role", ["anchor", "augmenter"])
@pytest.mark.parametrize("name", ["opt", "bloom", "mpt", "mamba"])
def test_packed_rows_are_refused_over_a_part_that_mixes_documents(name: str, role: str) -> None:
    parts = [(FAMILIES | OTHERS)[name].model(0), FAMILIES["llama"].model(1)]
    composed = compose(*(parts if role == "anchor" else parts[::-1]), [(0, 1)], num_heads=4)
    ids, positions = prompts(), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    kind = type(parts[0]).__name__
    with pytest.raises(ValueError, match=f"`position_ids` must be positions that do not restart, because .*{kind}"):
        composed(ids, position_ids=positions)
    composed(ids)


@pytest.mark.parametrize("threaded", ["body", "embedding"])
def test_a_trial_run_does_not_mind_other_threads(threaded: str) -> None:
    composed = compose(FAMILIES["llama"].model(0), FAMILIES["llama"].model(1), [(0, 1)])
    body, ids = composed.anchor.model, prompts()
    seen: list[Any] = []

    def run_beside() -> None:
        states = body(ids, use_cache=False)[0]
        seen.append(states)

    def beside(_module: Any, _args: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=run_beside)
            other.start()
            other.join()

    # the other thread's call ends inside the trial run, before its own states are there
    with body.layers[0].register_forward_pre_hook(beside):
        if threaded == "body":
            composed(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]))
            assert composed.separates
        else:
            anchor = composed.anchor
            states = lambda: [anchor(ids, use_cache=False).logits]  # noqa: E731
            assert causality._gradient_from_the_last_token(anchor, states) is False
    assert seen and not any(states.requires_grad for states in seen)
