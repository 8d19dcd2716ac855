"""Train a ranker on right and wrong rationales of the same question; a resumed run ends at equal weights."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from calm_fast.consistency.ranking.losses import LOSSES, ranking_loss
from calm_fast.consistency.ranking.ranker import Ranker
from calm_fast.core.checks import bad_value
from calm_fast.core.files import atomic_path
from calm_fast.core.progress import progress_bar

_CALLER, _SETTINGS = "train_ranker", "RankerSettings"


@dataclass(frozen=True)
class RankerSettings:
    """How to train a ranker; learning rates decay to zero by a cosine.

    loss, power, margin: see `ranking_loss`. questions_per_step: with features, a step uses every rationale of these
    questions. A trained backbone reads one right and one wrong rationale of each, so a step holds
    2 * questions_per_step sequences in memory. warmup: share of the steps. clip: largest norm of the gradient.
    save_every: steps between checkpoints, 0 = none. progress: show a bar. Neither of the two changes the result.
    """

    loss: str = "power"
    power: float = 3.0
    margin: float = 0.3
    epochs: int = 10
    questions_per_step: int = 32
    learning_rate: float = 1e-3
    backbone_learning_rate: float = 2e-5
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float = 1.0
    seed: int = 0
    save_every: int = 200
    progress: bool = True

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise bad_value(_SETTINGS, "loss", f"one of {', '.join(map(repr, LOSSES))}", repr(self.loss))
        for name, low in (("epochs", 1), ("questions_per_step", 1), ("power", 1), ("save_every", 0)):
            if getattr(self, name) < low:
                raise bad_value(_SETTINGS, name, f"at least {low}", str(getattr(self, name)))
        for name in ("learning_rate", "backbone_learning_rate", "margin"):
            if not getattr(self, name) > 0:
                raise bad_value(_SETTINGS, name, "a positive number", str(getattr(self, name)))


def questions_to_rank(truth: Sequence[torch.Tensor]) -> list[bool]:
    """Return for each question whether it has both right and wrong rationales.

    Raises:
        ValueError: no question has.
    """
    mixed = [bool(row.any()) and not bool(row.all()) for row in truth]
    if not any(mixed):
        raise ValueError(
            f"{_CALLER}: `labels` must have a question with both right and wrong rationales, got none, so there is "
            "nothing to rank"
        )
    return mixed


def train_ranker(
    ranker: Ranker,
    labels: Sequence[Sequence[bool] | torch.Tensor],
    *,
    questions: Sequence[str] | None = None,
    rationales: Sequence[Sequence[str]] | None = None,
    features: Sequence[torch.Tensor] | None = None,
    settings: RankerSettings | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> list[float]:
    """Train `ranker` in place: its head alone, or head and backbone if it has `train_backbone`.

    Args:
        labels: for each question (K_q,) bool, True = the rationale is right.
        questions, rationales: texts. A frozen backbone computes their features once.
        features: for each question (K_q, F) float, instead of texts; for a ranker without a trained backbone.
        checkpoint: a file that is written every `save_every` steps. A run that finds it resumes from it and ends at
            the weights of an uninterrupted run.
    Returns:
        the mean loss of every epoch. The same seed gives the same weights on the same machine.
    Raises:
        ValueError: no question has both right and wrong rationales, sizes differ, or the checkpoint belongs to another
            run.
    """
    settings = settings or RankerSettings()
    truth = [torch.as_tensor(row, dtype=torch.bool).cpu() for row in labels]
    mixed = questions_to_rank(truth)
    if ranker.train_backbone and features is not None:
        raise ValueError(
            f"{_CALLER}: `features` must be None for a ranker that trains its backbone, got features; give `questions` "
            "and `rationales`"
        )
    if features is None:
        if questions is None or rationales is None:
            given = {"questions": questions, "rationales": rationales}
            missing = " and ".join(f"no `{name}`" for name, value in given.items() if value is None)
            raise ValueError(f"{_CALLER}: `questions` and `rationales` must be given, or `features`, got {missing}")
        if ranker.train_backbone:
            batch_loss = _from_texts(ranker, questions, rationales, truth, settings)
        else:
            features = ranker.features(questions, rationales, progress=settings.progress)
    if features is not None:
        batch_loss = features_loss(
            ranker, features, truth, lambda logits, right, valid: _loss(logits, right, valid, settings)
        )
    usable = [i for i, row in enumerate(truth) if (mixed[i] or settings.loss == "bce" and len(row))]
    identity = _identity(ranker, truth, settings)
    return fit(ranker, usable, batch_loss, settings, None if checkpoint is None else Path(checkpoint), identity)


BatchLoss = Callable[[list[int]], torch.Tensor]


def features_loss(
    ranker: Ranker,
    features: Sequence[torch.Tensor],
    truth: Sequence[torch.Tensor],
    loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> BatchLoss:
    """Return the loss of a batch of questions, and standardise the head by `features`.

    loss: from logits (Q, K) float, labels (Q, K) bool and valid (Q, K) bool to a scalar.
    """
    _check_sizes("features", [len(x) for x in features], truth)
    ranker.score_features(features[:1])  # raises if a feature's shape is wrong
    device = ranker.head.outer.weight.device
    ranker.head.standardise(torch.cat(list(features)).float().to(device))
    x = pad_sequence([f.float() for f in features], batch_first=True).to(device)
    labels = pad_sequence(list(truth), batch_first=True).to(device)
    valid = pad_sequence([torch.ones_like(row) for row in truth], batch_first=True).to(device)

    def batch_loss(chosen: list[int]) -> torch.Tensor:
        return loss(ranker.head(x[chosen]), labels[chosen], valid[chosen])

    return batch_loss


def _from_texts(
    ranker: Ranker,
    questions: Sequence[str],
    rationales: Sequence[Sequence[str]],
    truth: Sequence[torch.Tensor],
    settings: RankerSettings,
) -> BatchLoss:
    groups = ranker.encode(questions, rationales)
    _check_sizes("rationales", [len(group) for group in groups], truth)

    def batch_loss(chosen: list[int]) -> torch.Tensor:
        # torch's generator is seeded for every step, so the draw is the same after a resume
        drawn = [_draw_pair(truth[i]) for i in chosen]
        items = [groups[i][k] for i, pair in zip(chosen, drawn, strict=True) for k in pair]
        logits = ranker.logits(items).split([len(pair) for pair in drawn])
        labels = [truth[i][pair].to(logits[0].device) for i, pair in zip(chosen, drawn, strict=True)]
        valid = pad_sequence([torch.ones_like(row) for row in labels], batch_first=True)
        return _loss(pad_sequence(logits, batch_first=True), pad_sequence(labels, batch_first=True), valid, settings)

    return batch_loss


def _draw_pair(right: torch.Tensor) -> list[int]:
    """Draw a right and a wrong rationale of a question, or a single one if it has one kind only."""
    kinds = [side.nonzero().flatten() for side in (right, ~right)]
    return [int(side[torch.randint(len(side), ())]) for side in kinds if len(side)]


def _loss(logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor, settings: RankerSettings) -> torch.Tensor:
    return ranking_loss(logits, labels, valid, loss=settings.loss, margin=settings.margin, power=settings.power)


def _check_sizes(name: str, sizes: list[int], truth: Sequence[torch.Tensor]) -> None:
    if len(sizes) != len(truth):
        raise bad_value(_CALLER, name, f"for the {len(truth)} questions of `labels`", f"{len(sizes)} questions")
    for i, (size, row) in enumerate(zip(sizes, truth, strict=True)):
        if row.ndim != 1 or size != len(row):
            raise bad_value(
                _CALLER, f"labels[{i}]", f"one label for each of {size} rationales", f"shape {tuple(row.shape)}"
            )


def fit(
    ranker: Ranker,
    usable: list[int],
    batch_loss: BatchLoss,
    settings: RankerSettings,
    checkpoint: Path | None = None,
    identity: str = "",
) -> list[float]:
    """Train `ranker` in place by `batch_loss` on the questions `usable`, and return the mean loss of every epoch.

    checkpoint, identity: a file to resume from, and the run that it must belong to.
    """
    from transformers import get_cosine_schedule_with_warmup

    parameters = list(ranker.head.parameters())
    groups: list[dict[str, Any]] = [{"params": list(parameters), "lr": settings.learning_rate}]
    if ranker.train_backbone:
        backbone = list(ranker.required_backbone().parameters())
        groups.append({"params": backbone, "lr": settings.backbone_learning_rate})
        parameters += backbone
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    per_epoch = -(-len(usable) // settings.questions_per_step)
    total = per_epoch * settings.epochs
    schedule = get_cosine_schedule_with_warmup(optimizer, round(settings.warmup * total), total)
    losses = _resume(checkpoint, identity, ranker, optimizer, schedule)

    ranker.train()
    devices = {p.device for p in parameters if p.device.type == "cuda"}
    with (
        torch.random.fork_rng(devices=list(devices)),
        progress_bar(total=total, initial=len(losses), desc="training", unit="step", shown=settings.progress) as bar,
    ):
        for step in range(len(losses), total):
            epoch, place = divmod(step, per_epoch)
            torch.manual_seed(_seed(settings.seed, "order", epoch))
            order = torch.randperm(len(usable)).tolist()[place * settings.questions_per_step :]
            # every step has its own seed, so that a resumed run draws as an uninterrupted one does
            torch.manual_seed(_seed(settings.seed, "step", step))
            loss = batch_loss([usable[i] for i in order[: settings.questions_per_step]])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            bar.update()
            if checkpoint is not None and settings.save_every and (step + 1) % settings.save_every == 0:
                _save(checkpoint, identity, ranker, optimizer, schedule, losses)
    ranker.eval()
    if checkpoint is not None:
        _save(checkpoint, identity, ranker, optimizer, schedule, losses)
    return [sum(losses[i : i + per_epoch]) / per_epoch for i in range(0, total, per_epoch)]


def _seed(*parts: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "little")


def _identity(ranker: Ranker, truth: Sequence[torch.Tensor], settings: RankerSettings) -> str:
    decisive = {k: v for k, v in asdict(settings).items() if k not in ("progress", "save_every")}
    labels = [row.tolist() for row in truth]
    return hashlib.sha256(repr((decisive, ranker.head.sizes, ranker.train_backbone, labels)).encode()).hexdigest()


def _trained_module(ranker: Ranker) -> torch.nn.Module:
    return ranker if ranker.train_backbone else ranker.head


def _save(file: Path, identity: str, ranker: Ranker, optimizer: Any, schedule: Any, losses: list[float]) -> None:
    state = {
        "identity": identity,
        "weights": _trained_module(ranker).state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "losses": losses,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as partial:
        torch.save(state, partial)


def _resume(file: Path | None, identity: str, ranker: Ranker, optimizer: Any, schedule: Any) -> list[float]:
    if file is None or not file.is_file():
        return []
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as problem:
        raise ValueError(
            f"{_CALLER}: `checkpoint` must be a file that {_CALLER} wrote, got {file}, which cannot be read: {problem} "
            "(remove it to train from the beginning)"
        ) from problem
    if state["identity"] != identity:
        raise ValueError(
            f"{_CALLER}: `checkpoint` must be of a run with the same settings and labels, got {file.name}, which is of "
            "one with other settings or labels; give another file"
        )
    _trained_module(ranker).load_state_dict(state["weights"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return list(state["losses"])
