"""Families with something unusual: no padding token in the config, or tokens that see those after them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import VOCAB
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from calm_fast import score_sequences

_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_XLM = {"emb_dim": 32, "n_layers": 2, "n_heads": 4}
_SIZES: dict[str, dict[str, Any]] = {
    "codegen": {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
    "cpmant": {"hidden_size": 32, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 64, "num_hidden_layers": 2},
    "bert": _BERT,
    "roberta": _BERT,
    "xlm": _XLM,
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
}


def model(name: str, **flags: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](vocab_size=VOCAB, bos_token_id=None, eos_token_id=None, **_SIZES[name], **flags)
    if name in ("codegen", "cpmant", "rwkv") and hasattr(config, "pad_token_id"):
        del config.pad_token_id  # as transformers 5.24 leaves them
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def stepwise(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> float:
    """As generation without a cache does: each token from a forward of those before it."""
    total = 0.0
    for i, token in enumerate(completion):
        total += float(model(torch.tensor([prompt + completion[:i]])).logits[0, -1].double().log_softmax(-1)[token])
    return total


@pytest.mark.parametrize(
    ("name", "flags"), [("codegen", {}), ("rwkv", {}), ("bert", {"is_decoder": True}), ("xlm", {"causal": True})]
)
def test_causal_families_are_scored_as_they_generate(name: str, flags: dict[str, bool]) -> None:
    decoder = model(name, **flags)
    for prompt, completion in (([5, 6], [7, 8]), ([9], [3, 4, 5])):
        for share in (True, False):
            got = score_sequences(decoder, [prompt], [[completion]], share_prompt=share)[0].sum[0]
            assert float(got) == pytest.approx(stepwise(decoder, prompt, completion), abs=1e-4), (share, prompt)


@pytest.mark.seam(
    attach="a model that is not causal, in `score_sequences`",
    to="SelfConsistency",
    result="refused",
    why="it would read the token it is asked to predict; use a decoder, for BERT one with is_decoder=True",
)
@pytest.mark.parametrize("name", ["cpmant", "bert", "roberta", "xlm", "xlnet"])
def test_models_that_read_the_token_they_predict_are_refused(name: str) -> None:
    kind = type(bidirectional := model(name)).__name__
    with pytest.raises(ValueError, match=f"score_sequences: `model` must be a causal .*, got {kind}, whose"):
        score_sequences(bidirectional, [[5, 6]], [[[7, 8]]])
