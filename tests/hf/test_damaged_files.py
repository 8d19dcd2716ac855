"""Files of a composition that were damaged, edited or exchanged: refused, or read as they were saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from saved import config_of, edit_config, logits, rebuilt
from transformers import AutoConfig, AutoModelForCausalLM

from calm_fast.hf import ComposedForCausalLM

LOAD = ComposedForCausalLM.from_pretrained


@pytest.mark.parametrize("damage", ["cut", "empty", "other values"])
def test_damaged_tensors_are_refused(damage: str, folder: Path) -> None:
    file = folder / "composed" / "model.safetensors"
    content = file.read_bytes()
    end = {"cut": b"", "empty": b"", "other values": bytes(byte ^ 64 for byte in content[-8:])}[damage]
    file.write_bytes(b"" if damage == "empty" else content[:-8] + end)
    with pytest.raises(ValueError, match="`pretrained_model_name_or_path` must be .* whole, got .* is damaged"):
        LOAD(folder / "composed")
    with pytest.raises(ValueError, match="is damaged"):
        rebuilt(folder).load_composition(str(file))


EDITS: list[dict[str, Any]] = [{"connections": [[[0, 0], [1, 1]]]}, {"cross_attention": {"pre_norm": False}}]


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_config_is_not_taken_for_that_of_the_tensors(
    edit: dict[str, Any], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, saved = logits(rebuilt(folder)), config_of(folder)
    ((name, value),) = edit.items()
    edit_config(folder, **{name: saved[name] | value if isinstance(value, dict) else value})
    assert torch.equal(logits(LOAD(folder / "composed")), expected)
    config = AutoConfig.from_pretrained(folder / "composed")
    for load in (LOAD, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=f"`config` must be the config that was saved .* with other {name}"):
            load(folder / "composed", config=config)
