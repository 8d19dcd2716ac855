"""What `nat.run` takes for the same run, and what it prints."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import LlamaForCausalLM

from calm_fast import nat

SETTINGS = nat.Settings(steps=2, batch_size=2, warmup=1, rank=1, gate_dim=2, value_dim=2, save_every=0, progress=False)


def test_a_finished_stage_of_another_model_is_not_taken_over(model_folder, rows_file, tmp_path) -> None:
    out, other, moved = tmp_path / "out", tmp_path / "other", tmp_path / "moved"
    first = nat.run(rows_file, model_folder, out, SETTINGS)
    shutil.copytree(model_folder, other)
    model = LlamaForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] += 1  # same config, same sizes
    model.save_pretrained(other)
    with pytest.raises(ValueError, match="`out` holds a run with other model; choose another folder"):
        nat.run(rows_file, other, out, SETTINGS)
    shutil.copytree(model_folder, moved)
    assert nat.run(rows_file, moved, out, SETTINGS) == first  # a copy is the same model, wherever it lies


def test_without_progress_no_log_line_is_printed(model_folder, rows_file, tmp_path, capfd) -> None:
    nat.run(rows_file, model_folder, tmp_path / "out", SETTINGS)
    assert capfd.readouterr().out == ""
