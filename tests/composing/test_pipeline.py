"""A training of connections: what it writes, that it goes on where it was killed, and what it refuses."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import SENTENCES, completions, write_rows

from calm_fast.composing import Settings, evaluate_folder, generate_text, pipeline, run
from calm_fast.composing.evaluate import warnings_of
from calm_fast.hf import ComposedForCausalLM

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = Settings(
    connections="uniform:2", steps=7, batch_size=3, learning_rate=2e-2, warmup=1, max_length=48, holdout=0.2,
    save_every=2, device="cpu", progress=False,
)  # fmt: skip


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", completions(SENTENCES[:20]))


def quiet(line: str) -> None:
    pass


def train(rows: Path, anchor: Path, sibling: Path, out: Path, settings: Settings = SETTINGS, **options: Any) -> dict:
    return run(rows, anchor, [sibling], out, settings, say=options.pop("say", quiet), **options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def test_a_run_says_what_it_does_and_writes_a_composition(rows, anchor, sibling, tmp_path) -> None:
    lines: list[str] = []
    out = tmp_path / "out"
    results = train(rows, anchor, sibling, out, replace(SETTINGS, steps=30, save_every=10), say=lines.append)
    said = "\n".join(lines)
    for words in (
        f"A   {sibling}: LlamaForCausalLM", "2 connections (0->0, 2->1)", "16 rows train", "4 are held out",
        "memory expected: at most", "A+B - B: -", "peak memory", "wrote ",
    ):  # fmt: skip
        assert words in said, words
    assert lines.index(next(line for line in lines if "memory expected" in line)) < 6, "before anything is trained"
    kept = json.loads((out / "results.json").read_text())
    assert kept == json.loads(json.dumps(results)) and kept["warnings"] == []
    held = kept["held_out"]["models"]
    assert list(held) == ["A", "B", "A+B"] and held["A+B"]["loss_per_token"] < held["B"]["loss_per_token"] - 0.5
    low, high = kept["held_out"]["differences"]["A+B - B"]["interval"]
    assert low < kept["held_out"]["differences"]["A+B - B"]["difference"] < high < 0
    assert kept["loss"][0]["step"] == 1 and kept["loss"][-1]["step"] == 30
    assert [point["step"] for point in kept["held_out_loss"]] == [0, 10, 20, 30]
    assert kept["held_out_loss"][0]["loss"] == pytest.approx(held["B"]["loss_per_token"], abs=1e-6), (
        "untrained, it is B"
    )
    assert kept["held_out_loss"][-1]["loss"] == pytest.approx(held["A+B"]["loss_per_token"], abs=1e-6)
    assert [point["step"] for point in kept["residuals"]] == [point["step"] for point in kept["loss"]]
    assert all(len(point["ratios"]) == 2 for point in kept["residuals"])
    assert kept["residuals"][0]["ratios"] == [0.0, 0.0] and min(kept["residuals"][-1]["ratios"]) > 0
    model = ComposedForCausalLM.from_pretrained(out)
    assert kept["parameters"]["trained"] == sum(p.numel() for p in model.connections.parameters())
    assert kept["memory"]["peak"] > kept["memory"]["expected"] > 0 and kept["seed"] == 0
    page = (out / "report.html").read_text()
    assert "What the connections add" in page and f"<td>{kept['residuals'][-1]['ratios'][1]:.4f}</td>" in page
    assert "<svg" in page and "Held-out loss" in page and not re.search("(src|href)=.http", page)
    for row in completions(SENTENCES[:20]):
        if f"<td>{row['prompt']}</td>" in page:
            break
    else:
        pytest.fail("the report shows no held-out prompt")

    found = evaluate_folder(out, rows, out=tmp_path / "eval", progress=False, say=quiet)
    assert found["held_out"]["models"]["A+B"]["rows"] == 20 and found["max_length"] == SETTINGS.max_length
    assert json.loads((tmp_path / "eval" / "results.json").read_text())["held_out"] == found["held_out"]


def test_held_out_rows_of_a_file_and_two_augmenters(rows, anchor, sibling, tmp_path) -> None:
    apart = write_rows(tmp_path / "apart.jsonl", [{"text": sentence} for sentence in SENTENCES[20:26]])
    settings = replace(SETTINGS, steps=2, warmup=0, connections=["uniform:2", [(-1, -1)]])
    results = run(rows, anchor, [sibling, anchor], tmp_path / "out", settings, held_out=apart, say=quiet)
    assert list(results["held_out"]["models"]) == ["A1", "A2", "B", "A+B"]
    assert results["connections"] == [[0, 0, 0], [0, 2, 1], [1, -1, -1]]
    assert results["rows"]["train"] == 20 and results["rows"]["held_out"] == 6
    models = results["held_out"]["models"]
    assert models["A2"] == models["B"], "the anchor beside itself"
    assert models["B"]["loss_per_token"] == pytest.approx(math.log(models["B"]["perplexity"]), rel=1e-5)


def test_without_held_out_rows_nothing_is_evaluated(rows, anchor, sibling, tmp_path) -> None:
    results = train(rows, anchor, sibling, tmp_path / "out", replace(SETTINGS, holdout=0.0, steps=2, warmup=0))
    assert results["held_out"] == {} and results["rows"]["train"] == 20
    assert "No rows were held out" in (tmp_path / "out" / "report.html").read_text()


_KILLED = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_pipeline import train
save = torch.save
def killing(content, file, *args, **kwargs):
    save(content, file, *args, **kwargs)
    if "checkpoint-4" in str(file) and str(file).endswith("optimizer.pt"):
        os.truncate(file, os.path.getsize(file) // 3)      # what had reached the disk
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = killing
train(*map(Path, sys.argv[2:]))
"""


def test_a_killed_run_goes_on_and_ends_at_equal_weights(rows, anchor, sibling, tmp_path, forked) -> None:
    out, whole = tmp_path / "killed", tmp_path / "whole"
    here = Path(__file__).parent
    killed = forked.run("-c", _KILLED, here, rows, anchor, sibling, out, cwd=tmp_path, path=ROOT)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (out / "model.safetensors").exists() and (out / "checkpoints" / "checkpoint-4").is_dir()
    with pytest.warns(UserWarning, match="compose: checkpoint-4 in .* is incomplete .*optimizer.pt.*checkpoint-2"):
        resumed = train(rows, anchor, sibling, out)
    unbroken = train(rows, anchor, sibling, whole)
    assert resumed["resumed_from"] == 2 and unbroken["resumed_from"] == 0
    assert same(weights(out), weights(whole))
    for name in ("loss", "held_out_loss", "held_out"):
        assert resumed[name] == unbroken[name], name


def test_a_finished_run_is_not_repeated_and_another_one_is_refused(
    rows, anchor, sibling, tmp_path, monkeypatch
) -> None:
    out = tmp_path / "out"
    first = train(rows, anchor, sibling, out, replace(SETTINGS, steps=2, warmup=0))
    again: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_train", lambda *args: pytest.fail("trained again"))
        assert train(rows, anchor, sibling, out, replace(SETTINGS, steps=2, warmup=0), say=again.append) == json.loads(
            json.dumps(first)
        )
    assert any("finished run" in line for line in again) and any("A+B - B" in line for line in again)
    for settings, message in ((replace(SETTINGS, steps=3, warmup=0), "settings"), (SETTINGS, "settings")):
        with pytest.raises(ValueError, match=f"compose: `out` must be .* holds a run with other {message}"):
            train(rows, anchor, sibling, out, settings)
    write_rows(rows, completions(SENTENCES[:19]))
    with pytest.raises(ValueError, match="other train; choose another folder"):
        train(rows, anchor, sibling, out, replace(SETTINGS, steps=2, warmup=0))


def test_a_run_that_ended_before_its_first_checkpoint_does_not_block_the_folder(
    rows, anchor, sibling, tmp_path, monkeypatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_compose", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(rows, anchor, sibling, tmp_path / "out")
    assert (tmp_path / "out" / "run.json").is_file()
    train(rows, anchor, sibling, tmp_path / "out", replace(SETTINGS, steps=2, warmup=0))


def test_a_stop_after_the_last_step_trains_no_further(rows, anchor, sibling, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(ComposedForCausalLM, "save_pretrained", _refuse_outside(ComposedForCausalLM.save_pretrained, out))
        with pytest.raises(KeyboardInterrupt):
            train(rows, anchor, sibling, out)
    results = train(rows, anchor, sibling, out)
    assert results["resumed_from"] == SETTINGS.steps
    whole = train(rows, anchor, sibling, tmp_path / "whole")
    assert same(weights(out), weights(tmp_path / "whole")) and results["held_out"] == whole["held_out"]


def _refuse_outside(plain: Any, out: Path) -> Any:
    def save(self: Any, folder: Any, **options: Any) -> None:
        if Path(folder) == out:
            raise KeyboardInterrupt
        plain(self, folder, **options)

    return save


def test_another_models_folder_is_not_overwritten(rows, anchor, sibling, tmp_path) -> None:
    shutil.copytree(sibling, tmp_path / "out")
    with pytest.raises(ValueError, match="compose: `out` must be a new folder .* holds a model; choose another"):
        train(rows, anchor, sibling, tmp_path / "out")


def test_a_loss_that_is_not_finite_stops_the_run(rows, anchor, sibling, tmp_path) -> None:
    with pytest.raises(ValueError, match="compose: the loss must be finite, got nan at step .*; lower `learning_rate`"):
        train(rows, anchor, sibling, tmp_path / "out", replace(SETTINGS, steps=20, learning_rate=1e30))


def test_warnings_name_an_untrained_composition_and_one_that_got_worse(rows, anchor, sibling, tmp_path) -> None:
    untrained = pipeline.compose(anchor, sibling, connections="uniform:2")
    untrained.save_pretrained(tmp_path / "untrained")
    found = evaluate_folder(tmp_path / "untrained", rows, progress=False, say=quiet)
    assert ["W_o of every connection is zero" in text for text in found["warnings"]] == [True]
    assert found["held_out"]["differences"]["A+B - B"]["difference"] == 0
    for ours, words in ((2.0, ["is above that of B alone (1.5000)"]), (1.0, []), (None, ["of A+B is not finite"])):
        held = {"models": {"B": {"loss_per_token": 1.5}, "A+B": {"loss_per_token": ours}}}
        told = warnings_of(held, untrained)[1:]
        assert len(told) == len(words) and all(word in text for word, text in zip(words, told, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"connections": [(9, 0)]}, "compose: `connections`"),
        ({"max_length": 100_000}, "compose: `max_length` must be at most the 2048 positions of the anchor"),
    ],
)
def test_settings_that_do_not_suit_the_models_are_refused_before_loading(
    change, message, rows, anchor, sibling, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(pipeline, "load_model", lambda *args: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message):
        train(rows, anchor, sibling, tmp_path / "out", replace(SETTINGS, **change))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"steps": True}, "`steps` must be an integer"),
        ({"steps": 5, "warmup": 5}, "`warmup` must be below `steps`"),
        ({"learning_rate": 0.0}, "`learning_rate` must be positive"),
        ({"weight_decay": -1.0}, "`weight_decay` must be at least 0"),
        ({"holdout": 1.0}, "`holdout` must be a share"),
        ({"dtype": "int8"}, "`dtype` must be one of auto"),
        ({"learning_rate": math.nan}, "`learning_rate` must be finite"),
    ],
)
def test_wrong_settings_are_refused(change, error) -> None:
    with pytest.raises((TypeError, ValueError), match=f"composing.Settings: {error}"):
        Settings(**change)


def test_checkpoints_fall_on_points_of_the_loss_curve() -> None:
    assert Settings(steps=1000).log_every == 10 and Settings(steps=1000).checkpoint_every == 100
    assert Settings(steps=1000, save_every=15).checkpoint_every == 10
    assert Settings(steps=3).checkpoint_every == 1


def test_greedy_text_is_that_of_generate_and_sampling_follows_the_seed(rows, anchor, sibling, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    train(rows, anchor, sibling, out, replace(SETTINGS, steps=2, warmup=0))
    capsys.readouterr()
    lines: list[str] = []
    text = generate_text(out, "key 1 2", max_new_tokens=6, say=lines.append, device="cpu")
    assert capsys.readouterr().out == text + "\n", "standard output has the text alone"
    assert any("memory expected" in line for line in lines)
    sampled = [generate_text(out, "key 1 2", max_new_tokens=12, temperature=2.0, seed=s, say=quiet) for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    chat = generate_text(out, "key 1 2", max_new_tokens=6, chat=True, say=quiet)
    assert isinstance(chat, str)
    with pytest.raises(ValueError, match="generate: `prompt` must be a text of at least one token"):
        generate_text(out, "", say=quiet)
    with pytest.raises(ValueError, match="generate: `temperature` must be at least 0"):
        generate_text(out, "x", temperature=-1.0, say=quiet)
    with pytest.raises(ValueError, match="generate: `prompt` must be text, got half a character"):
        generate_text(out, "key \ud83d", say=quiet)
    with pytest.raises(ValueError, match="generate: `device` must be one that torch can use here, got 'gpu'"):
        generate_text(out, "key", device="gpu", say=quiet)
    with pytest.raises(ValueError, match="eval: `device` must be one that torch can use here"):
        evaluate_folder(out, rows, device="gpu", progress=False, say=quiet)
