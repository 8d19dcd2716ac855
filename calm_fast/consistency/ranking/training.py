"""Training a ranker on right and wrong rationales of the same question; resumable to equal weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from calm_fast.consistency.ranking.losses import LOSSES, ranking_loss
from calm_fast.consistency.ranking.ranker import Ranker
from calm_fast.core.progress import progress_bar


@dataclass(frozen=True)
class RankerSettings:
    """How to train. power: the exponent of loss "power"; margin: of loss "margin". Rates decay by a cosine to zero.

    questions_per_step: of features, every rationale of these questions is used; a trained backbone sees one right and
    one wrong rationale of each, so one step holds 2 * questions_per_step sequences in memory.
    save_every: steps between checkpoints, and progress: whether to show a bar; neither changes what is computed.
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
            raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {self.loss!r}")
        for name, low in (("epochs", 1), ("questions_per_step", 1), ("power", 1), ("save_every", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected at least {low}, got {getattr(self, name)}")
        for name in ("learning_rate", "backbone_learning_rate", "margin"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")


def questions_to_rank(truth: Sequence[torch.Tensor]) -> list[bool]:
    """Per question, whether it has both right and wrong rationales; ValueError where none has."""
    mixed = [bool(row.any()) and not bool(row.all()) for row in truth]
    if not any(mixed):
        raise ValueError("labels: no question has both right and wrong rationales, so there is nothing to rank")
    return mixed


def train_ranker(
    ranker: Ranker,
    labels: Sequence[Sequence[bool] | torch.Tensor],
    *,
    questions: Sequence[str] | None = None,
    rationales: Sequence[Sequence[str]] | None = None,
    features: Sequence[torch.Tensor] | None = None,
    settings: RankerSettings | None = None,
    checkpoint: str | os.PathLike | None = None,
) -> list[float]:
    """Train `ranker` in place: its head alone (from features), or head and backbone (`train_backbone`).

    Args:
        labels: per question (K_q,) bool, whether each rationale is right.
        questions, rationales: texts; of a frozen backbone the features are computed once.
        features: per question (K_q, F) float instead of texts; for a frozen backbone or none.
        checkpoint: a file; written now and then, and a run that finds it goes on from there to equal weights.
    Returns:
        the mean loss of every epoch. The same seed gives the same weights on the same machine.
    Raises:
        ValueError: no question has both right and wrong rationales, sizes differ, or the checkpoint is another run's.
    """
    settings = settings or RankerSettings()
    truth = [torch.as_tensor(row, dtype=torch.bool).cpu() for row in labels]
    mixed = questions_to_rank(truth)
    if features is None and (questions is None or rationales is None):
        raise ValueError("train_ranker: expected `questions` and `rationales`, or `features`")
    if ranker.train_backbone:
        if features is not None:
            raise ValueError("features: a ranker that trains its backbone needs `questions` and `rationales`")
        batch_loss = _from_texts(ranker, questions, rationales, truth, settings)
    else:
        if features is None:
            features = ranker.features(questions, rationales, progress=settings.progress)
        batch_loss = _from_features(ranker, features, truth, settings)
    usable = [i for i, row in enumerate(truth) if (mixed[i] or settings.loss == "bce" and len(row))]
    identity = _identity(ranker, truth, settings)
    return _fit(ranker, usable, batch_loss, settings, None if checkpoint is None else Path(checkpoint), identity)


BatchLoss = Callable[[list[int]], torch.Tensor]


def _from_features(
    ranker: Ranker, features: Sequence[torch.Tensor], truth: Sequence[torch.Tensor], settings: RankerSettings
) -> BatchLoss:
    _same_sizes("features", [len(x) for x in features], truth)
    ranker.score_features(features[:1])  # its errors name what is wrong with a feature's shape
    device = ranker.head.outer.weight.device
    ranker.head.standardise(torch.cat(list(features)).float().to(device))
    x = pad_sequence([f.float() for f in features], batch_first=True).to(device)
    labels = pad_sequence(list(truth), batch_first=True).to(device)
    valid = pad_sequence([torch.ones_like(row) for row in truth], batch_first=True).to(device)

    def batch_loss(chosen: list[int]) -> torch.Tensor:
        return _loss(ranker.head(x[chosen]), labels[chosen], valid[chosen], settings)

    return batch_loss


def _from_texts(
    ranker: Ranker,
    questions: Sequence[str],
    rationales: Sequence[Sequence[str]],
    truth: Sequence[torch.Tensor],
    settings: RankerSettings,
) -> BatchLoss:
    groups = ranker.encode(questions, rationales)
    _same_sizes("rationales", [len(group) for group in groups], truth)

    def batch_loss(chosen: list[int]) -> torch.Tensor:
        # torch's generator is seeded per step, so the draw is the same after a resume
        drawn = [_one_pair(truth[i]) for i in chosen]
        items = [groups[i][k] for i, pair in zip(chosen, drawn, strict=True) for k in pair]
        logits = ranker.logits(items).split([len(pair) for pair in drawn])
        labels = [truth[i][pair].to(logits[0].device) for i, pair in zip(chosen, drawn, strict=True)]
        valid = pad_sequence([torch.ones_like(row) for row in labels], batch_first=True)
        return _loss(pad_sequence(logits, batch_first=True), pad_sequence(labels, batch_first=True), valid, settings)

    return batch_loss


def _one_pair(right: torch.Tensor) -> list[int]:
    """A right and a wrong rationale of a question; of one kind alone a single one."""
    kinds = [side.nonzero().flatten() for side in (right, ~right)]
    return [int(side[torch.randint(len(side), ())]) for side in kinds if len(side)]


def _loss(logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor, settings: RankerSettings) -> torch.Tensor:
    return ranking_loss(logits, labels, valid, loss=settings.loss, margin=settings.margin, power=settings.power)


def _same_sizes(name: str, sizes: list[int], truth: Sequence[torch.Tensor]) -> None:
    if len(sizes) != len(truth):
        raise ValueError(f"{name}: expected {len(truth)} questions, as in labels, got {len(sizes)}")
    for i, (size, row) in enumerate(zip(sizes, truth, strict=True)):
        if row.ndim != 1 or size != len(row):
            raise ValueError(f"labels[{i}]: expected one label for each of {size} rationales, got {tuple(row.shape)}")


def _fit(
    ranker: Ranker,
    usable: list[int],
    batch_loss: BatchLoss,
    settings: RankerSettings,
    checkpoint: Path | None,
    identity: str,
) -> list[float]:
    from transformers import get_cosine_schedule_with_warmup

    groups = [{"params": list(ranker.head.parameters()), "lr": settings.learning_rate}]
    if ranker.train_backbone:
        groups.append({"params": list(ranker.backbone.parameters()), "lr": settings.backbone_learning_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    per_epoch = -(-len(usable) // settings.questions_per_step)
    total = per_epoch * settings.epochs
    schedule = get_cosine_schedule_with_warmup(optimizer, round(settings.warmup * total), total)
    losses = _resume(checkpoint, identity, ranker, optimizer, schedule)
    parameters = [p for group in groups for p in group["params"]]
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
            # every step has its own seed, so that a resumed run draws what an unbroken one draws
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


def _trained(ranker: Ranker) -> torch.nn.Module:
    return ranker if ranker.train_backbone else ranker.head


def _save(file: Path, identity: str, ranker: Ranker, optimizer: Any, schedule: Any, losses: list[float]) -> None:
    state = {
        "identity": identity,
        "weights": _trained(ranker).state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "losses": losses,
    }
    part = file.with_name(f"{file.name}.part")  # an interruption leaves the old file or the new one
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, part)
    part.replace(file)


def _resume(file: Path | None, identity: str, ranker: Ranker, optimizer: Any, schedule: Any) -> list[float]:
    if file is None or not file.is_file():
        return []
    state = torch.load(file, map_location="cpu", weights_only=True)
    if state["identity"] != identity:
        raise ValueError(f"checkpoint: {file.name} belongs to a run with other settings or labels")
    _trained(ranker).load_state_dict(state["weights"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return list(state["losses"])
