"""Families without a transformers Cache: the whole text is read in every step."""

from __future__ import annotations

import copy
import threading
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import seq2seq_models
import torch
from families import CACHELESS, EOS, FAMILIES, OTHERS, VOCAB, left_padded, prompts, randomize, switch
from ragged import rounding
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    DynamicCache,
    ReformerConfig,
    RobertaConfig,
    RobertaForCausalLM,
    XLNetConfig,
)

from calm_fast.consistency import score_sequences
from calm_fast.hf import ComposedForCausalLM, compose

NAMES = list(CACHELESS)
ROLES = ("anchor", "augmenter")
each = pytest.mark.parametrize("name", NAMES)
in_both_roles = pytest.mark.parametrize("role", ROLES)
CLASS = {name: type(CACHELESS[name].model()).__name__ for name in NAMES}
IGNORES_MASKS = ("rwkv", "recurrent_gemma", "xlstm")
PAIRS = [(-1, -1), (0, 1), (2, 2)]


def parts(name: str, role: str) -> tuple[Any, Any]:
    model, llama = CACHELESS[name].model(0), FAMILIES["llama"].model(1)
    return (model, llama) if role == "anchor" else (llama, model)


def made(name: str, role: str) -> ComposedForCausalLM:
    return randomize(compose(*parts(name, role), PAIRS))


@cache
def shared(name: str, role: str) -> ComposedForCausalLM:
    """One composition per case, for tests that do not change it."""
    return made(name, role)


def alone(model: Any, ids: torch.Tensor, steps: int) -> torch.Tensor:
    """Continue greedily by full forwards."""
    for _ in range(steps):
        with torch.no_grad():
            logits = model(ids).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


@each
@in_both_roles
@torch.no_grad()
def test_an_untrained_composition_is_its_anchor(name: str, role: str) -> None:
    anchor, augmenter = parts(name, role)
    expected = anchor(prompts(), use_cache=False).logits
    assert torch.equal(compose(anchor, augmenter, PAIRS)(prompts()).logits, expected)


@each
@in_both_roles
@torch.no_grad()
def test_a_future_token_never_moves_earlier_logits(name: str, role: str) -> None:
    composed, ids = shared(name, role), prompts()
    outputs = composed(ids)
    assert outputs.cache is None
    for changed in (5, 8):
        other = ids.clone()
        other[:, changed] = (other[:, changed] - 1) % EOS
        moved = composed(other).logits
        torch.testing.assert_close(moved[:, :changed], outputs.logits[:, :changed], rtol=0, atol=2e-5)
        assert (moved[:, changed:] - outputs.logits[:, changed:]).abs().amax() > 1e-3


@each
@in_both_roles
def test_the_residual_is_that_of_states_read_by_hand(name: str, role: str) -> None:
    """One connection, beside a hook that adds the same attention to a plain anchor."""
    anchor, augmenter = parts(name, role)
    ids = prompts()
    composed = randomize(compose(anchor, augmenter, [(1, 1)]))
    state: list[torch.Tensor] = []

    def first(output: Any) -> torch.Tensor:
        return output[0] if isinstance(output, (tuple, list)) else output

    def add(_module: Any, _args: Any, output: Any) -> Any:
        hidden = composed.connections[0](first(output), state[0], causal=True)
        return hidden if isinstance(output, torch.Tensor) else type(output)([hidden, *output[1:]])

    reading = augmenter.get_submodule(_path(composed, 1))[1].register_forward_hook(
        lambda _module, _args, output: state.append(first(output))
    )
    with torch.no_grad():
        augmenter(ids, use_cache=False)
    reading.remove()
    adding = anchor.get_submodule(_path(composed, 0))[1].register_forward_hook(add)
    with torch.no_grad():
        expected = anchor(ids, use_cache=False).logits
    adding.remove()
    with torch.no_grad():
        torch.testing.assert_close(composed(ids).logits, expected, rtol=0, atol=rounding(expected))


def _path(composed: ComposedForCausalLM, part: int) -> str:
    return str((composed.config.anchor_layers, *composed.config.augmenter_layers)[part])


@each
@in_both_roles
@pytest.mark.seam(
    attach="a part without a transformers Cache (GPT-1, RWKV, xLSTM, RecurrentGemma, MiniMax), in generate",
    to="composition",
    result="works",
    why="every step reads the whole text; a warning says so once",
)
def test_generate_reads_the_whole_text_and_says_so_once(name: str, role: str) -> None:
    composed, ids = made(name, role), prompts()
    how = {"max_new_tokens": 4, "eos_token_id": None}
    with pytest.warns(UserWarning, match=f"no cache is kept, because {CLASS[name]} ") as told:
        tokens = composed.generate(ids, do_sample=False, **how)
    assert sum("no cache is kept" in str(one.message) for one in told) == 1
    assert torch.equal(tokens, alone(composed, ids, 4))
    with torch.no_grad():  # the composition has an effect
        assert (composed(ids).logits - composed.anchor(ids, use_cache=False).logits).abs().max() > 1e-3
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "generate: no cache")
        assert torch.equal(composed.generate(ids, do_sample=False, **how), tokens)
        beams = composed.generate(ids, num_beams=3, do_sample=False, **how)
        assert torch.equal(made(name, role).generate(ids, num_beams=3, do_sample=False, use_cache=False, **how), beams)


@each
@in_both_roles
def test_a_cache_is_refused_by_name(name: str, role: str) -> None:
    composed, ids = shared(name, role), prompts()
    why = f"because {CLASS[name]} (keeps|has)"
    for argument in ("cache", "past_key_values"):
        with pytest.raises(ValueError, match=f"`{argument}` must be None, {why}.*Pass all tokens"):
            composed(ids, **{argument: DynamicCache()})
        with pytest.raises(ValueError, match=f"`{argument}` must be None, {why}"):
            composed.generate(ids, max_new_tokens=2, **{argument: DynamicCache()})
    with pytest.raises(ValueError, match=f"`use_cache` must be False or None, {why}"):
        composed(ids, use_cache=True)
    with pytest.raises(ValueError, match=f"`cache_implementation` must be None, {why}"):
        composed.generate(ids, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match=f"new_cache: `self` must be .* in which {CLASS[name]}"):
        composed.new_cache()
    for how in ({"assistant_model": FAMILIES["llama"].model(2)}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful"):
            composed.generate(ids[:1], max_new_tokens=2, do_sample=False, **how)


@torch.no_grad()
def _move(composed: ComposedForCausalLM, along: dict[str, torch.Tensor], by: float) -> None:
    for key, p in composed.connections.named_parameters():
        p += by * along[key]


@each
@in_both_roles
def test_one_step_of_training_moves_the_loss(name: str, role: str) -> None:
    composed, ids = made(name, role).train(), prompts()
    before = composed(ids, labels=ids).loss
    before.backward()
    grads = {key: p.grad.clone() for key, p in composed.connections.named_parameters()}
    assert all(grad.abs().max() > 0 for grad in grads.values())
    rate = 1e-3 / sum(float(grad.square().sum()) for grad in grads.values())
    _move(composed, grads, -rate)
    torch.testing.assert_close(composed(ids, labels=ids).loss - before, torch.tensor(-1e-3), rtol=0.1, atol=0)
    copy.deepcopy(composed)  # no module has kept a graph
    if name == "openai-gpt" and role == "anchor":
        with pytest.raises(ValueError, match="gradient checkpointing: `anchor` must be"):
            switch(composed, "enable")()
        return
    composed.zero_grad()
    _move(composed, grads, rate)
    switch(composed, "enable")()
    composed(ids, labels=ids).loss.backward()
    for key, p in composed.connections.named_parameters():
        torch.testing.assert_close(p.grad, grads[key], rtol=1e-3, atol=1e-5)


@each
@in_both_roles
def test_saved_and_loaded(name: str, role: str, tmp_path: Path) -> None:
    anchor, augmenter = parts(name, role)
    anchor.save_pretrained(tmp_path / "anchor")
    augmenter.save_pretrained(tmp_path / "augmenter")
    loaded = [AutoModelForCausalLM.from_pretrained(tmp_path / part) for part in ("anchor", "augmenter")]
    composed = randomize(compose(*loaded, PAIRS))
    composed.save_pretrained(tmp_path / "composed")
    again = ComposedForCausalLM.from_pretrained(tmp_path / "composed")
    with torch.no_grad():
        assert torch.equal(again(prompts()).logits, composed(prompts()).logits)
    with pytest.raises(ValueError, match="`use_cache` must be False or None"):
        again(prompts(), use_cache=True)


@each
@in_both_roles
@torch.no_grad()
@pytest.mark.seam(
    attach="padding before tokens in a part whose family ignores attention masks (RWKV, xLSTM, RecurrentGemma)",
    to="composition",
    result="refused",
    why="it would read the padding as text; pad on the right, and generate rows of one length together",
)
def test_padding_before_tokens_is_left_out_or_refused(name: str, role: str) -> None:
    composed, ids = shared(name, role), prompts()
    padded, mask = left_padded(ids)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if name in IGNORES_MASKS:
        model = "augmenter 0 \\(\\w+\\)" if role == "augmenter" else "\\w+"
        with pytest.raises(
            ValueError, match=f"`attention_mask` must be 1 for every .*, because {model} reads padding as"
        ):
            composed(padded, attention_mask=mask, position_ids=positions)
        with pytest.raises(ValueError, match="reads padding as text"):
            composed.generate(padded, attention_mask=mask, max_new_tokens=2, use_cache=False)
    else:
        row = composed(padded, attention_mask=mask, position_ids=positions).logits[:1, 4:]
        torch.testing.assert_close(row, composed(ids[:1, 4:]).logits, rtol=0, atol=5e-5)
        together = composed.generate(
            padded, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None, use_cache=False
        )
        assert torch.equal(together[:1, 4:], alone(composed, ids[:1, 4:], 3))
    # after the tokens it is never read
    right = torch.ones_like(ids)
    right[0, 6:] = 0
    row = composed(ids.masked_fill(right == 0, 5), attention_mask=right).logits[:1, :6]
    torch.testing.assert_close(row, composed(ids[:1, :6]).logits, rtol=0, atol=5e-5)


@each
def test_an_encoder_decoder_reads_its_source_through_it_once(name: str) -> None:
    composed = randomize(compose(seq2seq_models.anchor("t5"), CACHELESS[name].model(1), PAIRS))
    source, _ = seq2seq_models.texts()
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "generate: no cache")
        tokens = composed.generate(source, use_cache=True, **how)
    assert torch.equal(tokens, composed.generate(source, use_cache=False, **how))
    padded, mask = seq2seq_models.padded(source, slice(0, 2))
    with torch.no_grad():
        if name in IGNORES_MASKS:
            with pytest.raises(ValueError, match="ComposedForSeq2SeqLM: `attention_mask` must be 1 .*reads padding as"):
                composed(padded, attention_mask=mask, decoder_input_ids=tokens)
        else:
            row = composed(padded, attention_mask=mask, decoder_input_ids=tokens).logits[:1]
            expected = composed(source[:1, 2:], decoder_input_ids=tokens[:1]).logits
            # T5 finds positions by differences
            torch.testing.assert_close(row, expected, rtol=0, atol=5e-5)


@pytest.mark.seam(
    attach="padding before tokens in a part that counts padding (the decoders of BART and Whisper)",
    to="composition",
    result="refused",
    why="its positions would be wrong; pad on the right, and generate rows of one length together",
)
@in_both_roles
@torch.no_grad()
def test_a_decoder_that_counts_padding_is_given_none(role: str) -> None:
    sizes = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    torch.manual_seed(0)
    config = BartConfig(vocab_size=VOCAB, **sizes, max_position_embeddings=64, is_encoder_decoder=False, init_std=0.3)
    both = (BartForCausalLM(config).eval(), FAMILIES["llama"].model(1))
    composed, ids = randomize(compose(*(both if role == "anchor" else both[::-1]), "uniform:1")), prompts()
    padded, mask = left_padded(ids)
    with pytest.raises(
        ValueError, match="`attention_mask` must be 1 .*BartForCausalLM.* reads padding .* or counts it"
    ):
        composed(padded, attention_mask=mask)
    with pytest.raises(ValueError, match="reads padding as text or counts it"):
        composed.generate(padded, attention_mask=mask, max_new_tokens=2)
    whole = composed(ids).logits
    assert torch.equal(composed(ids, attention_mask=torch.ones_like(ids)).logits, whole)
    mamba = randomize(compose(OTHERS["mamba"].model(0), FAMILIES["llama"].model(1), "uniform:1"))  # no positions either
    row = mamba(padded, attention_mask=mask).logits[:1, 4:]
    torch.testing.assert_close(row, mamba(ids[:1, 4:]).logits, rtol=0, atol=5e-5)


@in_both_roles
@torch.no_grad()
def test_a_decoder_whose_positions_begin_behind_its_padding_id_is_given_no_padding(role: str) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=VOCAB, **sizes, is_decoder=True, initializer_range=0.3)
    both = (RobertaForCausalLM(config).eval(), FAMILIES["llama"].model(1))
    composed, ids = randomize(compose(*(both if role == "anchor" else both[::-1]), "uniform:1")), prompts()
    padded, mask = left_padded(ids)
    with pytest.raises(ValueError, match="RobertaForCausalLM.* reads padding .* or counts it"):
        composed(padded, attention_mask=mask)
    whole = composed(ids).logits
    assert torch.equal(composed(ids, attention_mask=torch.ones_like(ids)).logits, whole)


def test_an_augmenters_own_mask_is_looked_at_too() -> None:
    composed, ids = shared("rwkv", "augmenter"), prompts()
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    hi = torch.arange(1, 10, dtype=torch.int32).expand(2, 9)
    with pytest.raises(ValueError, match="augmenter 0 .RwkvForCausalLM. reads padding as text"):
        composed(ids, augmenter_input_ids=ids, augmenter_attention_mask=mask, hi=hi)


def test_an_rwkv_that_changes_its_weights_is_refused() -> None:
    model, llama = CACHELESS["rwkv"].model(depth=3), FAMILIES["llama"].model(1)
    model.config.rescale_every = 2
    for pair, argument in (((model, llama), "anchor"), ((llama, model), "augmenters")):
        with pytest.raises(ValueError, match=f"`{argument}` must be a model whose forward leaves .*rescale_every=0"):
            compose(*pair, "uniform:1")
    model.config.rescale_every = 0
    before = copy.deepcopy(model.state_dict())
    composed = compose(llama, model, "uniform:1")
    with torch.no_grad():
        composed(prompts())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def test_an_xlstm_that_reads_a_text_in_pieces_is_refused() -> None:
    composed, ids = made("xlstm", "anchor"), prompts()
    composed.anchor.config.max_inference_chunksize = 6
    with pytest.raises(ValueError, match="`connections` must be of .*xLSTMBlock.* runs on 6"):
        composed(ids)
    composed(ids[:, :6])


def test_threads_take_turns_where_modules_keep_a_state() -> None:
    composed = shared("recurrent_gemma", "augmenter")
    rows = [prompts(1, 7, seed) for seed in range(6)]
    with torch.no_grad():
        expected = [composed(row).logits for row in rows]
    wrong: list[int] = []

    def run(index: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                if not torch.equal(composed(rows[index]).logits, expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_composition_without_a_cache_is_scored() -> None:
    composed, ids = shared("rwkv", "augmenter"), prompts().tolist()
    asked = [ids[0][:3], ids[1][:5]]
    answers = [[ids[0][3:], ids[1][3:6]], [ids[1][5:]]]
    scores = score_sequences(composed, asked, answers, progress=False)
    for prompt, completions, score in zip(asked, answers, scores, strict=True):
        for completion, value in zip(completions, score.sum, strict=True):
            text = torch.tensor([prompt + completion])
            with torch.no_grad():
                logits = composed(text).logits[0, len(prompt) - 1 : -1].double()
            expected = logits.log_softmax(-1).gather(1, text[0, len(prompt) :, None]).sum()
            # a log-probability is a logit minus a mean of logits
            near = 2 * len(completion) * rounding(logits.float())
            torch.testing.assert_close(value.double(), expected, rtol=0, atol=near)


def test_layers_of_another_layout_are_refused() -> None:
    """XLNet's states are (tokens, batch, width), a Reformer's layers pass on two streams."""
    llama = FAMILIES["llama"].model(1)
    sizes = {"vocab_size": 97, "pad_token_id": 0}
    xlnet = XLNetConfig(d_model=32, n_layer=3, n_head=4, d_inner=48, attn_type="uni", **sizes)
    reformer = ReformerConfig(
        hidden_size=32, num_attention_heads=4, attention_head_size=8, feed_forward_size=48, is_decoder=True,
        attn_layers=["local", "local"], axial_pos_embds=False, local_attn_chunk_length=4, **sizes,
    )  # fmt: skip
    told = (r"shape \(4, 2, 32\) from XLNetLayer", "got ReformerOutput .* from ReformerLayer")
    for config, text in zip((xlnet, reformer), told, strict=True):
        model = AutoModelForCausalLM.from_config(config).eval()
        for pair in ((model, llama), (llama, model)):
            with pytest.raises(ValueError, match=rf"`connections` must be of layers whose .*{text}"):
                compose(*pair, [(0, 0)])
