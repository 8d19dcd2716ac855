"""Held-out losses: equal to the model's own loss, with intervals over rows, in batches of any size."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import SENTENCES, byte_level
from transformers import AutoModelForCausalLM

from calm_fast.composing import scoring
from calm_fast.composing.batches import single_collator
from calm_fast.composing.data import Row, encode_all
from calm_fast.composing.scoring import RowLosses, compare, describe, row_losses

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scored(anchor):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(anchor), byte_level(chat=True)
    rows = [Row(" opens" + s.split("opens")[1], s.split(" opens")[0]) for s in SENTENCES[:6]] + [Row("key 3 3 opens.")]
    return model, tokenizer, encode_all(rows, tokenizer, 64)


def test_row_losses_are_those_of_each_row_alone(scored, monkeypatch) -> None:
    model, tokenizer, examples = scored
    model.train()
    losses = row_losses(model, examples, single_collator(tokenizer), CPU)
    assert model.training, "the mode comes back"
    model.eval()
    for i, example in enumerate(examples):
        item = example.item()
        ids, labels = (torch.tensor([item[name]]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            mean = model(ids, labels=labels).loss
        assert losses.loss[i].item() == pytest.approx(mean.item() * example.scored, rel=1e-5)
    monkeypatch.setattr(scoring, "_LOGIT_BYTES", 1)  # one row a batch
    alone = row_losses(model, examples, single_collator(tokenizer), CPU)
    assert torch.allclose(losses.loss, alone.loss, rtol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "budget", "starts"),
    [([3, 3, 3], 6, [0, 2]), ([9, 1], 4, [0, 1]), ([1], 9, [0]), ([1, 5, 1, 1], 5, [0, 1, 2])],
)
def test_batches_keep_the_logits_small(sizes, budget, starts) -> None:
    assert scoring._batches(sizes, budget) == starts


def losses(values: list[float], tokens: int = 2) -> RowLosses:
    count = torch.full((len(values),), tokens)
    return RowLosses(torch.tensor(values, dtype=torch.float64), count, 4 * count)


def test_units_and_intervals() -> None:
    found = describe(losses([2.0, 4.0, 6.0, 8.0]))
    assert found["loss_per_token"] == 2.5 and found["perplexity"] == pytest.approx(math.exp(2.5), abs=1e-5)
    assert found["bits_per_byte"] == pytest.approx(2.5 / 4 / math.log(2), abs=1e-6)
    low, high = found["loss_per_token_interval"]
    assert 1.0 <= low < 2.5 < high <= 4.0
    assert describe(losses([2.0]))["loss_per_token_interval"] is None, "one row says nothing about others"
    better, worse = losses([1.0, 3.0, 5.0, 7.0]), losses([2.0, 4.0, 6.0, 8.0])
    pair = compare(better, worse, "tokens")
    assert pair == {"unit": "nats per token", "difference": -0.5, "interval": None}, "the same in every row"
    assert compare(better, losses([9.0, 4.0, 6.0, 8.0]), "bytes")["interval"][1] < 0


def test_losses_that_are_not_finite_are_null_in_json() -> None:
    found = describe(losses([float("nan"), 1.0]))
    assert found["loss_per_token"] is None and found["loss_per_token_interval"] is None
