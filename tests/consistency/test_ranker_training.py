"""Losses and pair accuracy; training learns a signal that is there and nothing else."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from ranker_models import backbone, rows, tokenizer, truth

from calm_fast.consistency import Ranker, RankerSettings, pair_accuracy, ranking_loss, train_ranker
from calm_fast.consistency.ranking.losses import LOSSES

QUICK = RankerSettings(epochs=15, questions_per_step=16, progress=False, save_every=3)
FAST = replace(QUICK, learning_rate=1e-2)


def shuffled(labels: list[torch.Tensor]) -> list[torch.Tensor]:
    """Over all questions: shuffled within each, a question's share of right ones would still tell bce something."""
    every = torch.cat(labels)
    return list(every[torch.randperm(len(every))].split([len(row) for row in labels]))


def plain_loss(scores: list[list[float]], labels: list[list[bool]], loss: str, margin: float, power: float) -> float:
    """The definition, pair by pair."""
    values = []
    for row, right in zip(scores, labels, strict=True):
        if loss == "bce":
            each = [-math.log(s if r else 1 - s) for s, r in zip(row, right, strict=True)]
        else:
            pairs = itertools.product(
                [s for s, r in zip(row, right, strict=True) if r], [s for s, r in zip(row, right, strict=True) if not r]
            )
            each = [(1 - a) ** power + b**power if loss == "power" else max(0, margin - (a - b)) for a, b in pairs]
        if each:
            values.append(sum(each) / len(each))
    return sum(values) / len(values)


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_is_its_definition_on_ragged_questions(loss):
    sizes, labels = (4, 2, 7, 3), [[1, 0, 0, 1], [1, 1], [0, 1, 0, 0, 0, 1, 0], [0, 0, 0]]
    logits = torch.full((4, 7), float("nan"), dtype=torch.float64)
    padded, valid = torch.ones(4, 7, dtype=torch.bool), torch.zeros(4, 7, dtype=torch.bool)
    for i, n in enumerate(sizes):
        logits[i, :n], padded[i, :n], valid[i, :n] = torch.randn(n).double() * 2, torch.tensor(labels[i]).bool(), True
    scores = [row[:n].sigmoid().tolist() for row, n in zip(logits, sizes, strict=True)]
    expected = plain_loss(scores, [[bool(x) for x in row] for row in labels], loss, 0.4, 2.5)
    # what padding holds (here NaN) reaches neither the loss nor its gradient
    logits = torch.where(valid, logits, 3.0).requires_grad_()
    got = ranking_loss(logits, padded, valid, loss=loss, margin=0.4, power=2.5)
    assert got.item() == pytest.approx(expected, rel=1e-9)
    got.backward()
    assert bool((logits.grad[~valid] == 0).all())
    used = valid if loss == "bce" else valid & torch.tensor([True, False, True, False])[:, None]
    assert bool((logits.grad[valid & ~used] == 0).all())


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_gradient(loss):
    labels = torch.tensor([[True, False, True], [False, True, True]])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ranking_loss(x, labels, valid, loss=loss), logits)


def test_loss_of_questions_that_say_nothing_is_zero():
    logits = torch.randn(2, 3, requires_grad=True)
    ones = torch.ones(2, 3, dtype=torch.bool)
    loss = ranking_loss(logits, ones, ones, loss="margin")
    loss.backward()
    assert loss.item() == 0 and bool((logits.grad == 0).all())
    with pytest.raises(ValueError, match="ranking_loss: `loss` must be one of 'power', 'margin', 'bce', got 'hinge'"):
        ranking_loss(logits, ones, ones, loss="hinge")


def test_bad_arguments_of_loss_and_pair_accuracy_are_named():
    logits, flags = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for change, kind, message in (
        ({"logits": [[0.1]]}, TypeError, r"`logits` must be a tensor \(Q, K\), got list"),
        ({"logits": logits[0]}, ValueError, r"`logits` must be 2-dimensional \(Q, K\), got shape \(3,\)"),
        ({"logits": logits.long()}, TypeError, "`logits` must have dtype float32, .*, got torch.int64"),
        ({"labels": flags.long()}, TypeError, "`labels` must have dtype bool, got torch.int64"),
        ({"labels": flags[:1]}, ValueError, r"`labels` must be of the shape of `logits`, \(2, 3\), got shape \(1, 3\)"),
        ({"valid": None}, TypeError, r"`valid` must be a tensor \(Q, K\), got NoneType"),
        ({"valid": flags[:, :2]}, ValueError, r"`valid` must be .* got shape \(2, 2\)"),
        ({"margin": "0.3"}, TypeError, "`margin` must be a finite number, got str '0.3'"),
        ({"power": float("inf")}, ValueError, "`power` must be finite, got inf"),
    ):
        with pytest.raises(kind, match=f"ranking_loss: {message}"):
            ranking_loss(**({"logits": logits, "labels": flags, "valid": flags} | change))
    rows = [torch.tensor([0.9, 0.5]), torch.tensor([0.1])]
    for scores, labels, kind, message in (
        (rows, [[True, False]], ValueError, "`labels` must be .* each of the 2 questions of `scores`, got 1 entries"),
        (
            rows,
            [[True, False], [True, True]],
            ValueError,
            r"`labels\[1\]` must be .* each of 1 scores, got shape \(2,\)",
        ),
        ([rows[0], rows[0][:, None]], [[True, False]] * 2, ValueError, r"`scores\[1\]` must be 1-dim.* \(2, 1\)"),
        (0.5, [[True]], TypeError, "`scores` must be a sequence with one entry for each question, got float 0.5"),
        (rows, None, TypeError, "`labels` must be a sequence .*, got NoneType None"),
    ):
        with pytest.raises(kind, match=f"pair_accuracy: {message}"):
            pair_accuracy(scores, labels)


def test_pair_accuracy_counts_pairs_within_questions_and_ties_as_halves():
    scores = [torch.tensor([0.9, 0.5, 0.5]), torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.4]), torch.tensor([])]
    labels = [torch.tensor([True, False, True]), torch.tensor([True, False]), torch.tensor([True, True]), []]
    assert pair_accuracy(scores, labels) == (0.5, 3, 2)  # won, tied, lost
    nothing = pair_accuracy(scores[2:], labels[2:])
    assert nothing.accuracy != nothing.accuracy and nothing.pairs == 0


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_frozen_backbone_learns_what_tells_right_from_wrong(family):
    content, held, tok = rows(80), rows(40, seed=1), tokenizer(family)
    ranker = Ranker.from_backbone(backbone(family, len(tok)), tok, max_length=48, hidden=32)
    test = [r["question"] for r in held], [r["generated_answer"] for r in held]
    before = pair_accuracy(ranker.score(*test), truth(held)).accuracy
    texts = {"questions": [r["question"] for r in content], "rationales": [r["generated_answer"] for r in content]}
    train_ranker(ranker, truth(content), **texts, settings=QUICK)
    after = pair_accuracy(ranker.score(*test), truth(held)).accuracy
    assert after > 0.85 and after > before + 0.1, (before, after)


def test_trained_backbone_learns_and_its_weights_move():
    content, held, tok = rows(60), rows(40, seed=1), tokenizer("bert")
    ranker = Ranker.from_backbone(backbone("bert", len(tok)), tok, max_length=48, hidden=32, train_backbone=True)
    start = {name: p.clone() for name, p in ranker.backbone.named_parameters()}
    settings = replace(QUICK, epochs=10, backbone_learning_rate=1e-3)
    train_ranker(
        ranker, truth(content), questions=[r["question"] for r in content],
        rationales=[r["generated_answer"] for r in content], settings=settings,
    )  # fmt: skip
    moved = [name for name, p in ranker.backbone.named_parameters() if not torch.equal(p, start[name])]
    assert len(moved) > 20 and not ranker.training
    scores = ranker.score([r["question"] for r in held], [r["generated_answer"] for r in held])
    assert pair_accuracy(scores, truth(held)).accuracy > 0.85


def feature_task(count: int = 40, seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """One of 24 independent features tells right from wrong."""
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randn(2 + i % 5, 24, generator=generator) for i in range(count)]
    return features, [x[:, 0] > 0 for x in features]


@pytest.mark.parametrize("loss", LOSSES)
def test_ready_features_are_learned_and_shuffled_labels_are_not(loss):
    (features, labels), (new, truth_of_new) = feature_task(200), feature_task(100, seed=1)

    def accuracy(of: list[torch.Tensor], seed: int) -> float:
        ranker = Ranker.for_features(24, hidden=16, seed=seed)
        losses = train_ranker(ranker, of, features=features, settings=replace(FAST, loss=loss, seed=seed))
        assert len(losses) == FAST.epochs and losses[-1] < losses[0]
        return pair_accuracy(ranker.score_features(new), truth_of_new).accuracy

    assert accuracy(labels, 0) > 0.85
    # the control: shuffled labels teach nothing about new questions
    control = sum(accuracy(shuffled(labels), seed) for seed in range(3)) / 3
    assert abs(control - 0.5) < 0.15


def test_scale_and_offset_of_features_do_not_matter():
    features, labels = feature_task()

    def scores(inputs: list[torch.Tensor]) -> torch.Tensor:
        ranker = Ranker.for_features(24, hidden=8)
        train_ranker(ranker, labels, features=inputs, settings=replace(QUICK, epochs=3))
        return torch.cat(ranker.score_features(inputs))

    shifted = [1000 * x + torch.arange(24.0) for x in features]
    torch.testing.assert_close(scores(shifted), scores(features), rtol=1e-3, atol=1e-4)


def weights(ranker: Ranker) -> list[torch.Tensor]:
    return [t.clone() for t in ranker.state_dict().values()]


def test_a_seed_decides_every_weight_and_the_global_generator_stays():
    features, labels = feature_task()

    def run(seed: int) -> list[torch.Tensor]:
        ranker = Ranker.for_features(24, hidden=8, seed=seed)
        train_ranker(ranker, labels, features=features, settings=replace(QUICK, epochs=3, seed=seed))
        return weights(ranker)

    torch.manual_seed(5)
    first = run(1)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert all(torch.equal(a, b) for a, b in zip(first, run(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, run(2), strict=True))


class Stopped(Exception):
    pass


@pytest.mark.parametrize("trained", [False, True])
def test_resumed_training_ends_at_equal_weights(trained, tmp_path, monkeypatch):
    content, tok = rows(20), tokenizer("bert")
    data = {"questions": [r["question"] for r in content], "rationales": [r["generated_answer"] for r in content]}
    settings = replace(QUICK, epochs=4, questions_per_step=4)

    def fresh() -> Ranker:
        return Ranker.from_backbone(backbone("bert", len(tok)), tok, max_length=48, hidden=8, train_backbone=trained)

    unbroken = fresh()
    losses = train_ranker(unbroken, truth(content), **data, settings=settings)

    steps, clip = itertools.count(), torch.nn.utils.clip_grad_norm_

    def stopping(*args, **kwargs):
        if next(steps) == 10:
            raise Stopped
        return clip(*args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", stopping)
    with pytest.raises(Stopped):
        train_ranker(fresh(), truth(content), **data, settings=settings, checkpoint=tmp_path / "c.pt")
    resumed = fresh()
    again = train_ranker(resumed, truth(content), **data, settings=settings, checkpoint=tmp_path / "c.pt")
    assert next(steps) == 10 + 1 + (20 - 9)  # the steps 0-8 of the checkpoint were not repeated
    assert again == losses
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(unbroken), strict=True))
    with pytest.raises(ValueError, match="other settings or labels"):
        train_ranker(
            fresh(), truth(content), **data, settings=replace(settings, seed=1), checkpoint=tmp_path / "c.pt"
        )  # fmt: skip


def test_bad_training_input_is_named():
    features, labels = feature_task()
    ranker = Ranker.for_features(24)
    for kwargs, message in (
        ({"features": features[:-1]}, "train_ranker: `features` must be for the 40 questions of `labels`, got 39"),
        (
            {"features": [features[0][:-1], *features[1:]]},
            r"`labels\[0\]` must be one label for each of 1",
        ),
        ({"features": [torch.zeros(2, 5), *features[1:]]}, r"`features\[0\]` must be a tensor \(K, 24\)"),
        ({}, "`questions` and `rationales` must be given, or `features`"),
    ):
        with pytest.raises(ValueError, match=message):
            train_ranker(ranker, labels, **kwargs)
    with pytest.raises(ValueError, match="nothing to rank"):
        train_ranker(ranker, [torch.ones(3, dtype=torch.bool)], features=[torch.zeros(3, 24)])
    tok = tokenizer("bert")
    own = Ranker.from_backbone(backbone("bert", len(tok)), tok, max_length=48, train_backbone=True)
    with pytest.raises(ValueError, match="`features` must be None for a ranker that trains its backbone"):
        train_ranker(own, labels, features=features)
    for name, value in (("loss", "x"), ("epochs", 0), ("margin", 0.0)):
        with pytest.raises(ValueError, match=f"RankerSettings: `{name}` must be .*, got"):
            RankerSettings(**{name: value})


def test_a_checkpoint_appears_whole_or_not_at_all_and_a_damaged_one_is_named(tmp_path, monkeypatch):
    features, labels = feature_task()
    settings, file = replace(QUICK, epochs=4, save_every=2), tmp_path / "checkpoint.pt"

    def run() -> list[torch.Tensor]:
        ranker = Ranker.for_features(24, hidden=8)
        train_ranker(ranker, labels, features=features, settings=settings, checkpoint=file)
        return weights(ranker)

    save, written = torch.save, []

    def full(content, target, *args, **kwargs):
        written.append(target)
        if len(written) == 2:
            target.write_bytes(b"PK")
            raise OSError(28, "No space left on device")
        save(content, target, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        run()
    monkeypatch.undo()
    assert [f.name for f in tmp_path.iterdir()] == [file.name]
    resumed = run()
    content = file.read_bytes()
    again = run()  # a finished run trains no further
    file.unlink()
    for one, two, three in zip(run(), resumed, again, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    for damaged in (content[: len(content) // 2], b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"train_ranker: `checkpoint` must be .*checkpoint.pt, which cannot be"):
            run()
