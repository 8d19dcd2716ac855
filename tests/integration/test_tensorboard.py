"""What `watch` adds to the logs arrives in tensorboard's files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("tensorboard")
sys.path.insert(0, str(Path(__file__).parents[1] / "hf"))

from families import composed_model, prompts  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

from calm_fast.hf import watch  # noqa: E402


@pytest.mark.integration(tool="TensorBoard", what="the numbers of watch(trainer)", verdict="works")
def test_the_residuals_arrive_in_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    model = composed_model("llama")
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, logging_steps=2, report_to=["tensorboard"], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in prompts(8, 6).tolist()]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    watch(trainer)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    for c in range(len(model.pairs)):
        found = [(event.step, event.value) for event in events.Scalars(f"train/residual/{c}")]
        logged = [(e["step"], e[f"residual/{c}"]) for e in trainer.state.log_history if "loss" in e]
        assert [step for step, _ in found] == [2, 4]
        assert [value for _, value in found] == pytest.approx([value for _, value in logged], rel=1e-6)
