"""PEFT on top of a composition: the page's blocks, what each choice of layers trains, and what is refused."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "hf"))
from families import composed_model, prompts  # noqa: E402

PAGE = Path(__file__).resolve().parents[2] / "docs" / "peft.md"
PATTERN = re.compile(r"^\| `(r?[\"\[].*?)` \| (LoRA .*?) \|$", re.MULTILINE)


def rows() -> list[tuple[str, str]]:
    """Return (target_modules as written, what trains) of every row of the page's table."""
    text = PAGE.read_text(encoding="utf-8").replace("\\|", "¦")
    return [(target.replace("¦", "|"), what) for target, what in PATTERN.findall(text)]


@pytest.mark.integration(tool="PEFT", what="LoRA on the anchor, the augmenters, the connections", verdict="works")
def test_the_table_says_what_trains() -> None:
    assert len(rows()) == 4
    for written, what in rows():
        target = eval(written)  # noqa: S307  a literal of our own page
        model = peft.get_peft_model(
            composed_model("llama"), peft.LoraConfig(target_modules=target, init_lora_weights=False)
        )
        ids = prompts()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        trained = {name.split(".")[2] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        told = {part for part in ("anchor", "augmenters", "connections") if part in what.partition(", wh")[0]}
        assert trained == told, (written, trained)


@pytest.mark.integration(tool="PEFT", what="prompt tuning, p-tuning, prefix tuning", verdict="refused")
def test_virtual_tokens_are_refused() -> None:
    sizes = {"token_dim": 32, "num_layers": 3, "num_attention_heads": 4, "num_transformer_submodules": 1}
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3} | sizes
    configs = [
        peft.PromptTuningConfig(**common),
        peft.PromptEncoderConfig(**common, encoder_hidden_size=8),
        peft.PrefixTuningConfig(**common),
    ]
    for config in configs:
        model, ids = peft.get_peft_model(composed_model("llama"), config), prompts()
        with pytest.raises(ValueError, match="`inputs_embeds` must be None|that another model filled|under one name"):
            model(input_ids=ids, labels=ids)


@pytest.mark.integration(tool="PEFT", what="an adapter in its own folder, loaded on a composition", verdict="works")
def test_an_adapter_is_a_folder_of_its_own(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=r"connections\..*\.[qkvo]_proj", init_lora_weights=False)
    model = peft.get_peft_model(composed_model("llama"), config).eval()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(composed_model("llama"), str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=prompts()).logits, model(input_ids=prompts()).logits)


@pytest.mark.integration(
    tool="PEFT", what="connections in `modules_to_save` beside LoRA: train, switch off, save, merge", verdict="works"
)
def test_connections_are_saved_with_the_adapter(tmp_path: Path) -> None:
    base, ids = composed_model("llama"), prompts()
    names = [f"connections.{i}" for i in range(len(base.connections))]
    before = base(ids, use_cache=False).logits
    config = peft.LoraConfig(target_modules=r"anchor\..*\.[qv]_proj", modules_to_save=names)
    model = peft.get_peft_model(base, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):  # lora_A has a gradient once lora_B is not zero
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in trained)
    assert {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"anchor", "connections"}
    with torch.no_grad():
        after = model.eval()(ids, use_cache=False).logits
        with model.disable_adapter():
            assert torch.equal(model(ids, use_cache=False).logits, before)
        assert not torch.equal(after, before)
        text = ids
        for _ in range(3):
            text = torch.cat((text, model(text, use_cache=False).logits[:, -1:].argmax(-1)), 1)
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, eos_token_id=None), text)
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(composed_model("llama"), str(tmp_path)).eval()
        assert torch.equal(again(ids, use_cache=False).logits, after)
        merged = again.merge_and_unload()
    kept = model.get_base_model().connections[0].modules_to_save["default"].state_dict()
    assert all(torch.equal(t, kept[name]) for name, t in merged.connections[0].state_dict().items())
