"""Files of a composition in training: Trainer, PEFT, accelerate, state dicts, and several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from families import prompts
from safetensors.torch import load_file
from saved import logits, rebuilt
from transformers import Trainer, TrainingArguments

from calm_fast.hf import ComposedForCausalLM

ROWS = [{"input_ids": row, "labels": row} for row in prompts(8, 10).tolist()]
LOAD = ComposedForCausalLM.from_pretrained


@pytest.mark.seam(
    attach="FSDP2 (`fully_shard`) or DDP, then `save_pretrained` in every process",
    to="composition",
    result="works",
    why="sharded tensors are gathered, and the process of rank 0 writes them",
)
@pytest.mark.slow
def test_two_processes_save_the_composition_whole(folder: Path, tmp_path: Path, forked) -> None:
    out = tmp_path / "out"
    worker = (Path(__file__).with_name("sharded_saving.py"), folder / "composed", out)
    started = [forked.start(*worker, rank, cwd=tmp_path) for rank in range(2)]
    done = [process.wait() for process in started]
    assert [one.returncode for one in done] == [0, 0], "\n".join(one.stdout + one.stderr for one in done)
    saved = sorted(path.name for path in out.iterdir())
    assert saved == ["connections", "ddp", "gathered", "loaded_while_sharded", "main_process", "plain"]
    expected = load_file(folder / "composed" / "model.safetensors")
    for name in saved:
        got = load_file(out / name / "model.safetensors")
        assert got.keys() == expected.keys() and all(got[key].equal(expected[key]) for key in expected), name
        assert torch.equal(logits(LOAD(out / name, check_parts=False, **parts(folder))), logits(rebuilt(folder)))


def parts(folder: Path) -> dict[str, Any]:
    return {"anchor": folder / "anchor", "augmenters": folder / "augmenter"}


def trainer(model: Any, out: Path, steps: int = 2, **settings: Any) -> Trainer:
    settings = {"per_device_train_batch_size": 4, "learning_rate": 0.02, "save_strategy": "no"} | settings
    settings |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 1}
    arguments = TrainingArguments(output_dir=str(out), max_steps=steps, **settings)
    return Trainer(model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS)


def test_checkpoints_and_save_model_load_as_compositions(folder: Path) -> None:
    model = rebuilt(folder)
    run = trainer(model, folder / "out", 2, save_strategy="steps", save_steps=1)
    run.train()
    run.save_model(str(folder / "final"))
    model.eval()
    assert torch.equal(logits(LOAD(folder / "final")), logits(model))
    assert torch.equal(logits(LOAD(folder / "out" / "checkpoint-2")), logits(model))
    assert not torch.equal(logits(LOAD(folder / "out" / "checkpoint-1")), logits(model))


def test_the_best_checkpoint_is_loaded_at_the_end(folder: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    model = rebuilt(folder)
    run = trainer(model, folder / "out", 2, **settings)
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name == "checkpoint-1", "the worst loss is the first one, and it was asked for"
    model.eval()
    assert torch.equal(logits(model), logits(LOAD(best)))


def test_a_checkpoint_of_another_composition_is_refused(folder: Path) -> None:
    """Trainer loads it with strict=False, which would only warn."""
    other = rebuilt(folder, bias=False)
    trainer(other, folder / "out", 1, save_strategy="steps", save_steps=1).train()
    model = rebuilt(folder)
    with pytest.raises(ValueError, match="load_state_dict: `state_dict` must be the tensors of .*missing.*bias"):
        trainer(model, folder / "again", 2).train(resume_from_checkpoint=str(folder / "out" / "checkpoint-1"))


def test_state_dicts_lose_wrappers_and_are_loaded_whole(folder: Path) -> None:
    source, model = rebuilt(folder), rebuilt(folder)
    for parameter in model.connections.parameters():
        parameter.data.zero_()
    own = {name: t for name, t in source.state_dict().items() if name.startswith("connections.")}
    for wrapped in ("module.{}", "_orig_mod.{}", "{}"):
        model.load_state_dict({wrapped.format(name): t for name, t in source.state_dict().items()})
        model.load_state_dict({wrapped.format(name): t for name, t in own.items()}, strict=False)
        assert torch.equal(logits(model), logits(source))
    model.load_state_dict(source.anchor.state_dict(prefix="anchor."), strict=False)
    one = {"connections.0.o_proj.weight": own["connections.0.o_proj.weight"]}
    for bad in (one, own | {"connections.7.o_proj.weight": torch.zeros(1)}, {"policy.weight": torch.zeros(1)}):
        with pytest.raises(ValueError, match="load_state_dict: `state_dict` must be the tensors of this composition"):
            model.load_state_dict(bad, strict=False)
    both = {"module.connections.0.o_proj.weight": own["connections.0.o_proj.weight"]}
    with pytest.raises(ValueError, match="one tensor per name"):
        model.load_state_dict(own | both, strict=False)


@pytest.mark.seam(
    attach="Trainer around a PeftModel of a composition (LoRA on the connections)",
    to="composition",
    result="works",
    why="checkpoints hold PEFT's adapter, which loads onto the saved composition",
)
def test_trainer_under_peft_saves_the_adapter(folder: Path) -> None:
    config = peft.LoraConfig(target_modules=r"connections\..*\.[qkvo]_proj")
    model = peft.get_peft_model(rebuilt(folder), config)
    run = trainer(model, folder / "out", 2, save_strategy="steps", save_steps=1)
    run.train()
    run.save_model(str(folder / "final"))
    for where in (folder / "final", folder / "out" / "checkpoint-2"):
        again = peft.PeftModel.from_pretrained(LOAD(folder / "composed"), where)
        assert torch.equal(logits(again.eval()), logits(model.eval()))
    assert not torch.equal(logits(model), logits(rebuilt(folder)))


@pytest.mark.seam(
    attach="accelerate: `unwrap_model(model).save_pretrained(state_dict=accelerator.get_state_dict(model))`",
    to="composition",
    result="works",
    why="as for any transformers model in accelerate's examples",
)
def test_the_recipe_of_accelerate(folder: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(rebuilt(folder))
    accelerator.unwrap_model(model).save_pretrained(
        folder / "again",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    assert torch.equal(logits(LOAD(folder / "again")), logits(model))
    expected = logits(model)
    accelerator.save_state(str(folder / "state"))
    with torch.no_grad():
        for parameter in model.connections.parameters():
            parameter.zero_()
    accelerator.load_state(str(folder / "state"))
    assert torch.equal(logits(model), expected)


@pytest.mark.seam(
    attach="accelerate: `save_model`",
    to="composition",
    result="refused",
    why="it would write the parts and no config; use `unwrap_model(model).save_pretrained`",
)
def test_what_save_model_of_accelerate_writes_is_refused(folder: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.save_model(accelerator.prepare(rebuilt(folder)), str(folder / "composed"))
    with pytest.raises(ValueError, match="tensors of format 1 to .*, got format none .*own save_pretrained"):
        LOAD(folder / "composed")
