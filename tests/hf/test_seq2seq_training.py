"""Compositions over an encoder-decoder: Seq2SeqTrainer, gradient checkpointing, files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES, switch
from seq2seq_models import ANCHORS, anchor, composed_model, shared, texts
from transformers import AutoConfig, AutoModelForSeq2SeqLM, Seq2SeqTrainer, Seq2SeqTrainingArguments

from calm_fast.hf import ComposedForCausalLM, ComposedForSeq2SeqLM, ComposedSeq2SeqConfig, compose

each = pytest.mark.parametrize("name", ANCHORS)


def rows(count: int = 8) -> list[dict[str, torch.Tensor]]:
    source, target = texts(count)
    return [{"input_ids": one, "labels": two} for one, two in zip(source, target, strict=True)]


def trainer(model: Any, out: Path, steps: int, **kwargs: Any) -> Seq2SeqTrainer:
    settings = {"per_device_train_batch_size": 4, "learning_rate": 5e-3, "report_to": [], "use_cpu": True}
    settings |= {"disable_tqdm": True, "save_strategy": "no", "predict_with_generate": True}
    arguments = Seq2SeqTrainingArguments(output_dir=str(out), max_steps=steps, **(settings | kwargs))
    score = lambda p: {"share": float((p.predictions[:, 1:6] == p.label_ids[:, :5]).mean())}  # noqa: E731
    return Seq2SeqTrainer(model=model, args=arguments, train_dataset=rows(), eval_dataset=rows(), compute_metrics=score)


@pytest.mark.seam(
    attach="Seq2SeqTrainer with `predict_with_generate`, over an encoder-decoder anchor",
    to="composition",
    result="works",
    why="labels, decoder_input_ids and generation follow the anchor's rules",
)
@each
def test_seq2seq_trainer_trains_the_connections_and_predicts_with_generate(name: str, tmp_path: Path) -> None:
    model = compose(anchor(name), FAMILIES["llama"].model(1, width=24), [(-1, -1), (2, 1)])
    frozen = {key: p.clone() for key, p in model.named_parameters() if not key.startswith("connections.")}
    one = trainer(model, tmp_path, 30, generation_max_length=6)
    before = one.evaluate()
    one.train()
    after = one.evaluate()
    assert after["eval_loss"] < before["eval_loss"] and 0 <= after["eval_share"] <= 1
    predicted = one.predict(rows(2)).predictions
    source = torch.stack([row["input_ids"] for row in rows(2)])
    expected = model.generate(source, max_length=6)
    assert torch.equal(torch.tensor(predicted)[:, : expected.shape[1]], expected)
    for key, value in frozen.items():
        assert torch.equal(value, model.get_parameter(key)), key


def test_label_smoothing_uses_the_anchors_own_shift(tmp_path: Path) -> None:
    from transformers import DataCollatorForSeq2Seq

    model, (source, target) = shared("bart"), texts()
    given = model.prepare_decoder_input_ids_from_labels(target)
    assert torch.equal(given, model.anchor.prepare_decoder_input_ids_from_labels(target))
    with torch.no_grad():
        assert torch.equal(model(source, decoder_input_ids=given).logits, model(source, labels=target).logits)
    pad = SimpleNamespace(pad=lambda features, **_: {k: torch.stack([f[k] for f in features]) for k in features[0]},
                          padding_side="right")  # fmt: skip
    batch = DataCollatorForSeq2Seq(pad, model=model)([{"input_ids": one, "labels": two.tolist()} for one, two in
                                                      zip(source, target, strict=True)])  # fmt: skip
    assert torch.equal(batch["decoder_input_ids"], given)


@each
def test_checkpointed_gradients_equal_plain_ones(name: str) -> None:
    model, (source, target) = composed_model(name).train(), texts()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            switch(model, "enable")()
            assert model.checkpoints
        model.zero_grad()
        loss = model(source, labels=target).loss
        loss.backward()
        found.append([parameter.grad.clone() for parameter in model.connections.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert all(grad.abs().sum() > 0 for grad in found[0])
    assert not any(p.requires_grad for part in (model.anchor, *model.augmenters) for p in part.parameters())
    with pytest.raises(ValueError, match="ComposedForSeq2SeqLM: `use_cache` must be False while training with grad"):
        model(source, labels=target, use_cache=True)


@each
def test_a_saved_composition_loads_with_its_parts(name: str, tmp_path: Path) -> None:
    anchor(name).save_pretrained(tmp_path / "anchor")
    FAMILIES["llama"].model(1, width=24).save_pretrained(tmp_path / "augmenter")
    composed = compose(tmp_path / "anchor", str(tmp_path / "augmenter"), [(0, 1), (2, 2)])
    assert isinstance(composed, ComposedForSeq2SeqLM)
    for parameter in composed.connections.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    composed.config.decoder_start_token_id = composed.generation_config.decoder_start_token_id = 5
    composed.save_pretrained(tmp_path / "composed")
    (source, target), how = texts(), {"max_new_tokens": 5, "do_sample": False}
    for loaded in (
        ComposedForSeq2SeqLM.from_pretrained(tmp_path / "composed"),
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "composed"),
    ):
        assert isinstance(loaded, ComposedForSeq2SeqLM) and loaded.config.decoder_start_token_id == 5
        assert loaded.anchor.config.decoder_start_token_id == 5
        with torch.no_grad():
            expected = composed(source, labels=target)
            assert torch.equal(loaded(source, labels=target).logits, expected.logits)
        assert torch.equal(loaded.generate(source, **how), composed.generate(source, **how))
    config = AutoConfig.from_pretrained(tmp_path / "composed")
    assert isinstance(config, ComposedSeq2SeqConfig) and config.is_encoder_decoder and config.vocab_size == 97
    assert config.to_dict() == ComposedSeq2SeqConfig.from_dict(config.to_dict()).to_dict()
    with pytest.raises(ValueError, match="a composition that ComposedForCausalLM can run, got one whose anchor is a"):
        ComposedForCausalLM.from_pretrained(tmp_path / "composed")


def test_an_encoder_decoder_is_no_augmenter_by_its_path_either(tmp_path: Path) -> None:
    anchor("t5").save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="`augmenters` must be decoder-only models, got '.*t5', an encoder-decoder"):
        compose(FAMILIES["llama"].model(), tmp_path / "t5", "uniform:2")
