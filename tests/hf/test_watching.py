"""`watch`: the numbers that Trainer logs about the inside of a composition and of dual LoRA."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from dual_models import TARGETS, llama, scatter
from families import FAMILIES, composed_model, prompts, randomize
from transformers import Trainer, TrainerCallback, TrainingArguments

from calm_fast import add_dual_lora, get_gates, record_gates
from calm_fast.hf import cache_augmenter_states, compose, watch

ROWS = [{"input_ids": row, "labels": row} for row in prompts(8, 10).clamp(max=60).tolist()]


class Reports(TrainerCallback):
    """Keeps what a reporting integration gets."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def trainer(model: Any, folder: Path, reports: Reports | None = None, **settings: Any) -> Trainer:
    fixed = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "learning_rate": 0.0}
    fixed |= {"max_steps": 2, "logging_steps": 2, "per_device_train_batch_size": 4}
    arguments = TrainingArguments(output_dir=str(folder), **(fixed | settings))
    callbacks = None if reports is None else [reports]
    return Trainer(model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS[:3], callbacks=callbacks)


def test_the_residual_is_measured_against_the_state_before_it(tmp_path: Path) -> None:
    model, reports = composed_model("llama"), Reports()
    run = trainer(model, tmp_path, reports)
    watch(run)
    run.train()
    sums = {c: torch.zeros(2, dtype=torch.float64) for c in range(3)}

    def keep(c: int, args: Any, output: torch.Tensor) -> None:
        pair = [(output - args[0]).double().square().sum(), args[0].double().square().sum()]
        sums[c] += torch.stack(pair)

    for c, connection in enumerate(model.connections):
        connection.register_forward_hook(lambda _, args, output, c=c: keep(c, args, output))
    with torch.no_grad():
        model(torch.tensor([row["input_ids"] for row in ROWS]), use_cache=False)
    logged = next(entry for entry in reports.logs if "loss" in entry)
    for c, (residual, state) in sums.items():
        assert logged[f"residual/{c}"] == pytest.approx(math.sqrt(residual / state), rel=1e-4)
    assert run.state.log_history[0] == logged | {"step": 2}
    assert not any(name.startswith("residual") for entry in reports.logs if "loss" not in entry for name in entry)


def test_a_fresh_connection_adds_nothing_and_counts_anew_after_each_log(tmp_path: Path) -> None:
    model = compose(FAMILIES["llama"].model(0), FAMILIES["llama"].model(1), [(0, 1)])
    run = trainer(model, tmp_path, logging_steps=1, learning_rate=0.1)
    watch(run)
    run.train()
    first, second = (entry["residual/0"] for entry in run.state.log_history if "loss" in entry)
    assert first == 0 < second
    assert not any(connection._forward_hooks for connection in model.connections)


def test_the_gates_are_those_of_the_training_batches(tmp_path: Path) -> None:
    model = scatter(add_dual_lora(llama(), TARGETS, rank=4))
    reports = Reports()
    run = trainer(model, tmp_path, reports, eval_strategy="steps", eval_steps=1, max_steps=2, logging_steps=2)
    watch(run)
    run.train()
    record_gates(model)
    with torch.no_grad():
        model(torch.tensor([row["input_ids"] for row in ROWS]))
    expected = get_gates(model)
    logged = next(entry for entry in reports.logs if "loss" in entry)
    for path, gate in expected.items():
        assert logged[f"gate/{path}/mean"] == pytest.approx(gate.mean, rel=1e-5)
        assert logged[f"gate/{path}/std"] == pytest.approx(gate.std, rel=1e-4)
    means = [gate.mean for gate in expected.values()]
    assert logged["gate/mean"] == pytest.approx(sum(means) / len(means), rel=1e-5)
    assert not any(name.startswith("gate") for entry in reports.logs if "eval_loss" in entry for name in entry)


def test_what_cannot_be_watched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="`trainer` must be a Trainer"):
        watch(composed_model("llama"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one of a composition or of a model with dual LoRA layers"):
        watch(trainer(FAMILIES["llama"].model(0), tmp_path))
    compiled = trainer(composed_model("llama"), tmp_path)
    compiled.args.torch_compile = True
    with pytest.raises(ValueError, match="does not compile the model"):
        watch(compiled)


def test_the_share_of_cached_states_counts_augmenters(tmp_path: Path) -> None:
    """With cached states the residuals are those of a run that runs its augmenters, and batches without them count."""

    def collate(batch: list[Any]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["input_ids"] for row in batch])
        return {"input_ids": ids, "labels": ids}

    models = [FAMILIES[name].model(seed) for seed, name in enumerate(("llama", "gpt2", "mistral"))]
    model = randomize(compose(models[0], models[1:], [[(-1, -1), (1, 2)], [(2, 0)]]))
    model.eval()
    made = cache_augmenter_states(model, ROWS, tmp_path / "states", collate, batch_size=4, shard_rows=8, progress=False)
    cached, logs = made.collator(collate), {}

    def half(batch: list[Any]) -> dict[str, Any]:
        with_states = cached(batch)
        return {**with_states, "augmenter_hidden_states": [with_states["augmenter_hidden_states"][0], None]}

    for name, collator in (("run", collate), ("cached", cached), ("half", half)):
        run = trainer(model, tmp_path / name, per_device_train_batch_size=4, remove_unused_columns=False)
        run.data_collator = collator
        watch(run)
        run.train()
        logs[name] = next(entry for entry in run.state.log_history if "loss" in entry)
    assert "augmenter_states/from_cache" not in logs["run"]
    assert (logs["cached"]["augmenter_states/from_cache"], logs["half"]["augmenter_states/from_cache"]) == (1.0, 0.5)
    for c in range(3):
        for name in ("cached", "half"):
            assert logs[name][f"residual/{c}"] == pytest.approx(logs["run"][f"residual/{c}"], rel=1e-4)
