"""score_sequences equals the plain forward, encodes a prompt once, and stays within its budget."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, OTHERS, VOCAB, character_tokenizer, composed_model, dual_lora_model, rows
from torch import nn
from transformers import AutoModelForCausalLM, BartForConditionalGeneration, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import calm_fast
from calm_fast.benchmarks.timing import peak_bytes
from calm_fast.consistency.sampling.head import find_linear_head
from calm_fast.consistency.sampling.prefix import PrefixReader, branch
from calm_fast.consistency.sampling.scoring import score_sequences
from calm_fast.core.numerics import error, sum_variance, unit_roundoff

PROMPTS = rows(9, 1, 13)
COMPLETIONS = [rows(5, 1, 11, 5, 2, 0, seed=i + 1) for i in range(3)]
RECOMPUTED = ("mamba", "qwen3_next", "olmo_hybrid", "rwkv", "recurrent_gemma")  # no cache that copies may continue
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB}
TINY |= {"intermediate_size": 48, "max_position_embeddings": 64, "num_key_value_heads": 2}
# families with something behind the linear head -> (1 / factor, cap / factor)
HEADS = {
    "gemma2": ({"head_dim": 8, "final_logit_softcapping": 30.0}, (1.0, 30.0)),
    "cohere": ({"logit_scale": 0.25}, (4.0, None)),
    "granite": ({"logits_scaling": 4.0}, (4.0, None)),
    "hyperclovax": ({"logits_scaling": 0.5}, (2.0, None)),
    "nanochat": ({"final_logit_softcapping": 15.0}, (1.0, 15.0)),
    "llama": ({"logit_scale": 0.25}, (1.0, None)),  # named in the config, not used by the model
}


@cache
def shared_model(name: str) -> PreTrainedModel:
    """A model for the tests that only read it: a family, "composed <family>", or "dual LoRA"."""
    if name == "dual LoRA":
        return dual_lora_model()
    composed = name.removeprefix("composed ")
    return composed_model(composed) if composed != name else {**FAMILIES, **OTHERS}[name].model(0)


@torch.no_grad()
def plain(model: nn.Module, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """log softmax of the model's own logits, the whole sequence in one forward, one row, no cache."""
    logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[0]
    table = logits.log_softmax(-1)
    return torch.stack([table[len(prompt) - 1 + i, token] for i, token in enumerate(completion)])


@torch.no_grad()
def padded(model: nn.Module, prompt: list[int], completions: list[list[int]]) -> list[torch.Tensor]:
    """The same for all completions of a prompt in one padded batch."""
    longest = max(map(len, completions))
    ids = torch.tensor([prompt + c + [5] * (longest - len(c)) for c in completions])
    tables = model(ids, use_cache=False).logits.log_softmax(-1)[:, len(prompt) - 1 :]
    return [table[torch.arange(len(c)), torch.tensor(c)] for table, c in zip(tables, completions, strict=True)]


def head_rounding(model: nn.Module, prompt: list[int], completion: list[int]) -> float:
    """What rounding in the head's product, its cap and the sum over V may do (core/numerics.py, second term)."""
    seen: list[torch.Tensor] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    plain(model, prompt, completion)
    handle.remove()
    size = (seen[0][0].double().abs() @ head.weight.detach().double().abs().T).max()
    unit = unit_roundoff(torch.float32)
    softcap = find_linear_head(model, lambda: model(torch.tensor([[5]]), use_cache=False)).softcap or 0.0
    # a capped logit is cap (1 - 2 / (exp(2 z / cap) + 1)): four results of up to the cap's size are rounded
    capped = torch.tensor(4 * softcap**2)
    variance = sum_variance(seen[0].shape[-1], size) + sum_variance(VOCAB, torch.ones(())) + capped
    return float(6 / math.sqrt(3) * unit * variance.sqrt() + unit * size)


def check(model: nn.Module, got: list[Any], prompts: Any = PROMPTS, completions: Any = COMPLETIONS) -> None:
    """Scores against the model in float64: at most twice as wrong as its plain float32 forwards, plus rounding."""
    double = copy.deepcopy(model).double()
    if "num_experts_per_tok" in vars(model.config):
        double.set_experts_implementation("eager")  # grouped products have no float64
    pairs = [(p, c, t) for p, cs, x in zip(prompts, completions, got, strict=True) for c, t in zip(cs, x, strict=True)]
    pairs = [pair for pair in pairs if pair[1]]
    truths = [plain(double, p, c) for p, c, _ in pairs]
    users = [plain(model, p, c) for p, c, _ in pairs]
    for prompt, group in zip(prompts, completions, strict=True):
        users += padded(model, prompt, [row for row in group if row])
    eager = max(error(own, t) for own, t in zip(users, truths * 2, strict=True))
    bound = 2 * eager + max(head_rounding(model, p, c) for p, c, _ in pairs)
    wrong = max(error(x, t) for (_, _, x), t in zip(pairs, truths, strict=True))
    assert wrong <= bound < 1e-3


@pytest.mark.parametrize("share", [True, False], ids=["shared", "recomputed"])
@pytest.mark.parametrize("depths", [(1, 2), (3, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("family", ["bart", "mbart"])
def test_a_decoder_of_another_depth_than_its_encoder(family: str, depths: tuple[int, int], share: bool) -> None:
    """Their configs' num_hidden_layers is the encoder's: a cache made from it has the wrong number of layers."""
    torch.manual_seed(0)
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    depth = dict(zip(("encoder_layers", "decoder_layers"), depths, strict=True))
    config = CONFIG_MAPPING[family](vocab_size=VOCAB, d_model=16, max_position_embeddings=64, **heads, **depth)
    config.is_decoder, config.is_encoder_decoder = True, False
    model = AutoModelForCausalLM.from_config(config).eval()
    reader = PrefixReader(model)
    cache = reader.new_cache()
    reader(torch.tensor([PROMPTS[0]]), cache=cache)
    assert reader.check_filled(cache, len(PROMPTS[0])) and len(cache.layers) == depths[1]  # the prompt is shared
    got = score_sequences(model, PROMPTS, COMPLETIONS, share_prompt=share, return_tokens=True)
    check(model, [x.token_logprobs for x in got])


@pytest.mark.parametrize("share", [True, False], ids=["shared", "recomputed"])
@pytest.mark.parametrize(
    "name", [*FAMILIES, *OTHERS, "dual LoRA", "composed llama", "composed gemma3_text", "composed bloom"]
)
def test_scores_equal_the_plain_forward(name: str, share: bool) -> None:
    model = shared_model(name)
    got = score_sequences(model, PROMPTS, COMPLETIONS, max_tokens=40, share_prompt=share, return_tokens=True)
    check(model, [x.token_logprobs for x in got])
    assert PrefixReader(model).shares == (name not in RECOMPUTED)
    for x, completions in zip(got, COMPLETIONS, strict=True):
        assert x.tokens.tolist() == [len(c) for c in completions]
        for k, row in enumerate(x.token_logprobs):
            assert row.dtype == torch.float32 and float(x.sum[k]) == float(row.double().sum())
        assert torch.equal(x.mean[:5], x.sum[:5] / x.tokens[:5])
        assert x.sum[5] == 0 and x.mean[5].isnan()  # the empty completion


@pytest.mark.parametrize("name", HEADS)
def test_what_follows_the_head_is_measured(name: str) -> None:
    extra, (temperature, softcap) = HEADS[name]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**(TINY | {"pad_token_id": 0} | extra))
    if name == "llama":
        config.logit_scale = 0.25
    config.initializer_range = 0.3
    model = AutoModelForCausalLM.from_config(config).eval()
    for dtype in (torch.float32, torch.bfloat16):
        head = find_linear_head(model.to(dtype), lambda: model(torch.tensor([[0]])))  # token 0: a state of zeros
        assert (head.temperature, head.softcap) == (temperature, softcap)
    got = score_sequences(model.float(), PROMPTS, COMPLETIONS, return_tokens=True)
    check(model, [x.token_logprobs for x in got])


class Doubled(nn.Linear):
    """A head that is no plain linear layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + super().forward(x).sin()


@pytest.mark.parametrize("share", [True, False], ids=["shared", "recomputed"])
@pytest.mark.parametrize("kind", ["a head of its own", "logits changed after the head"])
def test_other_heads_have_their_logits_computed(kind: str, share: bool, monkeypatch) -> None:
    model = FAMILIES["qwen3"].model(0)
    if kind == "a head of its own":
        head = Doubled(32, VOCAB, bias=False)
        head.weight = model.lm_head.weight
        model.lm_head = head
    else:
        model.register_forward_hook(lambda module, args, out: out.__setitem__("logits", out.logits * out.logits.cos()))
    monkeypatch.setattr("calm_fast.consistency.sampling.scoring._LOGITS_AT_ONCE", 30 * VOCAB)
    assert find_linear_head(model, lambda: model(torch.tensor([[5]]))) is None
    got = score_sequences(model, PROMPTS, COMPLETIONS, share_prompt=share, return_tokens=True, return_entropy=True)
    for prompt, completions, x in zip(PROMPTS, COMPLETIONS, got, strict=True):
        for completion, logprobs, entropies in zip(completions, x.token_logprobs, x.token_entropies, strict=True):
            if completion:
                torch.testing.assert_close(logprobs, plain(model, prompt, completion), rtol=1e-5, atol=2e-5)
                assert entropies.shape == logprobs.shape and (entropies > 0).all()


def test_entropies_are_those_of_the_distribution() -> None:
    model = shared_model("llama")
    got = score_sequences(model, PROMPTS[:1], COMPLETIONS[:1], return_entropy=True)[0]
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0] + COMPLETIONS[0][2]])).logits[0]
    expected = torch.distributions.Categorical(logits=logits.double()).entropy()[8:-1]
    torch.testing.assert_close(got.token_entropies[2].double(), expected, rtol=1e-5, atol=1e-5)
    assert got.token_logprobs is None and len(got.token_entropies[5]) == 0


@contextmanager
def tokens_read(model: nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of everything that the model's embedding reads within the block."""
    seen: list[tuple[int, ...]] = []
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    yield seen
    handle.remove()


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "composed qwen3"])
def test_prompt_is_encoded_once_and_only_tokens_with_a_successor_are_read(name: str) -> None:
    model, completions = shared_model(name), [rows(*[7] * 12)]
    with tokens_read(model) as seen:
        score_sequences(model, PROMPTS[2:], completions, max_tokens=80)
    # one token tells what follows the head, and two rows of four whether a token sees the next one
    anchor = [shape for shape in seen if shape not in ((1, 1), (2, 4))]
    assert anchor == [(1, 13), (4, 6), (4, 6), (4, 6)]
    with tokens_read(model) as seen:
        score_sequences(model, PROMPTS[2:], completions, share_prompt=False)
    assert [shape for shape in seen if shape not in ((1, 1), (2, 4))] == [(12, 13 + 6)]


@pytest.mark.parametrize("name", ["llama", "mistral", "mixtral", "mamba"])
def test_neither_neighbours_nor_budget_change_a_score(name: str) -> None:
    model = shared_model(name)
    expected = score_sequences(model, PROMPTS, COMPLETIONS)
    for i, (prompt, completions) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        for budget in (1, 57, 10**6):
            got = score_sequences(model, [prompt], [completions[::-1]], max_tokens=budget)[0]
            torch.testing.assert_close(got.sum.flip(0), expected[i].sum, rtol=1e-5, atol=5e-5)
        alone = [score_sequences(model, [prompt], [[c]])[0].sum for c in completions]  # K = 1
        torch.testing.assert_close(torch.cat(alone), expected[i].sum, rtol=1e-5, atol=5e-5)


def test_no_completions_and_no_prompts() -> None:
    model = shared_model("llama")
    assert score_sequences(model, [], []) == []
    (got,) = score_sequences(model, PROMPTS[:1], [[]])
    assert got.sum.shape == got.mean.shape == got.tokens.shape == (0,)


def test_a_branch_leaves_the_prompts_cache_alone() -> None:
    for name in ("llama", "mistral", "composed gemma3_text"):
        model = shared_model(name)
        reader, ids = PrefixReader(model), torch.tensor([PROMPTS[2], PROMPTS[2][::-1]])
        cache = reader.new_cache()
        with torch.no_grad():
            reader(ids, cache=cache)
            kept = [layer.keys.clone() for layer in cache.layers]
            twin = branch(cache, torch.tensor([1, 1, 0]))
            assert all(layer.keys.shape[0] == 3 for layer in twin.layers)
            reader(ids[[1, 1, 0], :4], cache=twin, past=13)
        assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, kept, strict=True))
        assert twin.get_seq_length() == 17 and cache.get_seq_length() == 13


def test_peak_memory_does_not_grow_with_the_number_of_completions() -> None:
    family = FAMILIES["llama"]
    model = family.model(0, width=64, depth=4, vocab=4096)
    prompt, completions = rows(24), rows(*[24] * 64)

    def peak(k: int, budget: int) -> int:
        return peak_bytes(
            lambda: score_sequences(model, prompt, [completions[:k]], max_tokens=budget), torch.device("cpu")
        )

    few, many, unbounded = peak(4, 4 * 48), peak(64, 4 * 48), peak(64, 64 * 48)
    assert many <= few + 64 * 2**10  # results and ids: no more
    assert unbounded > 3 * many
    logits = 64 * 24 * 4096 * 4
    assert unbounded < logits  # not even without a budget do (T, V) logits exist


def test_modes_hooks_and_gradients_are_left_as_they_were() -> None:
    model = FAMILIES["falcon"].model(0).train()  # has dropout
    model.transformer.h[1].eval()
    before = [module.training for module in model.modules()]
    expected = score_sequences(copy.deepcopy(model).eval(), PROMPTS, COMPLETIONS)
    got = score_sequences(model, PROMPTS, COMPLETIONS)
    assert all(torch.equal(a.sum, b.sum) and not a.sum.requires_grad for a, b in zip(got, expected, strict=True))
    with pytest.raises(ZeroDivisionError):
        handle = model.transformer.h[2].register_forward_hook(lambda *_: 1 / 0)
        score_sequences(model, PROMPTS, COMPLETIONS)
    handle.remove()
    assert [module.training for module in model.modules()] == before
    assert not model.lm_head._forward_pre_hooks and not model.lm_head._forward_hooks


def test_strings_are_split_behind_the_prompt() -> None:
    model, tokenizer = shared_model("llama"), character_tokenizer()
    prompts, completions = ["2+2=", "a b"], [["4", "", "5\n"], [" c"]]
    ids = [tokenizer(p)["input_ids"] for p in prompts], [[tokenizer(c)["input_ids"] for c in cs] for cs in completions]
    got = score_sequences(model, prompts, completions, tokenizer=tokenizer)
    for a, b in zip(got, score_sequences(model, *ids), strict=True):
        assert torch.equal(a.sum, b.sum) and torch.equal(a.tokens, b.tokens)


class Words:
    """A tokenizer that writes a space before the text and merges "ab", as real ones do."""

    table = {"<s>": 90, "_": 1, "a": 2, "b": 3, "ab": 4, "c": 5}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids, text = [90] if add_special_tokens else [], "_" + text if text else ""
        while text:
            piece = text[:2] if text[:2] in self.table else text[:1]
            ids.append(self.table[piece])
            text = text[len(piece) :]
        return {"input_ids": ids}


def test_joint_tokens_where_the_prompt_survives_and_separate_ones_where_it_does_not() -> None:
    model = shared_model("llama")
    got = score_sequences(model, ["ca"], [["ca", "b"]], tokenizer=Words(), return_tokens=True)[0]
    joint, separate = [5, 2], [1, 3]  # no "_" inside a text; "ab" would swallow the prompt's "a"
    expected = score_sequences(model, [[90, 1, 5, 2]], [[joint, separate]])[0]
    assert torch.equal(got.sum, expected.sum)


ADDED = character_tokenizer()
ADDED.add_tokens("<added>")  # its id is the first that the models do not embed


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"prompts": [[]]}, ValueError, r"`prompts\[0\]` must have at least one token .* got none.*begin-of-sequence"),
        ({"prompts": [[VOCAB]]}, ValueError, r"`prompts\[0\]` must hold token ids in \[0, 97\)"),
        (
            {"prompts": ["~<added>"], "tokenizer": ADDED},
            ValueError,
            r"`prompts\[0\]` must hold token ids in \[0, 97\), got 97",
        ),
        ({"completions": [["<added>"]], "tokenizer": ADDED}, ValueError, r"`completions\[0\]\[0\]` .*resize_token_emb"),
        ({"completions": [[[3, -1]]]}, ValueError, r"`completions\[0\]\[0\]` must hold token ids"),
        ({"completions": [[[2], [0.5]]]}, ValueError, r"`completions\[0\]\[1\]` must hold token ids"),
        ({"completions": [[2], [3]]}, ValueError, r"`completions` must have a list .* of the 1 prompts, got 2"),
        ({"completions": [[[True]]]}, ValueError, r"`completions\[0\]\[0\]` must hold token ids"),
        ({"prompts": "abc"}, TypeError, r"`prompts` must be a sequence with one entry for each prompt, got str 'abc'"),
        ({"completions": "abc"}, TypeError, r"`completions` must be a sequence"),
        ({"completions": ["abc"]}, TypeError, r"`completions\[0\]` must be a list of completions, got str 'abc'"),
        ({"completions": [3]}, TypeError, r"`completions\[0\]` must be a list of completions, got int 3"),
        ({"completions": [[7]]}, TypeError, r"`completions\[0\]\[0\]` must be a string or a sequence of token ids"),
        ({"prompts": torch.tensor([5])}, TypeError, r"`prompts\[0\]` must be a string or a sequence of token ids"),
        ({"prompts": ["abc"]}, ValueError, r"`tokenizer` must be given for strings, got None, and `prompts\[0\]` is"),
        ({"max_tokens": 0}, ValueError, r"`max_tokens` must be a positive integer, got 0"),
        ({"model": nn.Linear(2, 2)}, TypeError, r"`model` must be a transformers model, got Linear"),
        ({"impl": "cuda"}, ValueError, r"impl"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], kind: type, message: str) -> None:
    arguments = {"model": shared_model("llama"), "prompts": [[5, 6]], "completions": [[[7]]]} | change
    with pytest.raises(kind, match=message):
        calm_fast.score_sequences(**arguments)


def test_encoder_decoders_are_refused() -> None:
    config = CONFIG_MAPPING["bart"](
        vocab_size=VOCAB, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16
    )

    with pytest.raises(ValueError, match="must be a decoder-only causal language model, got BartForCond"):
        score_sequences(BartForConditionalGeneration(config), [[5]], [[[6]]])
