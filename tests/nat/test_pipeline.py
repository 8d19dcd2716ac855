"""nat.run: it resumes only the same run, and prints nothing without progress."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

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
    with pytest.raises(ValueError, match="`out` must be .* holds a run with other model; choose another folder"):
        nat.run(rows_file, other, out, SETTINGS)
    shutil.copytree(model_folder, moved)
    assert nat.run(rows_file, moved, out, SETTINGS) == first  # a copy is the same model, wherever it lies


def test_another_tokenizer_and_damaged_files_are_refused(model_folder, rows_file, tmp_path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    first = nat.run(rows_file, model_folder, out, SETTINGS)
    shutil.copytree(model_folder, other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    one, two = list(vocabulary)[100:102]  # the same tokens with each other's ids
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="`out` must be .* holds a run with other tokenizer; choose another folder"):
        nat.run(rows_file, other, out, SETTINGS)
    earlier = {k: v for k, v in first["identity"].items() if k != "tokenizer"}
    (out / "results.json").write_text(json.dumps(first | {"identity": earlier}))
    assert nat.run(rows_file, model_folder, out, SETTINGS)["losses"] == first["losses"]
    for name in ("graded.json", "results.json"):
        (out / name).write_text('{"cut')
        with pytest.raises(ValueError, match=f"nat: `out` must be .* whose {name} cannot be read"):
            nat.run(rows_file, model_folder, out, SETTINGS)


def test_a_run_that_trained_nothing_does_not_keep_the_folder(model_folder, rows_file, tmp_path) -> None:
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"`model` must be the folder of a transformers .*, got '.*empty': "):
        nat.run(rows_file, empty, out, SETTINGS)
    with pytest.raises(ValueError, match=r"`model` must be the folder .*nowhere', which is no folder"):
        nat.run(rows_file, tmp_path / "nowhere", out, SETTINGS)
    assert not out.exists()
    with pytest.raises(ValueError, match="match no module of LlamaForCausalLM"):
        nat.run(rows_file, model_folder, out, replace(SETTINGS, target_modules=("query",)), limit=1)
    assert set(nat.run(rows_file, model_folder, out, SETTINGS)["losses"]) == {"negative", "nat", "student"}
    assert nat.run(rows_file, model_folder, tmp_path / "fresh", SETTINGS) == nat.run(
        rows_file, model_folder, out, SETTINGS
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"warmup": 300}, r"`warmup` must be below `steps` \(300\), or the learning rate is never reached, got 300"),
        ({"warmup": 1.5}, "`warmup` must be an integer, got float 1.5"),
        ({"rank": 2.0}, "`rank` must be an integer, got float 2.0"),
        ({"variant": "papr"}, "`variant` must be 'paper' or 'released', got 'papr'"),
        ({"seed": -1}, "`seed` must be at least 0, got -1"),
        ({"dropout": 1.0}, "`dropout` must be at least 0 and below 1, got 1.0"),
        ({"nce_alpha": float("inf")}, "`nce_alpha` must be finite, got inf"),
        ({"learning_rate": 0.0}, "`learning_rate` must be positive, got 0.0"),
        ({"nce_temperature": float("nan")}, "`nce_temperature` must be finite, got nan"),
    ],
)
def test_bad_settings_are_named(wrong, message) -> None:
    with pytest.raises((TypeError, ValueError), match=f"nat.Settings: {message}"):
        nat.Settings(**wrong)


def test_without_progress_no_log_line_is_printed(model_folder, rows_file, tmp_path, capfd) -> None:
    nat.run(rows_file, model_folder, tmp_path / "out", SETTINGS)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("given", "rising"),
    [({"steps": 9}, 0), ({"steps": 20}, 2), ({"steps": 20, "warmup": 7}, 7), ({"steps": 1}, 0)],
)
def test_the_learning_rate_rises_to_the_one_that_was_asked_for(given, rising, tiny, tmp_path) -> None:
    """Read off the log of a stage: the rate of every step is that of a linear rise and a cosine to zero."""
    make, tok, rows = tiny
    settings = replace(SETTINGS, **{"warmup": None, "learning_rate": 3e-3} | given)
    data = nat.RationaleDataset([nat.Example(row["question"], row["generated_answer"][0]) for row in rows], tok)
    logged = [entry["learning_rate"] for entry in nat.train_negative(make(), data, 0, tmp_path / "out", settings)]
    falling = settings.steps - rising
    want = [3e-3 * i / rising for i in range(rising)]
    want += [3e-3 * (1 + math.cos(math.pi * i / falling)) / 2 for i in range(falling)]
    assert logged == pytest.approx(want, rel=1e-6) and max(logged) == 3e-3


def test_a_long_stage_rises_over_twenty_steps_and_the_old_default_is_the_same_run() -> None:
    assert nat.Settings().warmup_steps == nat.Settings(steps=10_000).warmup_steps == 20
    assert nat.Settings(warmup=20).warmup_steps == 20
