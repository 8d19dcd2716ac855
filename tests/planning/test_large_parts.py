"""Parts of the size that people compose, without a weight: built on the meta device from their published shapes.

The parameter counts are those of the published models, so a layer that is built twice, or not, shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from calm_fast.hf import ComposedForCausalLM, compose

LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256,
)  # fmt: skip
QWEN_HALF_B = Qwen2Config(
    hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
    vocab_size=151936, tie_word_embeddings=True,
)  # fmt: skip
MIXTRAL = MixtralConfig(vocab_size=32000)  # 8x7B is the default
COUNTS = [(LLAMA_8B, 8_030_261_248), (QWEN_HALF_B, 494_032_768), (MIXTRAL, 46_702_792_704)]


def on_meta(config: PreTrainedConfig) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("config", "published"), COUNTS, ids=lambda value: type(value).__name__)
def test_a_large_anchor_is_composed_without_its_weights(config: PreTrainedConfig, published: int) -> None:
    anchor, augmenter = on_meta(config), on_meta(QWEN_HALF_B)
    assert count(anchor) == published
    model = compose(anchor, augmenter, [(11, 7), (23, 15)], num_heads=16, head_dim=64, vocab_size=32000, same_ids=True)
    assert model.anchor is anchor and all(p.is_meta and not p.requires_grad for p in anchor.parameters())
    inner, d, da = 16 * 64, anchor.config.hidden_size, 896
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # per connection a projection da -> d, then Wq, Wk, Wv, Wo, and the weight of a norm
    assert trained == 2 * (da * d + 4 * d * inner + d) == count(model.connections)
    assert {p.dtype for p in model.connections.parameters()} == {torch.float32}, "small steps are lost in bfloat16"
    # the augmenter is cut behind its last connected layer, and gives up its head
    assert len(model.augmenters[0].get_submodule(str(model.config.augmenter_layers[0]))) == 24
    ids = torch.zeros(1, 3, dtype=torch.int64, device="meta")
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.is_meta and logits.shape == (1, 3, config.vocab_size)


def test_parts_whose_weights_are_in_many_files(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    anchor = LlamaForCausalLM(LlamaConfig(vocab_size=97, **sizes)).eval()
    augmenter = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4)).eval()
    for name, model in (("anchor", anchor), ("augmenter", augmenter)):
        model.save_pretrained(tmp_path / name, max_shard_size="10KB")
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 2
    composed = compose(str(tmp_path / "anchor"), str(tmp_path / "augmenter"), "uniform:2", same_ids=True)
    with torch.no_grad():
        for p in composed.connections.parameters():
            p.add_(0.1 * torch.randn_like(p))
        composed.save_pretrained(tmp_path / "composed")
        ids = torch.arange(3, 12)[None]
        expected = composed(ids).logits
        assert torch.equal(ComposedForCausalLM.from_pretrained(tmp_path / "composed")(ids).logits, expected)
        whole = compose(anchor, augmenter, "uniform:2", same_ids=True)
        whole.connections.load_state_dict(composed.connections.state_dict())
        assert torch.equal(whole(ids).logits, expected)
