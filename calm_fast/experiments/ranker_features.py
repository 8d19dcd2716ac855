"""Do more features and another loss let a ranker gain more? The experiment that docs/ranker_experiment.md registers.

Candidates (features, loss, weight of the scores) are compared by cross-validation on the training questions. The best
one is then trained on all of them and votes once on the held-out questions, beside the former design and a control.

    python -m calm_fast.experiments.ranker_features --data ../shared/data --work DIR

DIR keeps verdicts on answers and the encoder's features; `ranked_voting` writes and reads the same ones.
"""

from __future__ import annotations

import argparse
import math
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from calm_fast._version import versions
from calm_fast.consistency import Groups, Ranker, train_ranker
from calm_fast.consistency.answers.equality import rational
from calm_fast.consistency.answers.extraction import Found, find_answer
from calm_fast.consistency.ranking.training import features_loss, fit, questions_to_rank
from calm_fast.core.progress import progress_bar
from calm_fast.experiments import ranked_voting
from calm_fast.experiments.ranked_voting import Recipe, Split, credits, evaluate, interval

FEATURES = ("text", "text and ranker")
LOSSES = ("power", "listwise")
LAMBDAS = (1.0, 4.0)
TEXT_FEATURES = 16
_ROUNDED = re.compile(r"≈|\\approx|\bapprox|\bround(?:ed|ing|s)?\b|\bnearest\b|\broughly\b", re.IGNORECASE)
_FRACTION = re.compile(r"/|\\[dt]?frac")
_COMMAND = re.compile(r"\\[A-Za-z]+")


@dataclass(frozen=True)
class Design:
    """Every number of the experiment. former: the design that it is compared with."""

    former: Recipe = Recipe()
    hidden: int = 32
    dropout: float = 0.2
    choice_seeds: tuple[int, ...] = (0, 1)


@dataclass(frozen=True)
class Candidate:
    """A way to score rationales: features, the loss of the head, and lam of the adaptive weights 1 + lam s."""

    features: str
    loss: str
    lam: float

    @property
    def name(self) -> str:
        return f"{self.features}; {self.loss}; lam {self.lam:g}"


CANDIDATES = tuple(Candidate(*parts) for parts in product(FEATURES, LOSSES, LAMBDAS))


@dataclass(frozen=True)
class Questions:
    """A split whose features are the encoder's, and the text features (K_q, 16) of its rationales."""

    split: Split
    text: list[torch.Tensor]

    def some(self, chosen: Sequence[int]) -> Questions:
        """Return the questions of these numbers."""
        split, rows = self.split, list(chosen)
        groups = Groups(
            split.groups.answers[rows], split.groups.valid[rows], split.groups.correct[rows],
            [split.groups.texts[i] for i in rows],
        )  # fmt: skip
        part = Split([split.features[i] for i in rows], [split.labels[i] for i in rows], groups)
        return Questions(part, [self.text[i] for i in rows])

    def relabelled(self, labels: list[torch.Tensor]) -> Questions:
        """Return the same questions with other labels."""
        return replace(self, split=replace(self.split, labels=labels))


# ---- features -------------------------------------------------------------------------------------------------------


def text_features(rows: Sequence[dict[str, Any]], groups: Groups) -> list[torch.Tensor]:
    """Return for each row (K, 16) float32, in the order of docs/ranker_experiment.md; no gold answer is read.

    Args:
        rows: question and generated_answer. groups: of the answers of all rationales; only `answers` and `valid` count.
    """
    features = []
    for number, row in enumerate(rows):
        rationales = row["generated_answer"]
        valid = groups.valid[number, : len(rationales)].tolist()
        classes = groups.answers[number, : len(rationales)].tolist()
        lengths = [math.log1p(len(text)) for text in rationales]
        mean = sum(lengths) / max(1, len(lengths))
        table = [
            [*_votes(k, classes, valid), lengths[k], lengths[k] - mean, *_of_text(text, row["question"])]
            for k, text in enumerate(rationales)
        ]
        features.append(torch.tensor(table, dtype=torch.float32).reshape(len(rationales), TEXT_FEATURES))
    return features


def _votes(k: int, classes: Sequence[int], valid: Sequence[bool]) -> list[float]:
    """Return for sample k: an answer is there, agreement, lead."""
    if not valid[k]:
        return [0.0, 0.0, 0.0]
    votes: dict[int, int] = {}
    for number, voter in zip(classes, valid, strict=True):
        votes[number] = votes.get(number, 0) + voter
    own, others = votes[classes[k]], sum(votes.values()) - 1
    rival = max((count for number, count in votes.items() if number != classes[k]), default=0)
    return [1.0, (own - 1) / others if others else 0.0, (own - rival) / 8]


def _of_text(text: str, question: str) -> list[float]:
    """Return the features of one rationale that need no other one, without its length."""
    found: Found | None = find_answer(text)
    answer = "" if found is None else found.answer
    value = rational(answer)
    return [
        math.log1p(text.count("\n") + 1),
        math.log1p(text.count("=")),
        sum(character.isdigit() for character in text) / max(1, len(text)),
        float(_ROUNDED.search(text) is not None),
        float(found is not None and found.kind == "box"),
        math.log1p(len(answer)),
        float(value is not None and value.denominator == 1),
        float(re.search(r"\.\d", answer) is not None),
        float(_FRACTION.search(answer) is not None),
        float(any(character.isalpha() for character in _COMMAND.sub("", answer))),
        float(bool(answer) and answer in question),
    ]


def ranker_features(logits: Sequence[torch.Tensor], groups: Groups) -> list[torch.Tensor]:
    """Return for each question (K_q, 4) float32 of the former ranker's logits (K_q,).

    The logit; that minus its question's mean; the logit minus the highest among samples with another answer; the mean
    logit of its answer minus the highest mean of another one. The last two are 0 for a sample without an answer and
    where there is no other answer.
    """
    features = []
    for number, row in enumerate(logits):
        classes, valid = groups.answers[number, : len(row)], groups.valid[number, : len(row)]
        same = (classes[:, None] == classes[None, :]) & valid[None, :]
        other = (classes[:, None] != classes[None, :]) & valid[None, :]
        means = (same * row).sum(1) / same.sum(1).clamp(min=1)
        rival, mean_rival = (torch.where(other, values[None, :], -torch.inf).amax(1) for values in (row, means))
        compared = valid & other.any(1)
        margins = [torch.where(compared, own - best, 0.0) for own, best in ((row, rival), (means, mean_rival))]
        features.append(torch.stack([row, row - row.mean(), *margins], 1).float())
    return features


def _logits(scores: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.logit(row.double()) for row in scores]


def head_inputs(train: Questions, new: Questions, design: Design, seed: int) -> dict[str, tuple[Any, Any]]:
    """Return features of `train` and of `new` by their name in FEATURES.

    The former ranker's logits of training questions are out of fold. Those of new questions come from one head that is
    trained on all training questions.
    """
    recipe, data = design.former, (train.split.features, train.split.labels)
    loss = recipe.settings.loss
    inside = _logits(ranked_voting.cross_scores(data, recipe, loss, seed))
    outside = _logits(ranked_voting.head_scores(data, new.split.features, recipe, loss, seed))
    both = []
    for part, logits in ((train, inside), (new, outside)):
        ranked = ranker_features(logits, part.split.groups)
        both.append([torch.cat(pair, 1) for pair in zip(part.text, ranked, strict=True)])
    return {"text": (train.text, new.text), "text and ranker": (both[0], both[1])}


# ---- training -------------------------------------------------------------------------------------------------------


def listwise_loss(logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return the mean over questions of -log(sum over right samples of exp(l) / sum over all samples of exp(l)).

    Args:
        logits: (Q, K) float. labels: (Q, K) bool, True = right. valid: (Q, K) bool. Every question has a right sample.
    """
    right, every = (torch.where(mask, logits, -torch.inf).logsumexp(1) for mask in (labels & valid, valid))
    return (every - right).mean()


def head_scores(
    inputs: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]],
    labels: Sequence[torch.Tensor],
    loss: str,
    design: Design,
    seed: int,
) -> list[torch.Tensor]:
    """Return scores (K_q,) of new questions by a head trained on `inputs[0]` and `labels`; inputs[1] is theirs."""
    train, new = inputs
    ranker = Ranker.for_features(train[0].shape[1], hidden=design.hidden, dropout=design.dropout, seed=seed)
    settings = replace(design.former.settings, seed=seed)
    if loss == "listwise":
        mixed = [i for i, usable in enumerate(questions_to_rank(labels)) if usable]
        fit(ranker, mixed, features_loss(ranker, train, labels, listwise_loss), settings)
    else:
        train_ranker(ranker, labels, features=train, settings=replace(settings, loss=loss))
    return ranker.score_features(new)


Kind = tuple[str, str]  # features and loss of a candidate, which lam does not change


def scores_of(
    kinds: Sequence[Kind], train: Questions, new: Questions, design: Design, seed: int
) -> dict[Kind, list[torch.Tensor]]:
    """Return scores of the new questions by each kind of candidate."""
    inputs = head_inputs(train, new, design, seed)
    return {
        (features, loss): head_scores(inputs[features], train.split.labels, loss, design, seed)
        for features, loss in kinds
    }


def cross_scores_of(
    kinds: Sequence[Kind], data: Questions, design: Design, seed: int, bar: Any
) -> dict[Kind, list[torch.Tensor]]:
    """Return scores of every question by heads, and former heads, that did not see its fold."""
    order = torch.randperm(len(data.text), generator=torch.Generator().manual_seed(seed)).tolist()
    scores: dict[Kind, list[torch.Tensor]] = {kind: [torch.empty(0)] * len(order) for kind in kinds}
    for fold in range(design.former.folds):
        held_out = order[fold :: design.former.folds]
        seen = [i for i in order if i not in set(held_out)]
        found = scores_of(kinds, data.some(seen), data.some(held_out), design, seed)
        for kind in kinds:
            for i, row in zip(held_out, found[kind], strict=True):
                scores[kind][i] = row
        bar.update()
    return scores


# ---- choice and test ------------------------------------------------------------------------------------------------


def choose(train: Questions, design: Design) -> tuple[Candidate, list[dict[str, Any]]]:
    """Return the candidate with the highest mean gain in cross-validation, and the gains of all."""
    kinds = list(product(FEATURES, LOSSES))
    groups, folds = train.split.groups, design.former.folds
    count = credits(groups, None, "count")
    gains: dict[Candidate, list[torch.Tensor]] = {candidate: [] for candidate in CANDIDATES}
    with progress_bar(total=len(design.choice_seeds) * folds, desc="choosing a candidate", unit="fold") as bar:
        for seed in design.choice_seeds:
            scores = cross_scores_of(kinds, train, design, seed, bar)
            for one in CANDIDATES:
                found = credits(groups, scores[one.features, one.loss], "adaptive", one.lam)
                gains[one].append(found - count)
    rows = [
        asdict(one)
        | {"name": one.name, "gain": interval(torch.stack(gains[one]), design.former.resamples)}
        | {"seeds": [100 * float(g.mean()) for g in gains[one]]}
        for one in CANDIDATES
    ]
    best = max(range(len(rows)), key=lambda i: rows[i]["gain"]["mean"])  # the first of equal ones
    return CANDIDATES[best], rows


def _difference(
    ours: Sequence[Any], former: Sequence[Any], split: Split, chosen: Candidate, resamples: int
) -> dict[str, float]:
    """Return the adaptive vote of the candidate minus that of the former design, paired by seed and question."""
    pairs = [
        credits(split.groups, a, "adaptive", chosen.lam) - credits(split.groups, b, "adaptive")
        for a, b in zip(ours, former, strict=True)
    ]
    return interval(torch.stack(pairs), resamples)


def evaluate_once(
    chosen: Candidate, train: Questions, dev: Questions, design: Design, seeds: Sequence[int]
) -> dict[str, Any]:
    """Return the votes on held-out questions of the chosen candidate, the former design and the control."""
    kind, recipe = (chosen.features, chosen.loss), design.former
    loss = recipe.settings.loss
    scores: dict[str, list[list[torch.Tensor]]] = {"chosen": [], "former": [], "control": []}
    data = (train.split.features, train.split.labels)
    for seed in progress_bar(seeds, desc="held-out questions", unit="seed"):
        scores["chosen"].append(scores_of([kind], train, dev, design, seed)[kind])
        scores["former"].append(ranked_voting.head_scores(data, dev.split.features, recipe, loss, seed))
        shuffled = train.relabelled(ranked_voting.shuffled_labels(train.split.labels, seed))
        scores["control"].append(scores_of([kind], shuffled, dev, design, seed)[kind])
    lams = {"chosen": chosen.lam, "former": 1.0, "control": chosen.lam}
    results: dict[str, Any] = {
        name: evaluate(rows, dev.split, recipe.resamples, lams[name]) for name, rows in scores.items()
    }
    primary, former = results["chosen"]["adaptive"]["gain"], results["former"]["adaptive"]["gain"]
    return ranked_voting.plain(dev.split, recipe.resamples) | {
        "rankers": results,
        "chosen - former": _difference(scores["chosen"], scores["former"], dev.split, chosen, recipe.resamples),
        "success": bool(primary["low"] > 0 and primary["mean"] > former["mean"]),
    }


def cross_validate(chosen: Candidate, both: Questions, design: Design, seeds: Sequence[int]) -> dict[str, Any]:
    """Return the votes on all questions, each scored by heads that did not see its fold."""
    kind, recipe = (chosen.features, chosen.loss), design.former
    data = (both.split.features, both.split.labels)
    ours, former = [], []
    with progress_bar(total=len(seeds) * recipe.folds, desc="cross-validation", unit="fold") as bar:
        for seed in seeds:
            ours.append(cross_scores_of([kind], both, design, seed, bar)[kind])
            former.append(ranked_voting.cross_scores(data, recipe, recipe.settings.loss, seed))
    return ranked_voting.plain(both.split, recipe.resamples) | {
        "rankers": {
            "chosen": evaluate(ours, both.split, recipe.resamples, chosen.lam),
            "former": evaluate(former, both.split, recipe.resamples),
        },
        "chosen - former": _difference(ours, former, both.split, chosen, recipe.resamples),
    }


def run(train: Questions, dev: Questions, seeds: Sequence[int], design: Design | None = None) -> dict[str, Any]:
    """Choose on `train`, test once on `dev`, cross-validate on both, and return the content of the results file.

    Raises:
        ValueError: there is no seed, or one occurs twice.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"ranker_features: `seeds` must be different integers, at least one, got {list(seeds)}")
    design, start, threads = design or Design(), time.process_time(), torch.get_num_threads()
    torch.set_num_threads(1)  # the same numbers for any number of cores
    try:
        chosen, candidates = choose(train, design)
        both = Questions(ranked_voting.join_splits(train.split, dev.split), train.text + dev.text)
        results = {
            "candidates": candidates,
            "chosen": asdict(chosen) | {"name": chosen.name},
            "held_out": evaluate_once(chosen, train, dev, design, seeds),
            "cross_validated": cross_validate(chosen, both, design, seeds),
        }
    finally:
        torch.set_num_threads(threads)
    return results | {
        "training_questions": len(train.text),
        "seeds": list(seeds),
        "design": asdict(design),
        "cpu_seconds": round(time.process_time() - start, 1),
        "machine": f"{platform.machine()}, {platform.system()}, 1 thread",
        "versions": versions(),
    }


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""

    def cell(x: dict[str, float], sign: str = "+") -> str:
        return f"{x['mean']:{sign}.2f} [{x['low']:{sign}.2f}, {x['high']:{sign}.2f}]"

    lines = ["| candidate | adaptive - count, 2,000 questions |", "|---|---|"]
    lines += [f"| {row['name']} | {cell(row['gain'])} |" for row in results["candidates"]]
    lines += ["", f"chosen: {results['chosen']['name']}"]
    for part in ("held_out", "cross_validated"):
        found = results[part]
        lines += [
            "",
            f"{part.replace('_', ' ')}: {found['questions']} questions, {found['tied_questions']} of them tied; ",
        ]
        lines[-1] += ", ".join(f"{name} {cell(found[name], '')}" for name in ("single", "count", "any"))
        lines += ["", "| ranker | pair accuracy | adaptive - count | of it from ties |", "|---" * 4 + "|"]
        for name, row in found["rankers"].items():
            gain = row["adaptive"]
            ties = f"{gain['gain_from_tied_questions']:+.2f}"
            lines.append(f"| {name} | {cell(row['pair_accuracy'], '')} | {cell(gain['gain'])} | {ties} |")
        lines += ["", f"chosen - former: {cell(found['chosen - former'])}"]
    lines += ["", f"success: {results['held_out']['success']}"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m calm_fast.experiments.ranker_features", description=__doc__)
    ranked_voting.add_inputs(parser, Path("ranker_features_out"))
    options = parser.parse_args(arguments)
    rows, splits = ranked_voting.load_inputs(parser, options, Design().former)
    train, dev = (Questions(splits[n], text_features(rows[n], splits[n].groups)) for n in ("train", "dev"))
    results = run(train, dev, options.seeds) | {"encoder": ranked_voting.encoder_name(options)}
    ranked_voting.write_results(options, results, table(results))


if __name__ == "__main__":
    main()
