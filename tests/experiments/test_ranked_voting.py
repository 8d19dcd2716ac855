"""The ranked-voting experiment: its statistics against plain ones, and the whole of it in reduced form."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from calm_fast.consistency import Groups, Ranker, RankerSettings
from calm_fast.experiments import ranked_voting as experiment

SMALL = experiment.Recipe(
    settings=RankerSettings(epochs=8, questions_per_step=16, learning_rate=1e-2, progress=False, save_every=0),
    hidden=8, dropout=0.0, resamples=200, sizes=(20,),
)  # fmt: skip


def synthetic(count: int, seed: int, signal: float = 3.0) -> experiment.Split:
    """Questions with ragged samples of three answers; one feature tells the right ones apart where signal is large."""
    generator = torch.Generator().manual_seed(seed)
    features, answers = [], torch.zeros(count, 7, dtype=torch.int64)
    valid = torch.zeros(count, 7, dtype=torch.bool)
    labels = []
    for i in range(count):
        k = 4 + i % 4
        answers[i, :k] = torch.randint(3, (k,), generator=generator)
        valid[i, :k] = torch.rand(k, generator=generator) < 0.9
        right = valid[i, :k] & (answers[i, :k] == 0)
        x = torch.randn(k, 12, generator=generator)
        x[:, 0] += signal * right
        features.append(x)
        labels.append(right)
    groups = Groups(answers, valid, torch.zeros(count, dtype=torch.int64), [["0", "1", "2"]] * count)
    return experiment.Split(features, labels, groups)


def plain_credit(answers: list[int], weights: list[float]) -> Fraction:
    """Credit of one question, by hand: 1 / ties if the right answer, 0, is on top."""
    totals: dict[int, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        totals[answer] = totals.get(answer, 0.0) + weight
    top = [a for a, w in totals.items() if totals and w >= max(totals.values()) - 1e-9]
    return Fraction(1, len(top)) if 0 in top else Fraction(0)


@pytest.mark.parametrize("rule", ["count", "weighted", "adaptive"])
def test_credit_is_shared_among_tied_answers(rule):
    split = synthetic(60, 0)
    # halves and quarters: ties happen under every rule, and sums are exact
    scores = [torch.randint(1, 4, (len(x),)) / 4 for x in split.features]
    got = experiment.credits(split.groups, scores, rule)
    seen = set()
    for i, s in enumerate(scores):
        voters = [k for k in range(len(s)) if split.groups.valid[i, k]]
        weights = {"count": [1.0] * len(s), "weighted": s.tolist(), "adaptive": (1 + s).tolist()}[rule]
        expected = plain_credit([int(split.groups.answers[i, k]) for k in voters], [weights[k] for k in voters])
        assert got[i].item() == pytest.approx(float(expected), abs=1e-12)
        seen.add(expected)
    assert {Fraction(0), Fraction(1), Fraction(1, 2)} <= seen


def test_question_without_a_right_or_without_any_answer_gets_nothing():
    answers = torch.tensor([[1, 1, 2], [0, 0, 0]])
    valid = torch.tensor([[True] * 3, [False] * 3])
    groups = Groups(answers, valid, torch.zeros(2, dtype=torch.int64), [["a", "b", "c"], ["a"]])
    assert experiment.credits(groups, None, "count").tolist() == [0.0, 0.0]


def test_interval_covers_the_mean_and_agrees_with_the_normal_one():
    x = torch.randn(400, dtype=torch.float64) * 0.3 + 0.1
    found = experiment.interval(x[None], 4000)
    assert found["mean"] == pytest.approx(100 * x.mean().item())
    half = 196 * x.std().item() / 20
    assert found["low"] == pytest.approx(found["mean"] - half, abs=0.3)
    assert found["high"] == pytest.approx(found["mean"] + half, abs=0.3)
    weights = torch.randint(1, 9, (400,)).double()
    ratio = experiment.interval(0.25 * weights[None], 100, weights)
    assert ratio["mean"] == ratio["low"] == ratio["high"] == pytest.approx(25)


def test_interval_holds_the_spread_of_the_seeds():
    seeds = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    found = experiment.interval(seeds[:, None].expand(4, 50), 4000)  # no spread over questions at all
    assert found["mean"] == pytest.approx(150)
    half = 196 * seeds.std(correction=0).item() / 2
    assert found["low"] == pytest.approx(150 - half, abs=15) and found["high"] == pytest.approx(150 + half, abs=15)


def test_shuffled_labels_keep_every_question_as_right_as_it_was():
    labels = synthetic(50, 0).labels
    shuffled = experiment.shuffled_labels(labels, 3)
    assert [int(a.sum()) for a in shuffled] == [int(b.sum()) for b in labels]
    assert not all(torch.equal(a, b) for a, b in zip(shuffled, labels, strict=True))


def test_reduced_experiment_finds_a_signal_that_is_there_and_repeats_itself():
    train, dev = synthetic(80, 1), synthetic(80, 2)
    results = experiment.run(train, dev, (0, 1), SMALL, encoder="synthetic")
    losses = list(experiment.LOSSES)
    assert list(results["held_out"]["rankers"]) == [*losses, "control: shuffled labels", "power, 20 questions"]
    for loss in losses:
        row = results["held_out"]["rankers"][loss]
        assert row["pair_accuracy"]["mean"] > 80 and len(row["pair_accuracy"]["seeds"]) == 2
        gain = row["adaptive"]["gain"]
        assert gain["low"] <= gain["mean"] <= gain["high"] and gain["mean"] > 5
        parts = row["adaptive"]["gain_from_tied_questions"] + row["adaptive"]["gain_from_untied_questions"]
        assert parts == pytest.approx(gain["mean"])
        assert row["adaptive"]["accuracy"]["mean"] == pytest.approx(results["held_out"]["count"]["mean"] + gain["mean"])
    crossed = results["cross_validated"]
    assert crossed["questions"] == 160 and crossed["rankers"]["power"]["adaptive"]["gain"]["mean"] > 5
    control = results["held_out"]["rankers"]["control: shuffled labels"]
    assert control["pair_accuracy"]["mean"] < 75
    again = experiment.run(train, dev, (0, 1), SMALL, encoder="synthetic")
    assert (
        again["held_out"]["rankers"] == results["held_out"]["rankers"] and json.loads(json.dumps(results)) is not None
    )
    text = experiment.table(results)
    assert "adaptive - count" in text and text.count("\n| ") == 6 + 5
    with pytest.raises(ValueError, match="different integers"):
        experiment.run(train, dev, (1, 1), SMALL)


def test_cross_validation_never_scores_what_the_head_was_trained_on(monkeypatch):
    split, seen = synthetic(23, 4), []

    def head_scores(train, new, recipe, loss, seed):
        seen.append(len(new))
        trained = {id(x) for x in train[0]}
        assert len(train[0]) + len(new) == 23 and not trained & {id(x) for x in new}
        return [x[:, 0] for x in new]

    monkeypatch.setattr(experiment, "head_scores", head_scores)
    scores = experiment.cross_scores((split.features, split.labels), SMALL, "power", 0)
    assert sorted(seen) == [4, 4, 5, 5, 5]
    assert all(torch.equal(s, x[:, 0]) for s, x in zip(scores, split.features, strict=True))


def test_joined_splits_vote_as_they_do_apart():
    a, b = synthetic(20, 5), synthetic(30, 6)
    narrow = Groups(b.groups.answers[:, :4], b.groups.valid[:, :4], b.groups.correct, b.groups.texts)
    b = experiment.Split([x[:4] for x in b.features], [x[:4] for x in b.labels], narrow)
    both = experiment.join_splits(a, b)
    apart = torch.cat([experiment.credits(split.groups, None, "count") for split in (a, b)])
    assert torch.equal(experiment.credits(both.groups, None, "count"), apart)
    assert len(both.labels) == len(both.features) == len(both.groups.texts) == 50


def test_splits_come_from_rows_an_encoder_and_kept_features(tmp_path, monkeypatch):
    from calm_fast.consistency.ranking import pipeline as ranker_pipeline

    rows = [
        {"question": "2 + 2", "answer": "\\boxed{4}", "generated_answer": ["\\boxed{4}", "\\boxed{5}", "none"]},
        {"question": "1 / 2", "answer": "\\boxed{\\frac{1}{2}}", "generated_answer": ["\\boxed{0.5}", "\\boxed{2}"]},
    ]

    class Encoder:
        backbone, max_length = torch.nn.Linear(2, 2), 32

        def required_backbone(self):
            return self.backbone

        def features(self, questions, rationales, **_):
            return [torch.full((len(r), 3), float(len(q))) for q, r in zip(questions, rationales, strict=True)]

    split = experiment.load_split(rows, Encoder(), tmp_path, "train", workers=1)
    assert [row.tolist() for row in split.labels] == [[True, False, False], [True, False]]
    assert [tuple(x.shape) for x in split.features] == [(3, 3), (2, 3)]
    monkeypatch.setattr(Encoder, "features", None)  # kept on disk by now
    monkeypatch.setattr(ranker_pipeline, "model_fingerprint", lambda backbone: "another")
    with pytest.raises(ValueError, match="other backbone"):
        experiment.load_split(rows, Encoder(), tmp_path, "train", workers=1)


def test_real_rationales_vote_as_the_data_says(shared_data, tmp_path):
    """Single sample and plain count on the first held-out questions; whether a ranker helps is reported, not tested."""
    rows = experiment.read_rows(shared_data / "math_gpt35_dev.jsonl.gz", 60)

    class Encoder:
        backbone, max_length = torch.nn.Linear(2, 2), 32

        def required_backbone(self):
            return self.backbone

        def features(self, questions, rationales, **_):
            return [torch.randn(len(r), 4) for r in rationales]

    dev = experiment.load_split(rows, Encoder(), tmp_path, "dev", workers=1)
    found = experiment.plain(dev, 100)
    assert 20 < found["single"]["mean"] < found["count"]["mean"] < found["any"]["mean"] < 100
    recipe = replace(SMALL, sizes=())
    head = experiment.head_scores((dev.features, dev.labels), dev.features, recipe, "power", 0)
    assert isinstance(head[0], torch.Tensor) and [len(s) for s in head] == [8] * 60
    assert Ranker.for_features(4).score_features(dev.features)[0].shape == (8,)
