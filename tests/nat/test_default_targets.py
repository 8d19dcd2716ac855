"""Layers that a run trains if none are named: those of the model's family, as `add_dual_lora` has them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from calm_fast import nat

SETTINGS = nat.Settings(steps=1, batch_size=2, warmup=0, rank=1, gate_dim=2, value_dim=2, save_every=0, progress=False)


def test_a_family_with_other_names_trains_without_naming_them(tiny: Any, rows_file: Any, tmp_path: Any) -> None:
    _, tok, _ = tiny
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tok), n_embd=16, n_layer=2, n_head=2, n_positions=128, bos_token_id=1,
                        eos_token_id=1)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tok.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    results = nat.run(rows_file, tmp_path / "model", out, SETTINGS, limit=4)
    assert results["identity"]["settings"]["target_modules"] == ["c_attn"]
    adapted = json.loads((out / "negative" / "adapter_config.json").read_text())["target_modules"]
    assert adapted == [f"transformer.h.{layer}.attn.c_attn" for layer in range(2)]
    assert set(results["losses"]) == {"negative", "nat", "student"}


def test_a_run_that_named_the_usual_layers_goes_on(tiny: Any, rows_file: Any, model_folder: Any, tmp_path: Any) -> None:
    named = nat.run(
        rows_file, model_folder, tmp_path / "out", replace(SETTINGS, target_modules=("q_proj", "v_proj")), limit=4
    )
    assert nat.run(rows_file, model_folder, tmp_path / "out", SETTINGS, limit=4) == named
