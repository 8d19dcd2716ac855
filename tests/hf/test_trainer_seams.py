"""Settings of transformers' Trainer on a composition: the loss is the anchor's, or the setting is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import FAMILIES, composed_model, prompts
from torch import nn
from transformers import Trainer, TrainingArguments, pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from calm_fast.hf import ComposedForCausalLM, compose

ROWS = [{"input_ids": row, "labels": [-100] * (n % 5) + row[n % 5 :]} for n, row in enumerate(prompts(8, 10).tolist())]


def trainer(model: Any, folder: Path, steps: int = 2, loss: Any = None, **settings: Any) -> Trainer:
    settings = {"per_device_train_batch_size": 4, "learning_rate": 0.5, "optim": "sgd"} | settings
    settings |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 1}
    arguments = TrainingArguments(output_dir=str(folder), max_steps=steps, **settings)
    return Trainer(model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS, compute_loss_func=loss)


def loss_of(model: Any, folder: Path, **settings: Any) -> float:
    """Return the loss that Trainer computes for `model` on the first rows."""
    batch = {key: torch.tensor([row[key] for row in ROWS[:4]]) for key in ROWS[0]}
    run = trainer(model, folder, **settings)
    with torch.no_grad():
        return float(run.compute_loss(run.model.eval(), batch))


def trained(folder: Path, steps: int = 2, loss: Any = None, **settings: Any) -> torch.Tensor:
    """Return every weight of a composition after some steps, as one vector."""
    model = composed_model("llama")
    trainer(model, folder, steps, loss, **settings).train()
    return torch.cat([parameter.detach().flatten() for parameter in model.connections.parameters()])


class OtherName(ComposedForCausalLM):
    """A user's subclass, whose name says nothing."""


def untrained(cls: type[ComposedForCausalLM] = ComposedForCausalLM) -> Any:
    """Return a composition with the logits of its anchor."""
    model = compose(FAMILIES["llama"].model(0), FAMILIES["llama"].model(1), [(0, 1)])
    return model if cls is ComposedForCausalLM else cls(model.config, model.anchor, [FAMILIES["llama"].model(1)])


def adapted() -> Any:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=r"anchor\..*\.q_proj")
    return peft.get_peft_model(untrained(), config)


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(
            untrained,
            marks=pytest.mark.seam(
                attach="Trainer: `label_smoothing_factor`",
                to="composition",
                result="works",
                why="labels are shifted as for the anchor's class",
            ),
        ),
        pytest.param(lambda: untrained(OtherName), id="subclass"),
        pytest.param(adapted, id="PEFT"),
    ],
)
def test_label_smoothing_shifts_the_labels(build: Any, tmp_path: Path) -> None:
    expected = loss_of(FAMILIES["llama"].model(0), tmp_path, label_smoothing_factor=0.1)
    assert loss_of(build(), tmp_path, label_smoothing_factor=0.1) == pytest.approx(expected, abs=1e-6)
    assert expected != pytest.approx(loss_of(untrained(), tmp_path), abs=1e-3)


def test_the_registered_name_is_the_name_that_trainer_looks_up() -> None:
    assert ComposedForCausalLM.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    assert untrained(OtherName)._get_name() == ComposedForCausalLM.__name__


def test_labels_are_counted_from_the_second_on(tmp_path: Path) -> None:
    """Trainer counts what a shifting loss predicts, by a name that a subclass does not have."""
    batch = [{"labels": torch.tensor([[5, 6, 7]])}]
    runs = [trainer(model, tmp_path) for model in (FAMILIES["llama"].model(0), untrained(OtherName))]
    assert len({int(run._get_num_items_in_batch(batch, torch.device("cpu"))) for run in runs}) == 1


def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    logits, labels = outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(logits.float(), labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "eager"},
            marks=pytest.mark.seam(
                attach="Trainer: `torch_compile=True`",
                to="composition",
                result="works",
                why="the steps are those of eager training",
            ),
        ),
        pytest.param(
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
            marks=pytest.mark.seam(
                attach="Trainer: `gradient_accumulation_steps`",
                to="composition",
                result="works",
                why="small batches accumulate to the step of the large batch; tokens are weighed, not batches",
            ),
        ),
        pytest.param(
            {"loss": own_loss},
            marks=pytest.mark.seam(
                attach="Trainer: `compute_loss_func`",
                to="composition",
                result="works",
                why="it gets the composed logits and the unshifted labels",
            ),
        ),
        pytest.param(
            {"include_num_input_tokens_seen": "all", "auto_find_batch_size": True},
            marks=pytest.mark.seam(
                attach="Trainer: `include_num_input_tokens_seen`, `auto_find_batch_size`",
                to="composition",
                result="works",
                why="the steps are the same",
            ),
        ),
        pytest.param(
            {"average_tokens_across_devices": False, "label_names": ["labels"], "prediction_loss_only": True},
            marks=pytest.mark.seam(
                attach="Trainer: `average_tokens_across_devices`, `label_names`, `prediction_loss_only`",
                to="composition",
                result="works",
                why="the steps are the same",
            ),
        ),
    ],
)
def test_a_setting_that_must_not_change_the_steps_does_not(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.testing.assert_close(trained(tmp_path, **settings), trained(tmp_path), rtol=1e-4, atol=1e-5)


def test_label_smoothing_accumulates_to_the_large_batch(tmp_path: Path) -> None:
    smoothed = {"label_smoothing_factor": 0.1}
    small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    together, apart = trained(tmp_path, **smoothed), trained(tmp_path, **smoothed | small)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, trained(tmp_path), atol=1e-4)


@pytest.mark.parametrize("model", [untrained, composed_model], ids=["composition", "trained"])
@pytest.mark.seam(
    attach="Trainer: `neftune_noise_alpha`",
    to="composition",
    result="refused",
    why="its noise acts in training mode and the parts stay in eval mode; train without it",
)
def test_neftune_is_refused(model: Any, tmp_path: Path) -> None:
    composed = model("llama") if model is composed_model else model()
    with pytest.raises(ValueError, match=r"`neftune_noise_alpha` must be None.* got 5.0\. Train without it"):
        trainer(composed, tmp_path, neftune_noise_alpha=5.0).train()
    del composed.get_input_embeddings().neftune_noise_alpha
    composed.train()


@pytest.mark.seam(
    attach="an anchor whose loss takes no `num_items_in_batch` (Gemma 3n, most vision models)",
    to="composition",
    result="works",
    why="Trainer scales the loss as it scales the anchor's",
)
def test_the_loss_is_scaled_as_the_anchors(tmp_path: Path) -> None:
    class Own(type(FAMILIES["llama"].model(0))):  # type: ignore[misc]  # a class made for the test
        accepts_loss_kwargs = False

    anchor = Own(FAMILIES["llama"].model(0).config)
    model = compose(anchor, FAMILIES["llama"].model(1), [(0, 1)])
    assert not trainer(model, tmp_path).model_accepts_loss_kwargs
    assert trainer(untrained(), tmp_path).model_accepts_loss_kwargs


class Messages(logging.Handler):
    """Keeps what transformers logs; its loggers do not propagate."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record.getMessage())


@pytest.mark.seam(
    attach='`pipeline("text-generation", model=...)`',
    to="composition",
    result="works",
    why="it is known as a causal language model, and a batch is padded on the left",
)
def test_the_pipeline_knows_the_class() -> None:
    from test_generation import words

    messages = Messages(logging.ERROR)
    logging.getLogger("transformers").addHandler(messages)
    try:
        pipeline("text-generation", model=untrained(), tokenizer=words())
    finally:
        logging.getLogger("transformers").removeHandler(messages)
    assert messages.seen == []
