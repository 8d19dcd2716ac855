"""Ways to generate with a composition: equal to recomputation, or refused with what to do instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, OTHERS, composed_model, prompts, randomize
from test_generation import words
from transformers import GenerationConfig, TextIteratorStreamer, WatermarkingConfig

from calm_fast.hf import compose

GREEDY = {"max_new_tokens": 8, "do_sample": False}


def same_as_recomputed(family: str, how: dict[str, Any], batch: int = 2, **both: Any) -> None:
    model, ids = composed_model(family), prompts(batch)
    expected = model.generate(ids, **GREEDY, **both, use_cache=False)
    assert torch.equal(model.generate(ids, **GREEDY, **both, **how), expected)


@pytest.mark.parametrize(
    ("how", "batch"),
    [
        pytest.param(
            {"cache_implementation": "static"},
            2,
            marks=pytest.mark.seam(
                attach='`cache_implementation="static"`',
                to="composition",
                result="works",
                why="the anchor's part is static, the others grow",
            ),
        ),
        pytest.param(
            {"prefill_chunk_size": 4},
            2,
            marks=pytest.mark.seam(
                attach="`prefill_chunk_size`", to="composition", result="works", why="equals one prefill"
            ),
        ),
        pytest.param(
            {"prompt_lookup_num_tokens": 2},
            1,
            marks=pytest.mark.seam(
                attach="`prompt_lookup_num_tokens`", to="composition", result="works", why="every part is rolled back"
            ),
        ),
    ],
)
@pytest.mark.parametrize("family", ["gemma3_text", "gpt2"])
def test_a_way_to_keep_the_cache_changes_no_token(family: str, how: dict[str, Any], batch: int) -> None:
    same_as_recomputed(family, how, batch)


@pytest.mark.parametrize(
    "both",
    [
        pytest.param(
            {"num_beams": 3, "num_return_sequences": 2},
            marks=pytest.mark.seam(
                attach="`num_beams`, `num_return_sequences`",
                to="composition",
                result="works",
                why="every part's cache is reordered",
            ),
        ),
        pytest.param(
            {"watermarking_config": WatermarkingConfig(bias=4.0)},
            marks=pytest.mark.seam(
                attach="`watermarking_config`", to="composition", result="works", why="it sees the composed logits"
            ),
        ),
    ],
)
def test_a_way_to_choose_tokens_does_not_mind_the_cache(both: dict[str, Any]) -> None:
    same_as_recomputed("llama", {}, **both)


@pytest.mark.seam(
    attach="streamers, `output_hidden_states`, `output_attentions`, `output_scores`, `output_logits`",
    to="composition",
    result="works",
    why="they are the composition's: the anchor's states with every connection in them",
)
def test_outputs_and_streams_are_those_of_the_composition() -> None:
    model, ids = composed_model("llama"), prompts(1)
    streamer = TextIteratorStreamer(words(), skip_prompt=True)
    names = ["output_hidden_states", "output_attentions", "output_scores", "output_logits", "return_dict_in_generate"]
    outputs = model.generate(ids, **GREEDY, streamer=streamer, **dict.fromkeys(names, True))
    with torch.no_grad():
        again = model(outputs.sequences[:, :-1], output_hidden_states=True, use_cache=False)
    torch.testing.assert_close(outputs.logits[-1], again.logits[:, -1], rtol=1e-4, atol=1e-4)
    for got, want in zip(outputs.hidden_states[-1], again.hidden_states, strict=True):
        torch.testing.assert_close(got[:, -1], want[:, -1], rtol=1e-4, atol=1e-4)
    assert len(outputs.attentions) == len(outputs.scores) == 8
    assert "".join(streamer).split() == words().decode(outputs.sequences[0, 9:]).split()


@pytest.mark.parametrize("drafts", ["llama", "gemma3_text"])
@pytest.mark.seam(
    attach="a composition as `assistant_model` of another model",
    to="composition",
    result="works",
    why="sliding-window caches of its augmenters are rolled back too",
)
def test_a_composition_drafts_past_its_sliding_window(drafts: str) -> None:
    target, assistant, ids = FAMILIES["llama"].model(7), composed_model(drafts), prompts(1, 12)
    expected = target.generate(ids, **GREEDY)
    try:
        target.generate(ids, **GREEDY, assistant_model=FAMILIES[drafts].model(3))
    except RuntimeError:
        pytest.skip("this release of transformers rolls no sliding window back: a plain draft model fails too")
    assert torch.equal(target.generate(ids, **GREEDY, assistant_model=assistant), expected)


@pytest.mark.parametrize("part", ["anchor", "augmenter"])
@pytest.mark.seam(
    attach="drafts (`assistant_model`, `prompt_lookup_num_tokens`) where a part has recurrent layers",
    to="composition",
    result="refused",
    why="a recurrent state cannot be rolled back; generate without drafts",
)
def test_drafts_are_refused_where_a_part_cannot_be_rolled_back(part: str) -> None:
    llama, hybrid = FAMILIES["llama"].model(0), OTHERS["qwen3_next"].model(1)
    parts = (hybrid, llama) if part == "anchor" else (llama, hybrid)
    model = randomize(compose(*parts, [(0, 1)], num_heads=4))
    with pytest.raises(ValueError, match="not supported with stateful models, such as ComposedForCausalLM"):
        model.generate(prompts(1), **GREEDY, prompt_lookup_num_tokens=2)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(
            {"assistant_early_exit": 2},
            marks=pytest.mark.seam(
                attach="`assistant_early_exit`",
                to="composition",
                result="refused",
                why="draft with `assistant_model`, for instance the anchor, or with `prompt_lookup_num_tokens`",
            ),
        ),
        pytest.param(
            {"use_mtp": True},
            marks=pytest.mark.seam(
                attach="`use_mtp`, `speculation_type`",
                to="composition",
                result="refused",
                why="they run layers of the anchor alone; draft with `assistant_model`",
            ),
        ),
    ],
)
def test_drafts_from_a_part_of_the_model_are_refused(how: dict[str, Any]) -> None:
    if not hasattr(GenerationConfig(), next(iter(how))):
        pytest.skip("this release of transformers has no such argument")
    name, model = next(iter(how)), composed_model("llama")
    with pytest.raises(ValueError, match=rf"generate: `{name}` must be None.*Draft with `assistant_model`"):
        model.generate(prompts(1), **GREEDY, **how)
