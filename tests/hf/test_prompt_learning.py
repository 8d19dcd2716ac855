"""PEFT methods that are no LoRA on a composition: those that prepend virtual tokens are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import composed_model, prompts

peft = pytest.importorskip("peft")
SIZES = {"token_dim": 32, "num_layers": 3, "num_attention_heads": 4, "num_transformer_submodules": 1}
TASK = {"task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        pytest.param(
            peft.PromptTuningConfig(**TASK, **SIZES, num_virtual_tokens=3),
            "`inputs_embeds` must be None.*every part embeds the tokens itself",
            marks=pytest.mark.seam(
                attach="PEFT prompt tuning, p-tuning",
                to="composition",
                result="refused",
                why="the augmenters cannot read vectors in place of tokens; train LoRA or the connections",
            ),
        ),
        (
            peft.PromptEncoderConfig(**TASK, **SIZES, num_virtual_tokens=3, encoder_hidden_size=8),
            "`inputs_embeds` must be None",
        ),
        pytest.param(
            peft.PrefixTuningConfig(**TASK, **SIZES, num_virtual_tokens=3),
            "must be .* got a DynamicCache that another model filled|under one name",
            marks=pytest.mark.seam(
                attach="PEFT prefix tuning",
                to="composition",
                result="refused",
                why="its cache holds keys that the augmenters have not read; train LoRA or the connections",
            ),
        ),
    ],
)
@pytest.mark.parametrize("call", ["train", "generate"])
def test_virtual_tokens_are_refused(config: Any, problem: str, call: str) -> None:
    model, ids = peft.get_peft_model(composed_model("llama"), config), prompts()
    with pytest.raises(ValueError, match=problem):
        if call == "train":
            model.train()(ids, labels=ids)
        else:
            model.generate(input_ids=ids, max_new_tokens=2)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(
            peft.IA3Config(**TASK, target_modules=r"anchor\..*\.[kv]_proj", feedforward_modules=[]),
            marks=pytest.mark.seam(
                attach='PEFT IA3 on the anchor (`target_modules=r"anchor\\..*"`)',
                to="composition",
                result="works",
                why="its vectors train through the connections' states",
            ),
        ),
        peft.VeraConfig(**TASK, target_modules=r"anchor\..*\.q_proj", r=4),
    ],
)
def test_vectors_on_the_anchor_train(config: Any) -> None:
    torch.manual_seed(0)
    model, ids = peft.get_peft_model(composed_model("llama"), config).train(), prompts()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, 5e-2), []
    for _ in range(4):
        losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
