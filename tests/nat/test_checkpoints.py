"""A stage that was stopped anywhere ends at the weights of an unbroken one, whatever the stop left on disk."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from calm_fast import nat
from calm_fast.hf.adapters import WEIGHTS
from calm_fast.hf.dual_lora import dual_lora_layers
from calm_fast.nat import stages

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = nat.Settings(
    steps=6, batch_size=2, learning_rate=1e-2, warmup=1, rank=2, gate_dim=4, value_dim=4, dropout=0.2, save_every=2,
    progress=False,
)  # fmt: skip
FILES = ("dual_lora.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")  # as written


class Rows(torch.utils.data.Dataset):
    """Ten rows: not a whole number of epochs in any of the stages below."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        return {"input_ids": [3 + i, 4, 5, 2], "labels": [-100, 4, 5 + i, 2]}


def train(out: Path, settings: nat.Settings = SETTINGS) -> tuple[torch.Tensor, list[int]]:
    """Run the negative stage on a fresh model; return its weights and the logged steps."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0))
    losses = nat.train_negative(model, Rows(), 0, out, settings)
    weights = [p.detach().flatten() for m in dual_lora_layers(model).values() for p in m.parameters(recurse=False)]
    return torch.cat(weights), [int(entry["step"]) for entry in losses]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> torch.Tensor:
    return train(tmp_path_factory.mktemp("unbroken"))[0]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A folder with two whole checkpoints, of steps 2 and 4, as while the older one is not yet deleted."""
    folder = tmp_path_factory.mktemp("stopped")
    original = stages.DualLoRATrainer.training_step
    for step in (2, 4):
        calls = []

        def dies(self, *args, calls=calls, last=step, **kwargs):
            calls.append(1)
            if len(calls) > last:
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

        stages.DualLoRATrainer.training_step = dies
        try:
            with pytest.raises(KeyboardInterrupt):
                train(folder / f"until-{step}")
        finally:
            stages.DualLoRATrainer.training_step = original
        shutil.move(folder / f"until-{step}" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        shutil.rmtree(folder / f"until-{step}")
    return folder


@pytest.mark.parametrize("damage", ["missing with those after it", "missing", "half", "empty"])
@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_cut_short_gives_way_to_the_one_before(name, damage, stopped, unbroken, tmp_path) -> None:
    shutil.copytree(stopped, tmp_path / "out")
    folder = tmp_path / "out" / "checkpoint-4"
    content = (folder / name).read_bytes()
    for lost in FILES[FILES.index(name) :] if damage.endswith("after it") else (name,):
        (folder / lost).unlink()
    if damage in ("half", "empty"):
        (folder / name).write_bytes(content[: len(content) // 2] if damage == "half" else b"")
    with pytest.warns(UserWarning, match=rf"train_negative: checkpoint-4 in .* is incomplete .*{name}.*checkpoint-2"):
        weights, steps = train(tmp_path / "out")
    assert torch.equal(weights, unbroken) and steps == [1, 2, 3, 4, 5, 6]
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["checkpoint-6"]


def test_a_whole_checkpoint_is_taken_and_a_lone_broken_one_begins_anew(stopped, unbroken, tmp_path, recwarn) -> None:
    shutil.copytree(stopped / "checkpoint-4", tmp_path / "out" / "checkpoint-4")
    assert torch.equal(train(tmp_path / "out")[0], unbroken)
    assert not [w for w in recwarn if "incomplete" in str(w.message)]
    shutil.copytree(stopped / "checkpoint-4", tmp_path / "other" / "checkpoint-4")
    (tmp_path / "other" / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="optimizer.pt, 0 bytes, cannot be read: .* so the stage begins anew"):
        weights, steps = train(tmp_path / "other")
    assert torch.equal(weights, unbroken) and steps[0] == 1


def test_a_full_disk_is_an_error_and_the_stage_resumes(unbroken, tmp_path, monkeypatch) -> None:
    save, written = torch.save, []

    def full(content, file, *args, **kwargs):
        written.append(file)
        if len(written) == 5:  # the second file of the second checkpoint
            Path(file).write_bytes(b"PK")
            raise OSError(28, "No space left on device")
        save(content, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        train(tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "checkpoint-2").is_dir() and (tmp_path / "checkpoint-4").is_dir()
    with pytest.warns(UserWarning, match="checkpoint-4 in .* is incomplete"):
        assert torch.equal(train(tmp_path)[0], unbroken)


_KILLED = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_checkpoints import train
save = torch.save
def killing(content, file, *args, **kwargs):
    save(content, file, *args, **kwargs)
    if "checkpoint-4" in str(file) and str(file).endswith("optimizer.pt"):
        os.truncate(file, os.path.getsize(file) // 3)      # what had reached the disk
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = killing
train(Path(sys.argv[1]))
"""


def test_a_process_killed_while_it_writes_a_checkpoint_resumes(unbroken, tmp_path, forked) -> None:
    killed = forked.run("-c", _KILLED, tmp_path, ROOT / "tests" / "nat", cwd=tmp_path.parent, path=ROOT)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with pytest.warns(UserWarning, match="checkpoint-4 in .* is incomplete .*optimizer.pt"):
        assert torch.equal(train(tmp_path)[0], unbroken)


@pytest.mark.parametrize("save_every", [2, 4, 100])
def test_a_stage_stopped_after_its_last_step_trains_no_further(save_every, unbroken, tmp_path) -> None:
    settings = dataclasses.replace(SETTINGS, save_every=save_every)
    first, steps = train(tmp_path, settings)
    again, same_steps = train(tmp_path, settings)
    assert torch.equal(first, unbroken) and torch.equal(again, unbroken)
    assert steps == same_steps == [1, 2, 3, 4, 5, 6]


def test_other_numbers_of_steps_are_refused_or_named(stopped, tmp_path) -> None:
    shutil.copytree(stopped, tmp_path / "out")
    with pytest.raises(ValueError, match="train_negative: `out` must be .* at most 3 steps, .* checkpoint-4; choose"):
        train(tmp_path / "out", dataclasses.replace(SETTINGS, steps=3))
    with pytest.warns(UserWarning, match="checkpoint-4 of a stage of 6 steps; it goes on to 8 steps"):
        assert train(tmp_path / "out", dataclasses.replace(SETTINGS, steps=8))[1][-1] == 8


def test_a_checkpoint_of_other_layers_is_refused(stopped, tmp_path) -> None:
    shutil.copytree(stopped, tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"must be a checkpoint of the same layers, .* differs in .*v_proj.gate_k, .*\(8 in"
    ):
        train(tmp_path / "out", dataclasses.replace(SETTINGS, target_modules=("q_proj",)))


@pytest.mark.parametrize("changed", [{"alpha": 4.0}, {"variant": "released"}, {"dropout": 0.0}])
def test_a_checkpoint_of_other_settings_is_refused(changed, stopped, tmp_path) -> None:
    shutil.copytree(stopped, tmp_path / "out")
    (name,) = changed
    with pytest.raises(ValueError, match=f"`resume_from_checkpoint` must be .* has {name}=.* Choose another folder"):
        train(tmp_path / "out", dataclasses.replace(SETTINGS, **changed))


def test_a_checkpoint_of_tensors_from_another_save_is_refused(stopped, tmp_path) -> None:
    shutil.copytree(stopped, tmp_path / "out")
    shutil.copy(tmp_path / "out" / "checkpoint-2" / FILES[0], tmp_path / "out" / "checkpoint-4" / FILES[0])
    with pytest.raises(ValueError, match="`resume_from_checkpoint` must be .* are of different saves"):
        train(tmp_path / "out")


def test_a_stage_over_another_negative_adapter_or_of_another_kind_is_refused(model_folder, rows_file, tmp_path) -> None:
    settings = dataclasses.replace(SETTINGS, steps=2)
    nat.run(rows_file, model_folder, tmp_path / "run", settings)
    adapter, checkpoints = tmp_path / "run" / "negative", tmp_path / "run" / "checkpoints"

    def resume(folder: Path) -> None:
        model = LlamaForCausalLM.from_pretrained(model_folder)
        nat.train_nat(model, Rows(), adapter, 0, folder, settings)

    resume(checkpoints / "nat")
    with pytest.raises(ValueError, match="`resume_from_checkpoint` must be .* has mode='neg' instead of 'mix'"):
        resume(checkpoints / "negative")
    save_file({k: t + 1 for k, t in load_file(adapter / WEIGHTS).items()}, adapter / WEIGHTS)
    with pytest.raises(ValueError, match="`resume_from_checkpoint` must be .* over the same negative LoRA, .*_neg"):
        resume(checkpoints / "nat")


def test_a_run_stopped_between_its_stages_ends_the_same(model_folder, rows_file, tmp_path, monkeypatch) -> None:
    settings = dataclasses.replace(SETTINGS, steps=2)
    whole = nat.run(rows_file, model_folder, tmp_path / "whole", settings)
    out = tmp_path / "cut"
    for work in ("save_lora_adapter", "gate_means", "distil_nce", "save_lora_adapter"):
        with monkeypatch.context() as patch:
            patch.setattr(f"calm_fast.nat.pipeline.{work}", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                nat.run(rows_file, model_folder, out, settings)
    assert nat.run(rows_file, model_folder, out, settings) == whole
    assert nat.run(rows_file, model_folder, out, settings) == whole  # a finished run
    for file in ("negative/adapter_model", "nat/dual_lora", "student/adapter_model"):
        one, other = (load_file(tmp_path / folder / f"{file}.safetensors") for folder in ("whole", "cut"))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one), file
    assert json.loads((out / "results.json").read_text()) == whole
    with pytest.raises(ValueError, match="`out` must be .* a run with other settings; choose another folder"):
        nat.run(rows_file, model_folder, out, dataclasses.replace(settings, steps=3))
