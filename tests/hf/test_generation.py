"""Common ways to generate: drafts, pipelines, continued caches, guidance; and the unsupported ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from families import EOS, FAMILIES, PAD, VOCAB, composed_model, left_padded, prompts, randomize
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

from calm_fast.hf import ComposedForCausalLM, compose

GREEDY = {"max_new_tokens": 8, "do_sample": False}


def words() -> PreTrainedTokenizerFast:
    """A tokenizer with one word per token id."""
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token=f"w{PAD}"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=f"w{PAD}", eos_token=f"w{EOS}", unk_token=f"w{PAD}", padding_side="left"
    )


@pytest.mark.parametrize("draft", ["another model", "its own anchor"])
def test_a_draft_model_changes_no_token(draft: str) -> None:
    composed, ids = composed_model("llama"), prompts(1)
    assistant = composed.anchor if draft == "its own anchor" else FAMILIES["llama"].model(5, width=16, depth=1)
    assert torch.equal(composed.generate(ids, **GREEDY, assistant_model=assistant), composed.generate(ids, **GREEDY))


def test_a_composition_drafts_for_another_model() -> None:
    composed, ids = composed_model("llama"), prompts(1)
    target = FAMILIES["llama"].model(7)
    assert torch.equal(target.generate(ids, **GREEDY, assistant_model=composed), target.generate(ids, **GREEDY))


def test_a_returned_cache_continues() -> None:
    composed, ids = composed_model("llama"), prompts()
    first = composed.generate(ids, **GREEDY | {"max_new_tokens": 3}, return_dict_in_generate=True)
    more = {"cache": first.cache, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(composed.generate(first.sequences, **more), composed.generate(ids, **GREEDY))


@pytest.mark.parametrize(
    "how", [{"guidance_scale": 1.5}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}, {"num_beams": 3}]
)
def test_logits_processors_and_scores_do_not_mind_the_cache(how: dict[str, Any]) -> None:
    composed, ids = composed_model("llama"), prompts()
    how = GREEDY | how | {"return_dict_in_generate": True, "output_scores": True}
    cached, again = composed.generate(ids, **how), composed.generate(ids, **how, use_cache=False)
    assert torch.equal(cached.sequences, again.sequences)
    for one, two in zip(cached.scores, again.scores, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-3)


def test_a_text_generation_pipeline_pads_its_batch_on_the_left() -> None:
    composed, tokenizer = composed_model("llama"), words()
    texts = ["w5 w17 w3", "w9 w2 w40 w8 w21 w6"]
    how = {"return_full_text": False, **GREEDY}
    pipe = pipeline("text-generation", model=composed, tokenizer=tokenizer)
    together = [row[0]["generated_text"] for row in pipe(texts, batch_size=2, **how)]
    for text, got in zip(texts, together, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        alone = composed.generate(ids, **GREEDY)[0, ids.shape[1] :]
        assert got.split() == tokenizer.decode(alone, skip_special_tokens=True).split()


def test_models_given_as_paths_follow_a_device_map(tmp_path: Any) -> None:
    pytest.importorskip("accelerate")
    parts = [FAMILIES["llama"].model(seed) for seed in (0, 1)]
    for name, part in zip("ab", parts, strict=True):
        part.save_pretrained(tmp_path / name)
    model = compose(tmp_path / "a", tmp_path / "b", "uniform:2", model_kwargs={"device_map": "cpu"})
    ids = prompts()
    assert isinstance(model, ComposedForCausalLM)
    assert torch.equal(model.generate(ids, **GREEDY), parts[0].generate(ids, **GREEDY))  # untrained: the anchor


def test_what_cannot_be_done_says_what_to_do() -> None:
    composed = composed_model("llama")
    with pytest.raises(ValueError, match="resize the anchor and the augmenters, then compose"):
        composed.resize_token_embeddings(VOCAB + 3)
    with pytest.raises(ValueError, match=r"continuous batching .*use generate\(\) with left padding"):
        composed.generate_batch([[5, 6, 7], [8, 9]], max_new_tokens=2)
    with pytest.raises(ValueError, match="`inputs_embeds` must be None"):
        composed.generate(inputs_embeds=torch.randn(1, 3, 32), max_new_tokens=2)


@torch.no_grad()
@pytest.mark.seam(
    attach="an anchor that runs its last layers on the last tokens only (Gemma 4's KV-sharing layers)",
    to="composition",
    result="works",
    why="each token keeps its own interval",
)
@pytest.mark.parametrize("padding", ["no padding", "left padding"])
def test_layers_that_run_on_the_last_tokens_keep_their_intervals(padding: str) -> None:
    if not hasattr(transformers, "Gemma4ForCausalLM"):
        pytest.skip("this release of transformers has no Gemma 4")
    names = {"num_kv_shared_layers": 2, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8}
    names |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 6, "num_hidden_layers": 4}
    names |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "num_attention_heads": 4}
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "pad_token_id": PAD}
    torch.manual_seed(0)
    config = transformers.Gemma4TextConfig(**names, **sizes, initializer_range=0.3)
    composed = randomize(compose(transformers.Gemma4ForCausalLM(config).eval(), FAMILIES["llama"].model(1, depth=4)))
    ids, mask = prompts(), None
    if padding == "left padding":
        ids, mask = left_padded(ids)
    how = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(composed.generate(ids, **how), composed.generate(ids, use_cache=False, **how))


def test_a_layer_that_drops_other_tokens_is_refused() -> None:
    composed = composed_model("llama", [(1, 1)])
    layer = composed.anchor.model.layers[1]
    with layer.register_forward_hook(lambda module, args, output: output[:, 1:], prepend=True):
        with pytest.raises(ValueError, match=r"`connections` must be of anchor layers that run on the 9 tokens given"):
            composed(prompts(), use_cache=False)
