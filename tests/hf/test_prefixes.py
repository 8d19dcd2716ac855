"""`prefix_lengths`: the tokens of a prefix see each other, in the anchor and through the connections."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from families import CACHELESS, EOS, FAMILIES, OTHERS, composed_model, left_padded, prompts, randomize
from ragged import rounding
from texts import aligned_model, rows
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from unread import NoReading, values_unread

from calm_fast.hf import ComposedForCausalLM, compose

TAKES = ("llama", "qwen3", "gpt2", "gpt_neox", "mixtral", "falcon")
each = pytest.mark.parametrize("name", TAKES)
STEPS = 5


@cache
def shared(name: str = "llama") -> ComposedForCausalLM:
    """One composition per family, for tests that do not change it."""
    return composed_model(name)


def visible(lengths: list[int], real: torch.Tensor) -> torch.Tensor:
    """Return (B, M, M): which tokens each token sees, one by one. real: (B, M)."""
    batch, m = real.shape
    seen = torch.zeros(batch, m, m, dtype=torch.bool)
    for row in range(batch):
        for i in range(m):
            for j in range(m):
                seen[row, i, j] = bool(real[row, j]) and (j <= i or (i < lengths[row] and j < lengths[row]))
    return seen


class Dense:
    """The same composition with eager models, masks written out, and attention of the connections in float64."""

    def __init__(self, composed: ComposedForCausalLM) -> None:
        self.composed = composed
        self.anchor, self.augmenter = (
            AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
            for config in (composed.anchor.config, composed.config.augmenter_configs[0])
        )
        self.anchor.load_state_dict(composed.anchor.state_dict())
        own = self.augmenter.state_dict()
        kept = {name: value for name, value in composed.augmenters[0].state_dict().items() if name in own}
        self.augmenter.load_state_dict(own | kept)

    def attend(self, index: int, hidden: torch.Tensor, states: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Return the residual of a connection; a token that sees nothing gets zero."""
        layer = copy.deepcopy(self.composed.connections[index]).double()
        out = torch.zeros_like(hidden, dtype=torch.float64)
        for row, one in enumerate(seen):
            for i, keys in enumerate(one):
                if keys.any():
                    query, read = hidden[row : row + 1, i : i + 1].double(), states[row : row + 1, keys].double()
                    out[row, i] = (layer(query, read, causal=False) - query)[0, 0]
        return out.to(hidden.dtype)

    @torch.no_grad()
    def logits(self, ids: torch.Tensor, lengths: list[int], mask: torch.Tensor | None = None) -> torch.Tensor:
        real = torch.ones_like(ids) if mask is None else mask
        seen = visible(lengths, real.bool())
        positions = (real.cumsum(1) - 1).clamp(min=0)
        more = {} if mask is None else {"attention_mask": mask}
        placed = {"position_ids": positions} if self.composed.signatures[0].position_ids else {}
        states = self.augmenter(ids, output_hidden_states=True, use_cache=False, **more, **placed)
        read, pairs = states.hidden_states, self.composed.pairs
        layers = self.anchor.get_submodule(str(self.composed.config.anchor_layers))
        handles = []
        for index, (_, a, b) in enumerate(pairs):
            assert a < len(layers) - 1  # the last hidden state has a norm

            def add(_module: nn.Module, _args: Any, output: Any, index: int = index, a: int = a) -> Any:
                hidden = output[0] if isinstance(output, tuple) else output
                own = seen & real.bool()[:, :, None]
                hidden = hidden + self.attend(index, hidden, read[a + 1], own)
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            handles.append(layers[b].register_forward_hook(add))
        full = (seen | torch.eye(seen.shape[1], dtype=torch.bool))[:, None]
        additive = torch.zeros(full.shape).masked_fill(~full, torch.finfo(torch.float32).min)
        out = self.anchor(ids, attention_mask=additive, use_cache=False, **placed).logits
        for handle in handles:
            handle.remove()
        return out


@pytest.mark.parametrize("name", [*TAKES, "mpt", "gptj"])
@torch.no_grad()
@pytest.mark.seam(
    attach="`prefix_lengths` (GLM's and T5's prefix) over an anchor whose layers all have full attention",
    to="composition",
    result="works",
    why="the anchor gets a mask per token, and the connections' intervals end where the prefix ends",
)
def test_logits_are_those_of_masks_written_out(name: str) -> None:
    models = [(FAMILIES | OTHERS)[name].model(seed) for seed in (0, 1)]
    composed = randomize(compose(*models, [(0, 1), (1, 2)]))
    dense, ids = Dense(composed), prompts()
    plain = composed(ids).logits
    torch.testing.assert_close(plain, dense.logits(ids, [0, 0]), rtol=0, atol=rounding(plain))
    for given, lengths in ((4, [4, 4]), (torch.tensor([3, 9]), [3, 9]), (torch.tensor([0, 6]), [0, 6])):
        found = composed(ids, prefix_lengths=given).logits
        torch.testing.assert_close(found, dense.logits(ids, lengths), rtol=0, atol=rounding(found))
        assert (found[1] - plain[1])[: lengths[1] - 1].abs().amax() > 1e-2
    padded, mask = left_padded(ids)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    real = mask.bool()
    for lengths in ([7, 3], [3, 9]):  # 4 of the first row's tokens are padding, and count
        found = composed(padded, attention_mask=mask, position_ids=positions, prefix_lengths=torch.tensor(lengths))
        expected = dense.logits(padded, lengths, mask)[real]
        torch.testing.assert_close(found.logits[real], expected, rtol=0, atol=rounding(expected))


@torch.no_grad()
def test_padding_on_the_right_of_a_prefix_is_not_read() -> None:
    composed, ids = shared(), prompts()
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    filled = (ids.masked_fill(mask == 0, fill) for fill in (5, 50))
    found = [composed(row, attention_mask=mask, prefix_lengths=9).logits for row in filled]
    assert torch.equal(found[0][0, :6], found[1][0, :6])
    expected = composed(ids[:1, :6], prefix_lengths=6).logits
    torch.testing.assert_close(found[0][:1, :6], expected, rtol=0, atol=rounding(expected))


@torch.no_grad()
def test_an_untrained_composition_is_its_anchor_under_the_same_mask() -> None:
    anchor, augmenter = FAMILIES["llama"].model(0), FAMILIES["llama"].model(1)
    composed, ids = compose(anchor, augmenter, [(-1, -1), (0, 1)]), prompts()
    full = visible([4, 7], torch.ones_like(ids))[:, None]
    expected = anchor(ids, attention_mask=full, use_cache=False).logits
    assert torch.equal(composed(ids, prefix_lengths=torch.tensor([4, 7])).logits, expected)
    for none in (0, 1, torch.tensor([0, 1])):
        expected = anchor(ids).logits
        found = composed(ids, prefix_lengths=none).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=rounding(expected))


@each
@torch.no_grad()
def test_a_token_after_the_prefix_never_moves_it(name: str) -> None:
    composed, ids = shared(name), prompts()
    plain = composed(ids, prefix_lengths=5).logits
    for changed, kept in ((4, 0), (5, 5), (8, 8)):
        other = ids.clone()
        other[:, changed] = (other[:, changed] - 1) % EOS
        moved = composed(other, prefix_lengths=5).logits
        torch.testing.assert_close(moved[:, :kept], plain[:, :kept], rtol=0, atol=rounding(plain))
        assert ((moved - plain)[:, kept:].abs().amax(-1) > 1e-3).all() or changed != 4
    assert (composed(ids, prefix_lengths=5).logits == plain).all()


VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "static": {"cache_implementation": "static"},
    "lookup": {"prompt_lookup_num_tokens": 2},
}


@each
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("padding", ["no padding", "left padding"])
def test_cached_generation_equals_recomputation(name: str, variant: str, padding: str) -> None:
    composed, ids, mask = shared(name), prompts(), None
    lengths: Any = torch.tensor([9, 6])
    if padding == "left padding":
        ids, mask = left_padded(ids)
    if variant == "lookup":
        ids, mask, lengths = ids[:1], None if mask is None else mask[:1], 9
    how = {"do_sample": False, "max_new_tokens": STEPS, "attention_mask": mask, "eos_token_id": None}
    how |= VARIANTS[variant] | {"prefix_lengths": lengths}
    torch.manual_seed(0)
    cached = composed.generate(ids, **how)
    cached_only = ("cache_implementation", "prompt_lookup_num_tokens")
    plain = {key: value for key, value in how.items() if key not in cached_only}
    torch.manual_seed(0)
    assert torch.equal(cached, composed.generate(ids, use_cache=False, **plain))
    if variant == "greedy" and mask is None:
        expected = ids
        for _ in range(STEPS):
            with torch.no_grad():
                logits = composed(expected, use_cache=False, prefix_lengths=lengths).logits
            expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(cached, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static", "fixed"])
def test_a_cache_goes_on_after_its_prefix(kind: str) -> None:
    composed, ids = shared(), prompts()
    makes = {
        "dynamic": lambda: DynamicCache(config=composed.config),
        "static": lambda: StaticCache(composed.anchor.config, 16),
        "fixed": lambda: composed.new_cache(max_length=16),
    }
    expected = composed(ids, prefix_lengths=4, use_cache=False).logits
    cache = makes[kind]()
    first = composed(ids[:, :6], cache=cache, prefix_lengths=4)
    rest = [composed(ids[:, i : i + 1], cache=first.cache, prefix_lengths=4).logits for i in (6, 7)]
    rest.append(composed(ids[:, 8:], cache=first.cache).logits)  # may be left out now
    torch.testing.assert_close(torch.cat([first.logits, *rest], dim=1), expected, rtol=0, atol=5e-5)


@torch.no_grad()
def test_another_prefix_in_a_cache_is_refused() -> None:
    composed, ids = shared(), prompts()
    plain = composed(ids[:, :6], use_cache=True).cache
    with pytest.raises(ValueError, match="`prefix_lengths` must be that of the call .*, and there was none"):
        composed(ids[:, 6:], cache=plain, prefix_lengths=4)
    for given, other in ((4, 5), (torch.tensor([4, 5]), torch.tensor([4, 4])), (4, torch.tensor([4, 5]))):
        cache = composed(ids[:, :6], use_cache=True, prefix_lengths=given).cache
        with pytest.raises(ValueError, match="`prefix_lengths` must be that of the call .*, which is another one"):
            composed(ids[:, 6:], cache=cache, prefix_lengths=other)
        composed(ids[:, 6:], cache=copy.deepcopy(cache), prefix_lengths=copy.deepcopy(given))
    with pytest.raises(ValueError, match="`prefix_lengths` must be from 0 to 4, the tokens of the call"):
        composed.generate(ids, max_new_tokens=2, prefill_chunk_size=4, prefix_lengths=9)
    cache = composed(ids, use_cache=True, prefix_lengths=6).cache
    cache.crop(-2)
    with torch.no_grad():
        expected = composed(ids, prefix_lengths=6, use_cache=False).logits[:, 7:]
    torch.testing.assert_close(composed(ids[:, 7:], cache=cache).logits, expected, rtol=0, atol=5e-5)
    with pytest.raises(ValueError, match="crop: the prefix of 6 tokens must be kept"):
        cache.crop(-4)


@pytest.mark.seam(
    attach="labels inside the prefix (`prefix_lengths`)",
    to="composition",
    result="refused",
    why="the prefix sees what it would predict; set the labels of its tokens to -100",
)
def test_labels_that_the_prefix_sees_are_refused() -> None:
    composed, ids = composed_model("llama").train(), prompts()
    lengths = torch.tensor([4, 6])
    labels = ids.clone()
    for row, length in enumerate(lengths.tolist()):
        labels[row, 1:length] = -100
    composed(ids, labels=labels, prefix_lengths=lengths).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in composed.connections.parameters())
    wrong = labels.clone()
    wrong[1, 5] = ids[1, 5]
    with pytest.raises(ValueError, match="`labels` must be -100 for every token of the prefix but the first"):
        composed(ids, labels=wrong, prefix_lengths=lengths)
    composed(ids, labels=wrong, prefix_lengths=torch.tensor([4, 5]))
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    composed(ids, labels=labels, shift_labels=shifted, prefix_lengths=lengths)
    shifted[0, 2] = 5
    with pytest.raises(ValueError, match="`shift_labels` must be -100"):
        composed(ids, labels=labels, shift_labels=shifted, prefix_lengths=lengths)


def test_the_loss_and_gradients_are_those_of_one_row_at_a_time() -> None:
    # in float64, whose rounding is far below the error of a wrong gradient
    composed, ids = composed_model("llama").double().train(), prompts()
    lengths, labels = torch.tensor([4, 6]), prompts()
    labels[:, :6] = -100
    composed(ids, labels=labels, prefix_lengths=lengths).loss.backward()
    together = [p.grad.clone() for p in composed.connections.parameters()]
    composed.zero_grad()
    for row in (0, 1):
        one = slice(row, row + 1)
        (composed(ids[one], labels=labels[one], prefix_lengths=int(lengths[row])).loss / 2).backward()
    for p, expected in zip(composed.connections.parameters(), together, strict=True):
        near = torch.finfo(expected.dtype).eps ** 0.5 * float(expected.abs().max())
        torch.testing.assert_close(p.grad, expected, rtol=0, atol=near)


@pytest.mark.seam(
    attach="`prefix_lengths` over an anchor with sliding windows, recurrent layers, ALiBi, or no mask per token (OPT)",
    to="composition",
    result="refused",
    why="its layers could not follow the prefix; take an anchor whose layers all have full attention",
)
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mistral", "whose layers read through a window .sliding_window=6"),
        ("gemma3_text", "which has layers of the type sliding_attention"),
        ("bloom", "which does not take an attention mask per token"),
        ("opt", "which does not take an attention mask per token"),
        ("mamba", "which has layers of the type linear_attention"),
        ("rwkv", "which has recurrent layers"),
        ("qwen3_next", "which has layers of the type linear_attention"),
        ("openai-gpt", "which does not take an attention mask per token"),
    ],
)
def test_anchors_that_cannot_follow_a_prefix_are_refused(name: str, why: str) -> None:
    anchor = (FAMILIES | OTHERS | CACHELESS)[name].model(0)
    composed = compose(anchor, FAMILIES["llama"].model(1), [(0, 1)])
    told = f"`prefix_lengths` must be None for the anchor {type(anchor).__name__}, {why}"
    for _ in range(2):  # the outcome is kept
        with pytest.raises(ValueError, match=told):
            composed(prompts(), prefix_lengths=4)
    composed(prompts(), prefix_lengths=1)


@torch.no_grad()
def test_any_augmenter_may_be_read_by_a_prefix() -> None:
    for name in ("mamba", "mistral", "rwkv"):
        augmenter = (OTHERS | FAMILIES)[name].model(1)
        composed = randomize(compose(FAMILIES["llama"].model(0), augmenter, [(0, 1)]))
        ids = prompts()
        other = ids.clone()
        other[:, 3] = (other[:, 3] - 1) % EOS
        states: list[torch.Tensor] = []
        handle = composed.connections[0].register_forward_hook(lambda _m, _args, out: states.append(out))  # noqa: B023
        for row in (ids, other):
            composed(row, prefix_lengths=4)
        handle.remove()
        moved = (states[0] - states[1]).abs().amax(-1)
        assert (moved[:, :4] > 1e-4).all()


@torch.no_grad()
def test_intervals_of_the_caller_are_widened_too() -> None:
    composed, ids = shared(), prompts()
    hi = torch.arange(1, 10, dtype=torch.int32).expand(2, 9)
    found = composed(ids, augmenter_input_ids=ids, hi=hi, prefix_lengths=5).logits
    torch.testing.assert_close(found, composed(ids, prefix_lengths=5).logits, rtol=0, atol=5e-5)


def test_what_is_wrong_is_named() -> None:
    composed, ids = shared(), prompts()
    for wrong in (True, 2.0, "4", torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0]), [1, 2]):
        with pytest.raises(ValueError, match=r"`prefix_lengths` must be an int, or int64 of shape \(2,\)"):
            composed(ids, prefix_lengths=wrong)
    for wrong in (-1, 10, torch.tensor([3, 10]), torch.tensor([-1, 2])):
        with pytest.raises(ValueError, match="`prefix_lengths` must be from 0 to 9.*got (-1|10)"):
            composed(ids, prefix_lengths=wrong)
    restarts = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(2, 9)
    with pytest.raises(ValueError, match="`prefix_lengths` must be None for rows of several documents"):
        composed(ids, position_ids=restarts, prefix_lengths=4)
    draft = FAMILIES["llama"].model(2)
    with pytest.raises(ValueError, match="`prefix_lengths` must be None with assistant_model"):
        composed.generate(ids[:1], max_new_tokens=2, prefix_lengths=4, assistant_model=draft)
    with pytest.raises(ValueError, match="`prefix_lengths` must be None with guidance_scale"):
        composed.generate(ids[:1], max_new_tokens=2, prefix_lengths=4, guidance_scale=1.5)


def test_other_kinds_of_attention_are_refused() -> None:
    composed = composed_model("llama")
    composed(prompts(), prefix_lengths=4)
    composed.anchor.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation='flex_attention', which takes no such mask"):
        composed(prompts(), prefix_lengths=4)


@torch.no_grad()
def test_eager_attention_and_bfloat16() -> None:
    ids = prompts()
    models = [FAMILIES["llama"].model(seed) for seed in (0, 1)]
    expected = randomize(compose(*models, [(0, 1)]))(ids, prefix_lengths=4).logits
    models[0].set_attn_implementation("eager")
    eager = randomize(compose(*models, [(0, 1)]))
    torch.testing.assert_close(eager(ids, prefix_lengths=4).logits, expected, rtol=0, atol=rounding(expected))
    half = randomize(compose(*(model.bfloat16() for model in models), [(0, 1)]))
    assert half(ids, prefix_lengths=4).logits.isfinite().all()


def test_a_compiled_call_needs_a_trial_before() -> None:
    composed, ids = composed_model("llama", [(0, 1)]), prompts()
    step = torch.compile(composed, backend="eager", fullgraph=False)
    with torch.no_grad():
        expected = composed(ids, prefix_lengths=4, use_cache=False).logits
        found = step(ids, prefix_lengths=4, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=rounding(expected))


@torch.no_grad()
def test_an_augmenter_with_another_tokenizer_follows_the_prefix() -> None:
    composed = aligned_model(("llama", "bytes"), ("gpt2", "metaspace"))
    ids, mask = rows("the small cat ran", "a dog")
    how = {"attention_mask": mask, "max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None}
    cached = composed.generate(ids, prefix_lengths=ids.shape[1], **how)
    assert torch.equal(cached, composed.generate(ids, prefix_lengths=ids.shape[1], use_cache=False, **how))
    other, last = ids.clone(), int(ids[0, -1])
    other[0, -1] = next(token for token in ids[0].tolist() if token != last)
    states: list[torch.Tensor] = []
    handle = composed.connections[0].register_forward_hook(lambda _m, args, out: states.append(out - args[0]))
    for row in (ids, other):
        composed(row, attention_mask=mask, prefix_lengths=ids.shape[1])
    handle.remove()
    # the residuals of the embedding output: only the augmenter's tokens have changed
    assert ((states[0] - states[1])[0, :-1].abs().amax(-1) > 0).all()


def test_no_value_is_read_where_that_would_wait_for_a_gpu() -> None:
    models = [FAMILIES["llama"].model(seed) for seed in (0, 1)]
    for model in models:
        model.set_attn_implementation("eager")  # SDPA of transformers reads masks
    composed, ids = randomize(compose(*models, [(0, 1), (1, 2)])).train(), prompts()
    lengths, labels, mask = torch.tensor([4, 6]), prompts(), torch.ones_like(ids)
    labels[:, :6], mask[0, :2] = -100, 0
    how = {"attention_mask": mask, "prefix_lengths": lengths}
    expected = composed(ids, labels=labels, **how)  # the first call tries the anchor
    with values_unread(), NoReading():
        found = composed(ids, labels=labels, **how)
        step = composed(ids[:, :7], attention_mask=mask[:, :7], use_cache=True, prefix_lengths=lengths)
        for given in (lengths, lengths.clone()):
            seen = int(step.cache.get_seq_length()) + 1
            composed(ids[:, :1], attention_mask=mask[:, :seen], cache=step.cache, prefix_lengths=given)
    near = {"rtol": 0, "atol": rounding(expected.logits)}
    torch.testing.assert_close(found.logits[mask.bool()], expected.logits[mask.bool()], **near)
    # a log-probability is a logit minus a mean of logits
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=2 * near["atol"])
    labels[1, 5] = 3
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("`labels` must be -100", {"labels": labels, "prefix_lengths": lengths}),
        ("`prefix_lengths` must be from 0 to 9", {"prefix_lengths": torch.tensor([3, 10])}),
        ("`prefix_lengths` must be that of the call", {"cache": step.cache, "prefix_lengths": lengths + 1}),
    ]
    for message, how in wrong:
        with values_unread(), pytest.raises(RuntimeError, match=message):
            composed(ids, **how)
