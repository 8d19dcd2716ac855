"""From rows of sampled rationales to a ranker on disk, and from a ranker to rows with scores; both resumable."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from calm_fast._version import versions
from calm_fast.consistency.answers.equality import extract_answer
from calm_fast.consistency.ranking.losses import PairAccuracy, pair_accuracy
from calm_fast.consistency.ranking.ranker import Ranker, fingerprint
from calm_fast.consistency.ranking.training import RankerSettings, questions_to_rank, train_ranker
from calm_fast.consistency.voting.consensus import solution
from calm_fast.consistency.voting.journal import Journal
from calm_fast.consistency.voting.samples import write_rows
from calm_fast.core.progress import progress_bar

Rows = Sequence[dict[str, Any]]
_CHUNK = 250  # questions whose features, or scores, are computed and kept together
_STEP = 32  # questions scored and written at once


def label_rationales(
    rows: Rows,
    *,
    pattern: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> list[torch.Tensor]:
    """Per row (K,) bool: whether each rationale's answer equals the row's; one without an answer is wrong.

    The row's answer is what a solution ends in, or the text itself, as in `calm-fast vote`; a row where it is blank
    gets an empty tensor: nobody knows which of its rationales are right. pattern: last resort of `extract_answer`.
    """
    from calm_fast.consistency.answers.grouping import group_answers

    gold = [solution(row["answer"], pattern) for row in rows]
    answers = [[extract_answer(r, pattern) for r in row["generated_answer"]] for row in rows]
    groups = group_answers(answers, gold=gold, workers=workers, cache_dir=cache_dir, progress=progress)
    labels = []
    for i, row in enumerate(rows):
        k = 0 if gold[i] is None else len(row["generated_answer"])
        labels.append((groups.valid[i, :k] & (groups.answers[i, :k] == groups.correct[i])).bool().cpu())
    return labels


def cached_features(ranker: Ranker, rows: Rows, folder: str | os.PathLike, *, progress: bool = False) -> list:
    """`ranker.features` of all rows, kept in `folder` chunk by chunk; a second call goes on where the first stopped.

    Raises:
        ValueError: `folder` holds features of another backbone, length or rows.
    """
    from safetensors.torch import load_file, save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = [[row["question"], row["generated_answer"]] for row in rows]
    identity = {"backbone": fingerprint(ranker.backbone), "rows": _digest(texts), "max_length": ranker.max_length}
    _claim(folder / "features.json", identity, "features")
    features: list[torch.Tensor] = []
    starts = range(0, len(rows), _CHUNK)
    for start in progress_bar(starts, desc="features", unit=f"{_CHUNK} questions", shown=progress):
        file = folder / f"chunk_{start:07d}.safetensors"
        part = rows[start : start + _CHUNK]
        if not file.is_file():
            groups = ranker.features([r["question"] for r in part], [r["generated_answer"] for r in part])
            temporary = file.with_suffix(".part")
            save_file({"features": torch.cat(groups)}, temporary)
            temporary.replace(file)
        features += load_file(file)["features"].split([len(r["generated_answer"]) for r in part])
    return features


def run_training(
    rows: Rows,
    model: str | os.PathLike,
    out: str | os.PathLike,
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
    """Label, encode, train, judge and save a ranker; what `calm-fast rank train` does. Resumable to equal weights.

    Args:
        rows: question, answer, generated_answer. model: folder or name of the backbone.
        out: gets ranker/ (`Ranker.from_pretrained`), results.json, and what resuming needs.
        holdout: share of the questions that training does not see and that the ranker is judged on.
        pattern: last resort of `extract_answer`.
    Raises:
        ValueError: `out` belongs to another run, or no question has both right and wrong rationales.
    """
    settings = settings or RankerSettings()
    extract_answer("", pattern)  # a bad pattern is an error before any work
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout: expected a share of at least 0 and below 1, got {holdout}")
    out = Path(out)
    decisive = {k: v for k, v in asdict(settings).items() if k not in ("progress", "save_every")}
    ranker = Ranker.from_backbone(
        model, train_backbone=train_backbone, max_length=max_length, hidden=hidden, dtype=dtype, seed=settings.seed
    )
    identity = {
        "settings": decisive, "train_backbone": train_backbone, "max_length": ranker.max_length, "hidden": hidden,
        "dtype": str(dtype), "holdout": holdout, "backbone": fingerprint(ranker.backbone), "rows": _digest(rows),
        "pattern": pattern,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)  # not before the model has been read
    _claim(out / "identity.json", identity, "a run")
    labels = _kept_labels(out / "labels.json", rows, pattern, out / "answers", workers, settings.progress)
    known = [i for i, row in enumerate(labels) if len(row)]
    held = _held_out(known, holdout, settings.seed)
    seen = [i for i in known if i not in held]

    def pick(values: Sequence[Any], chosen: Sequence[int]) -> list[Any]:
        return [values[i] for i in chosen]

    try:
        questions_to_rank(pick(labels, seen))  # before hours of features
    except ValueError:
        for file in ("identity.json", "labels.json"):  # such a run never ends: `out` is free for mended rows
            (out / file).unlink()
        raise
    if device is not None:
        ranker.to(device)
    questions, rationales = [row["question"] for row in rows], [row["generated_answer"] for row in rows]
    features = None if train_backbone else cached_features(ranker, rows, out / "features", progress=settings.progress)
    texts = {"questions": pick(questions, seen), "rationales": pick(rationales, seen)} if features is None else {}
    losses = train_ranker(
        ranker, pick(labels, seen), features=None if features is None else pick(features, seen), settings=settings,
        checkpoint=out / "checkpoint.pt", **texts,
    )  # fmt: skip

    def judged(chosen: Sequence[int]) -> PairAccuracy:
        if features is not None:
            return pair_accuracy(ranker.score_features(pick(features, chosen)), pick(labels, chosen))
        return pair_accuracy(ranker.score(pick(questions, chosen), pick(rationales, chosen)), pick(labels, chosen))

    ranker.save_pretrained(out / "ranker")
    right = sum(int(row.sum()) for row in labels)
    results = {
        "identity": identity,
        "questions": {"all": len(rows), "trained_on": len(seen), "held_out": len(held)},
        "rationales": {"right": right, "wrong": sum(map(len, labels)) - right},
        "losses": losses,
        "pair_accuracy": {"trained_on": _finite(judged(seen)), "held_out": _finite(judged(sorted(held)))},
        "versions": versions(),
    }
    _write(out / "results.json", results)
    return results


def run_scoring(
    rows: Rows,
    ranker: str | os.PathLike,
    out: str | os.PathLike,
    *,
    backbone: str | os.PathLike | None = None,
    device: str | None = None,
    progress: bool = True,
) -> Path:
    """Write every row with its rationales' `scores`; what `calm-fast rank score` does. A second call goes on.

    Args:
        ranker: folder of a ranker, or a run's folder that holds one. out: the file, gzip where it ends in .gz.
        backbone: where the ranker's frozen backbone is now, if it moved.
    """
    out, folder = Path(out), Path(ranker)
    folder = folder / "ranker" if (folder / "ranker").is_dir() else folder
    scorer = Ranker.from_pretrained(folder, backbone=backbone)
    if device is not None:
        scorer.to(device)
    weights = [[name, t.tolist()] for name, t in sorted(scorer.head.state_dict().items())]
    with Journal(out.with_name(f".{out.name}.part"), {"ranker": _digest(weights), "rows": _digest(rows)}) as journal:
        scores = {i: row["scores"] for i, row in journal.rows.items()}
        steps = range(0, len(rows), _STEP)
        for start in progress_bar(steps, desc="scoring", unit=f"{_STEP} questions", shown=progress):
            chunk = rows[start : start + _STEP]
            # a step is scored as a whole: a resumed run forms the batches of an unbroken one, and so the same last bits
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


def _kept_labels(
    file: Path, rows: Rows, pattern: str | None, cache_dir: Path, workers: int | None, progress: bool
) -> list[torch.Tensor]:
    if not file.is_file():
        labels = label_rationales(rows, pattern=pattern, cache_dir=cache_dir, workers=workers, progress=progress)
        _write(file, [row.int().tolist() for row in labels])
    return [torch.tensor(row, dtype=torch.bool) for row in json.loads(file.read_text(encoding="utf-8"))]


def _held_out(known: Sequence[int], share: float, seed: int) -> set[int]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(known), generator=generator).tolist()
    return {known[i] for i in order[: round(share * len(known))]}


def _finite(result: PairAccuracy) -> dict[str, Any]:
    """JSON has no NaN: None where there is no pair."""
    return result._asdict() | {"accuracy": result.accuracy if result.pairs else None}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _claim(file: Path, identity: dict[str, Any], what: str) -> None:
    """Mark a folder as this run's; ValueError where it is another's."""
    identity = json.loads(json.dumps(identity))
    if not file.is_file():
        _write(file, identity)
    kept = json.loads(file.read_text(encoding="utf-8"))
    changed = [key for key in identity if kept.get(key) != identity[key]]
    if changed:
        raise ValueError(f"{file.parent} holds {what} with other {', '.join(changed)}; choose another folder")


def _write(file: Path, content: Any) -> None:
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(file)
