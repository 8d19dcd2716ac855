"""The experiment on more features and another loss: each feature by hand, and the whole of it in reduced form."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from calm_fast.consistency import Groups, RankerSettings
from calm_fast.experiments import ranked_voting
from calm_fast.experiments import ranker_features as experiment

SMALL = experiment.Design(
    former=ranked_voting.Recipe(
        settings=RankerSettings(epochs=6, questions_per_step=16, learning_rate=1e-2, progress=False, save_every=0),
        hidden=8, dropout=0.0, folds=2, resamples=100,
    ),
    hidden=8, dropout=0.0, choice_seeds=(0,),
)  # fmt: skip


def grouped(answers: list[list[int | None]]) -> Groups:
    ids = torch.tensor([[0 if a is None else a for a in row] for row in answers])
    valid = torch.tensor([[a is not None for a in row] for row in answers])
    return Groups(ids, valid, torch.zeros(len(answers), dtype=torch.int64), [["0", "1", "2"]] * len(answers))


def test_text_features_by_hand() -> None:
    rationales = ["x = 2\n2 = 2\nThe answer is 5.", "\\boxed{\\frac{1}{2}} approx", "\\boxed{5}", "", "\\boxed{0.5x}"]
    rows = [{"question": "Is it 5?", "answer": "unread", "generated_answer": rationales}]
    (found,) = experiment.text_features(rows, grouped([[0, 1, 0, None, 2]]))
    assert found.shape == (5, experiment.TEXT_FEATURES)
    assert found[:, 0].tolist() == [1, 1, 1, 0, 1]  # an answer is there
    assert found[:, 1].tolist() == pytest.approx([1 / 3, 0, 1 / 3, 0, 0])  # agreement of the others
    assert found[:, 2].tolist() == [1 / 8, -1 / 8, 1 / 8, 0, -1 / 8]  # lead
    lengths = [math.log1p(len(text)) for text in rationales]
    assert found[:, 3].tolist() == pytest.approx(lengths)
    assert found[:, 4].tolist() == pytest.approx([n - sum(lengths) / 5 for n in lengths], abs=1e-6)
    assert found[0, 5:8].tolist() == pytest.approx([math.log(4), math.log(3), 4 / len(rationales[0])])
    assert found[:, 8].tolist() == [0, 1, 0, 0, 0]  # rounding
    assert found[:, 9].tolist() == [0, 1, 1, 0, 1]  # in a box
    assert found[:, 10].tolist() == pytest.approx([math.log1p(n) for n in (1, 11, 1, 0, 4)])
    assert found[:, 11:].tolist() == [
        [1, 0, 0, 0, 1], [0, 0, 1, 0, 0], [1, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 1, 0, 1, 0],
    ]  # fmt: skip


def test_ranker_features_by_hand() -> None:
    logits = torch.tensor([1.0, -2.0, 3.0, 9.0])
    (found,) = experiment.ranker_features([logits], grouped([[0, 0, 1, None]]))
    assert found[:, 0].tolist() == logits.tolist()
    assert found[:, 1].tolist() == (logits - 2.75).tolist()
    assert found[:, 2].tolist() == [-2, -5, 2, 0]
    assert found[:, 3].tolist() == [-3.5, -3.5, 3.5, 0]
    (alone,) = experiment.ranker_features([logits[:2]], grouped([[0, 0]]))
    assert alone[:, 2:].tolist() == [[0, 0], [0, 0]]


def test_listwise_loss_is_the_definition_and_its_gradient() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 0], [1, 0, 0, 0]]).bool()
    valid = torch.ones(5, 4, dtype=torch.bool)
    valid[1, 3] = valid[4, 2] = False
    terms = []
    for row, right, there in zip(logits.tolist(), labels.tolist(), valid.tolist(), strict=True):
        above = sum(math.exp(x) for x, r, t in zip(row, right, there, strict=True) if r and t)
        terms.append(-math.log(above / sum(math.exp(x) for x, t in zip(row, there, strict=True) if t)))
    assert experiment.listwise_loss(logits, labels, valid).item() == pytest.approx(sum(terms) / 5, rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: experiment.listwise_loss(x, labels, valid), logits)


def synthetic(count: int, seed: int) -> experiment.Questions:
    """Questions whose right samples one text feature tells apart; the encoder's features say little."""
    generator = torch.Generator().manual_seed(seed)
    answers = torch.randint(3, (count, 8), generator=generator)
    labels = list(answers == 0)
    groups = Groups(
        answers,
        torch.ones(count, 8, dtype=torch.bool),
        torch.zeros(count, dtype=torch.int64),
        [["0", "1", "2"]] * count,
    )
    text = [torch.randn(8, 16, generator=generator) for _ in range(count)]
    features = [torch.randn(8, 4, generator=generator) for _ in range(count)]
    for x, y, right in zip(text, features, labels, strict=True):
        x[:, 5] += 3.0 * right
        y[:, 0] += 0.5 * right
    return experiment.Questions(ranked_voting.Split(features, labels, groups), text)


def test_reduced_experiment_chooses_tests_and_repeats_itself() -> None:
    train, dev = synthetic(60, 1), synthetic(60, 2)
    results = experiment.run(train, dev, (0, 1), SMALL)
    names = [row["name"] for row in results["candidates"]]
    assert names[0] == "text; power; lam 1" and names[-1] == "text and ranker; listwise; lam 4" and len(names) == 8
    gains = [row["gain"]["mean"] for row in results["candidates"]]
    assert results["chosen"]["name"] == names[gains.index(max(gains))] and max(gains) > 5
    tested = results["held_out"]
    chosen, former, control = (tested["rankers"][name]["adaptive"]["gain"] for name in ("chosen", "former", "control"))
    assert chosen["mean"] > 5 and tested["rankers"]["chosen"]["pair_accuracy"]["mean"] > 80
    assert control["mean"] < chosen["mean"] and tested["rankers"]["control"]["pair_accuracy"]["mean"] < 75
    assert tested["success"] is (chosen["low"] > 0 and chosen["mean"] > former["mean"])
    assert tested["chosen - former"]["mean"] == pytest.approx(chosen["mean"] - former["mean"])
    crossed = results["cross_validated"]
    assert crossed["questions"] == 120 and crossed["rankers"]["chosen"]["adaptive"]["gain"]["mean"] > 5
    assert experiment.choose(train, SMALL)[1] == results["candidates"]
    json.dumps(results)
    text = experiment.table(results)
    assert (
        "chosen - former" in text
        and text.count("\n| ") == 8 + 2 * 1 + 3 + 2
        and f"success: {tested['success']}" in text
    )
    with pytest.raises(ValueError, match="different integers"):
        experiment.run(train, dev, (), SMALL)


def test_no_head_scores_what_it_was_trained_on(monkeypatch) -> None:
    data = synthetic(23, 4)
    number = {x.data_ptr(): i for i, x in enumerate(data.split.features)}
    formers: list[tuple[set[int], set[int]]] = []

    def former(train, new, recipe, loss, seed):
        sets = {number[x.data_ptr()] for x in train[0]}, {number[x.data_ptr()] for x in new}
        assert not sets[0] & sets[1]
        formers.append(sets)
        return [x[:, 0].sigmoid() for x in new]

    def head(inputs, labels, loss, design, seed):
        assert len(inputs[0]) == len(labels) and len(inputs[0]) + len(inputs[1]) == 23
        return [x[:, 5].sigmoid() for x in inputs[1]]

    monkeypatch.setattr(ranked_voting, "head_scores", former)
    monkeypatch.setattr(experiment, "head_scores", head)
    bar = type("Bar", (), {"update": lambda self: None})()
    kind = ("text and ranker", "power")
    scores = experiment.cross_scores_of([kind], data, SMALL, 0, bar)[kind]
    assert all(torch.equal(s, x[:, 5].sigmoid()) for s, x in zip(scores, data.text, strict=True))
    # of each outer fold: two former heads within its training questions, and one for the held-out ones
    for at in range(0, len(formers), 3):
        held_out = formers[at + 2][1]
        assert all(not (seen | new) & held_out for seen, new in formers[at : at + 2])
    assert len(formers) == 6


def test_lam_weighs_scores_against_votes() -> None:
    groups = grouped([[0, 1, 1]])
    scores = [torch.tensor([0.9, 0.1, 0.1])]
    assert ranked_voting.credits(groups, scores, "adaptive", 1.0).item() == 0.0  # 1.9 against 2.2
    assert ranked_voting.credits(groups, scores, "adaptive", 4.0).item() == 1.0  # 4.6 against 2.8


def test_listwise_training_tells_right_from_wrong() -> None:
    data = synthetic(60, 3)
    settings = replace(SMALL, former=replace(SMALL.former, settings=replace(SMALL.former.settings, epochs=8)))
    scores = experiment.head_scores((data.text, data.text), data.split.labels, "listwise", settings, 0)
    won, pairs = ranked_voting.pair_counts(scores, data.split.labels)
    assert won.sum() / pairs.sum() > 0.9
