"""Train a ranker from rows of sampled rationales, and score rows with a ranker; both can be resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from calm_fast._version import versions
from calm_fast.consistency.answers.extraction import extract_answer
from calm_fast.consistency.answers.gold import gold_answer
from calm_fast.consistency.ranking.losses import PairAccuracy, pair_accuracy
from calm_fast.consistency.ranking.ranker import Ranker
from calm_fast.consistency.ranking.training import RankerSettings, questions_to_rank, train_ranker
from calm_fast.consistency.voting.journal import Journal
from calm_fast.consistency.voting.samples import write_rows
from calm_fast.core.checks import errors_of
from calm_fast.core.devices import usable_device
from calm_fast.core.files import atomic_path, claim, write_json
from calm_fast.core.fingerprint import json_checksum, model_fingerprint
from calm_fast.core.progress import progress_bar

Rows = Sequence[dict[str, Any]]
_CHUNK = 250  # questions whose features are computed and saved together
_STEP = 32  # questions scored and written together


def label_rationales(
    rows: Rows,
    *,
    pattern: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> list[torch.Tensor]:
    """Return for each row (K,) bool: True where a rationale's answer equals the gold answer.

    A rationale without an answer is wrong. A row without a gold answer (see `gold_answer`) gets an empty tensor.

    Args:
        rows: question, answer, generated_answer. pattern: last resort of `extract_answer`.
        cache_dir, workers, progress: see `group_answers`.
    """
    from calm_fast.consistency.answers.grouping import group_answers

    gold = [gold_answer(row["answer"], pattern) for row in rows]
    answers = [[extract_answer(r, pattern) for r in row["generated_answer"]] for row in rows]
    groups = group_answers(answers, gold=gold, workers=workers, cache_dir=cache_dir, progress=progress)
    counts = [0 if gold[i] is None else len(row["generated_answer"]) for i, row in enumerate(rows)]
    return [right[:k] for right, k in zip(groups.right, counts, strict=True)]


def cached_features(
    ranker: Ranker, rows: Rows, folder: str | os.PathLike[str], *, progress: bool = False
) -> list[torch.Tensor]:
    """Return `ranker.features` of all rows, saved in `folder` chunk by chunk; a second call resumes the first.

    Raises:
        ValueError: the ranker has no backbone, or `folder` holds features of another backbone, length or rows.
    """
    from safetensors.torch import load_file, save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = [[row["question"], row["generated_answer"]] for row in rows]
    identity = {
        "backbone": model_fingerprint(ranker.required_backbone()),
        "rows": json_checksum(texts),
        "max_length": ranker.max_length,
    }
    claim(folder / "features.json", identity, "features", "cached_features: `folder`")
    features: list[torch.Tensor] = []
    starts = range(0, len(rows), _CHUNK)
    for start in progress_bar(starts, desc="features", unit=f"{_CHUNK} questions", shown=progress):
        file = folder / f"chunk_{start:07d}.safetensors"
        part = rows[start : start + _CHUNK]
        if not file.is_file():
            groups = ranker.features([r["question"] for r in part], [r["generated_answer"] for r in part])
            with atomic_path(file) as partial:
                save_file({"features": torch.cat(groups)}, partial)
        features += load_file(file)["features"].split([len(r["generated_answer"]) for r in part])
    return features


def run_training(
    rows: Rows,
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: RankerSettings | None = None,
    *,
    train_backbone: bool = False,
    max_length: int | None = None,
    dtype: torch.dtype = torch.float32,
    hidden: int = 256,
    holdout: float = 0.1,
    pattern: str | None = None,
    workers: int | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Label rationales, then train, evaluate and save a ranker, as `calm-fast rank train` does.

    A second call resumes the first and ends at the weights of an uninterrupted run.

    Args:
        rows: question, answer, generated_answer. model: folder or name of the backbone.
        out: gets ranker/ (see `Ranker.from_pretrained`), results.json, and the files that resuming needs.
        holdout: share of the questions that are kept out of training to evaluate the ranker.
        pattern: last resort of `extract_answer`.
    Returns:
        the content of results.json.
    Raises:
        ValueError: `out` belongs to another run, or no question has both right and wrong rationales.
    """
    settings = settings or RankerSettings()
    extract_answer("", pattern)  # a bad pattern is an error before any work
    if not 0 <= holdout < 1:
        raise ValueError(f"run_training: `holdout` must be a share of at least 0 and below 1, got {holdout}")
    target = None if device is None else usable_device("run_training", device)
    out = Path(out)
    decisive = {k: v for k, v in asdict(settings).items() if k not in ("progress", "save_every")}
    with errors_of("rank"):
        ranker = Ranker.from_backbone(
            model, train_backbone=train_backbone, max_length=max_length, hidden=hidden, dtype=dtype, seed=settings.seed
        )
    identity = {
        "settings": decisive, "train_backbone": train_backbone, "max_length": ranker.max_length, "hidden": hidden,
        "dtype": str(dtype), "holdout": holdout, "backbone": model_fingerprint(ranker.required_backbone()),
        "rows": json_checksum(rows), "pattern": pattern,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)  # not before the model has been read
    claim(out / "identity.json", identity, "a run", "rank: `out`")
    labels = _saved_labels(out / "labels.json", rows, pattern, out / "answers", workers, settings.progress)
    known = [i for i, row in enumerate(labels) if len(row)]
    held_out = _draw_held_out(known, holdout, settings.seed)
    seen = [i for i in known if i not in held_out]

    def pick(values: Sequence[Any], chosen: Sequence[int]) -> list[Any]:
        return [values[i] for i in chosen]

    try:
        questions_to_rank(pick(labels, seen))  # features may take hours: fail before them
    except ValueError:
        for file in ("identity.json", "labels.json"):  # such a run cannot go on: leave `out` free for other rows
            (out / file).unlink()
        raise
    if target is not None:
        ranker.to(target)
    questions, rationales = [row["question"] for row in rows], [row["generated_answer"] for row in rows]
    features = None if train_backbone else cached_features(ranker, rows, out / "features", progress=settings.progress)
    texts = {"questions": pick(questions, seen), "rationales": pick(rationales, seen)} if features is None else {}
    losses = train_ranker(
        ranker, pick(labels, seen), features=None if features is None else pick(features, seen), settings=settings,
        checkpoint=out / "checkpoint.pt", **texts,
    )  # fmt: skip

    def evaluate(chosen: Sequence[int]) -> PairAccuracy:
        if features is not None:
            return pair_accuracy(ranker.score_features(pick(features, chosen)), pick(labels, chosen))
        return pair_accuracy(ranker.score(pick(questions, chosen), pick(rationales, chosen)), pick(labels, chosen))

    ranker.save_pretrained(out / "ranker")
    right = sum(int(row.sum()) for row in labels)
    results = {
        "identity": identity,
        "questions": {"all": len(rows), "trained_on": len(seen), "held_out": len(held_out)},
        "rationales": {"right": right, "wrong": sum(map(len, labels)) - right},
        "losses": losses,
        "pair_accuracy": {"trained_on": _as_json(evaluate(seen)), "held_out": _as_json(evaluate(sorted(held_out)))},
        "versions": versions(),
    }
    write_json(out / "results.json", results)
    return results


def run_scoring(
    rows: Rows,
    ranker: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    backbone: str | os.PathLike[str] | None = None,
    device: str | None = None,
    progress: bool = True,
) -> Path:
    """Write every row with the `scores` of its rationales, as `calm-fast rank score` does; a second call resumes.

    Args:
        rows: question, generated_answer. ranker: folder of a ranker, or the folder of a run that holds one.
        out: the file, gzipped where it ends in .gz. backbone: the folder of the frozen backbone, if it was moved.
    Returns:
        the path of the file.
    """
    target = None if device is None else usable_device("run_scoring", device)
    out, folder = Path(out), Path(ranker)
    folder = folder / "ranker" if (folder / "ranker").is_dir() else folder
    scorer = Ranker.from_pretrained(folder, backbone=backbone)
    if target is not None:
        scorer.to(target)
    weights = [[name, t.tolist()] for name, t in sorted(scorer.head.state_dict().items())]
    settings = {"ranker": json_checksum(weights), "rows": json_checksum(rows)}
    with Journal(out.with_name(f".{out.name}.part"), settings, "rank score") as journal:
        scores = {i: row["scores"] for i, row in journal.rows.items()}
        steps = range(0, len(rows), _STEP)
        for start in progress_bar(steps, desc="scoring", unit=f"{_STEP} questions", shown=progress):
            chunk = rows[start : start + _STEP]
            # score a step as a whole: a resumed run then forms the batches of an uninterrupted one, for the same bits
            if all(start + i in scores for i in range(len(chunk))):
                continue
            found = scorer.score([r["question"] for r in chunk], [r["generated_answer"] for r in chunk])
            lists = {start + i: [round(value, 7) for value in s.tolist()] for i, s in enumerate(found)}
            journal.append({"index": i, "question": rows[i]["question"], "scores": s} for i, s in lists.items())
            scores |= lists
        write_rows(out, ({**row, "scores": scores[i]} for i, row in enumerate(rows)))
        journal.file.unlink()
        journal.settings_file.unlink()
    return out


def _saved_labels(
    file: Path, rows: Rows, pattern: str | None, cache_dir: Path, workers: int | None, progress: bool
) -> list[torch.Tensor]:
    if not file.is_file():
        labels = label_rationales(rows, pattern=pattern, cache_dir=cache_dir, workers=workers, progress=progress)
        write_json(file, [row.int().tolist() for row in labels])
    return [torch.tensor(row, dtype=torch.bool) for row in json.loads(file.read_text(encoding="utf-8"))]


def _draw_held_out(known: Sequence[int], share: float, seed: int) -> set[int]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(known), generator=generator).tolist()
    return {known[i] for i in order[: round(share * len(known))]}


def _as_json(result: PairAccuracy) -> dict[str, Any]:
    """Return `result` for JSON, which has no NaN: the accuracy is None without a pair."""
    return result._asdict() | {"accuracy": result.accuracy if result.pairs else None}
