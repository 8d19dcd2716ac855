"""The ranking model: how likely is a rationale right, given its question (arXiv 2312.12832, section 3.4)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calm_fast.consistency.ranking.inputs import Encoded, PairEncoder, batches_by_length, pooled
from calm_fast.core.progress import progress_bar

FORMAT_VERSION = 1
_CONFIG, _HEAD, _BACKBONE, _TOKENIZER = "ranker.json", "head.safetensors", "backbone", "tokenizer"
# sigmoid of larger logits is 1 in float32; scores stay inside (0, 1)
_LARGEST_LOGIT = 15.0


class RankerHead(nn.Module):
    """logit = w2 . gelu(W1 (x - mean) / scale + b1) + b2.

    mean and scale are constants (0 and 1 until `standardise`): features of frozen models have very uneven scales.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, features: int, hidden: int = 256, dropout: float = 0.5) -> None:
        super().__init__()
        self.sizes = {"features": features, "hidden": hidden, "dropout": dropout}
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.inner = nn.Linear(features, hidden)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(hidden, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., F) float -> logits (...) float32."""
        x = (x.float() - self.mean) / self.scale
        return self.outer(self.dropout(nn.functional.gelu(self.inner(x)))).squeeze(-1)

    @torch.no_grad()
    def standardise(self, x: torch.Tensor) -> None:
        """Take mean and scale from training features x (n, F)."""
        self.mean.copy_(x.double().mean(0))
        deviation = x.double().std(0, correction=0)
        self.scale.copy_(torch.where(deviation > 1e-6, deviation, 1.0))


class Ranker(nn.Module):
    """Scores rationales: backbone over (question, rationale), mean over the rationale's tokens, MLP, sigmoid.

    Without a backbone it scores ready features (`score_features`). A frozen backbone is always in eval mode.

    Args:
        head: the MLP. backbone: a transformers model whose output has last_hidden_state; tokenizer: its tokenizer.
        train_backbone: whether the backbone's weights are the ranker's own, trained and saved with it.
        max_length: tokens of question and rationale together. batch_tokens: tokens in memory at once, when scoring.
    """

    def __init__(
        self,
        head: RankerHead,
        backbone: nn.Module | None = None,
        tokenizer: Any = None,
        *,
        train_backbone: bool = False,
        max_length: int = 512,
        batch_tokens: int = 8192,
    ) -> None:
        super().__init__()
        if (backbone is None) != (tokenizer is None):
            raise ValueError("Ranker: `backbone` and `tokenizer` come together, or neither")
        self.head, self.backbone, self.tokenizer = head, backbone, tokenizer
        self.train_backbone, self.max_length, self.batch_tokens = train_backbone, max_length, batch_tokens
        if backbone is None:
            return
        backbone.requires_grad_(train_backbone).eval()
        limit = getattr(backbone.config, "max_position_embeddings", None) or max_length
        if max_length > limit:
            raise ValueError(f"Ranker: `max_length` {max_length} is more than the backbone's {limit} positions")
        self.encoder = PairEncoder(tokenizer, max_length)
        pad = getattr(tokenizer, "pad_token_id", None)
        self.pad_id = 0 if pad is None else pad  # padding is masked, so any id serves

    @classmethod
    def from_backbone(
        cls,
        model: str | os.PathLike | nn.Module,
        tokenizer: Any = None,
        *,
        train_backbone: bool = False,
        max_length: int | None = None,
        hidden: int = 256,
        dropout: float = 0.5,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Ranker:
        """An untrained ranker over a transformers encoder or decoder.

        Args:
            model: folder or name of a model, or a loaded one (with `tokenizer`). A head it has is left out; of an
                encoder-decoder the encoder is taken.
            max_length: default 512, or what the model's positions allow.
            dtype: of a model loaded here; a backbone to train wants float32.
            seed: of the head's initial weights.
        """
        if isinstance(model, nn.Module):
            if tokenizer is None:
                raise ValueError("Ranker.from_backbone: a loaded `model` needs its `tokenizer`")
            backbone = _without_head(model)
        else:
            from transformers import AutoTokenizer

            backbone = _load_backbone(model, dtype)
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(os.fspath(model))
        positions = getattr(backbone.config, "max_position_embeddings", None)
        length = max_length or min(512, positions or 512)
        head = _fresh_head(backbone.config.get_text_config().hidden_size, hidden, dropout, seed)
        head.to(next(backbone.parameters()).device)
        return cls(head, backbone, tokenizer, train_backbone=train_backbone, max_length=length)

    @classmethod
    def for_features(cls, features: int, *, hidden: int = 256, dropout: float = 0.5, seed: int = 0) -> Ranker:
        """An untrained head alone, for ready features of width `features`."""
        return cls(_fresh_head(features, hidden, dropout, seed))

    def train(self, mode: bool = True) -> Ranker:
        super().train(mode)
        if self.backbone is not None and not self.train_backbone:
            self.backbone.eval()
        return self

    def encode(self, questions: Sequence[str], rationales: Sequence[Sequence[str]]) -> list[list[Encoded]]:
        """Token sequences of every rationale of every question, checked."""
        if self.backbone is None:
            raise ValueError("Ranker: it has no backbone, only a head; use score_features")
        check_groups(questions, rationales)
        return self.encoder(questions, rationales)

    def logits(self, items: Sequence[Encoded]) -> torch.Tensor:
        """(n,) float32 logits of one batch; gradients flow to whatever is trained."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.train_backbone):
            states = pooled(self.backbone, items, self.pad_id)
        return self.head(states)

    @torch.no_grad()
    def features(
        self, questions: Sequence[str], rationales: Sequence[Sequence[str]], *, progress: bool = False
    ) -> list[torch.Tensor]:
        """Per question (K_q, F) float32 on the CPU: what the head reads. At most `batch_tokens` tokens at once."""
        groups = self.encode(questions, rationales)
        items = [item for group in groups for item in group]
        out = torch.empty(len(items), self.head.sizes["features"])
        training = self.training
        self.eval()
        with progress_bar(total=len(items), desc="encoding rationales", unit="rationale", shown=progress) as bar:
            for batch in batches_by_length(items, self.batch_tokens):
                out[batch] = pooled(self.backbone, [items[i] for i in batch], self.pad_id).cpu()
                bar.update(len(batch))
        self.train(training)
        return list(out.split([len(group) for group in groups]))

    @torch.no_grad()
    def score(
        self, questions: Sequence[str], rationales: Sequence[Sequence[str]], *, progress: bool = False
    ) -> list[torch.Tensor]:
        """Scores in (0, 1), per question (K_q,) float32 on the CPU; higher means more likely right.

        Args:
            questions: Q strings. rationales: for each question any number of strings.
        Raises:
            TypeError, ValueError: not such sequences, or the ranker has no backbone.
        """
        return self.score_features(self.features(questions, rationales, progress=progress))

    @torch.no_grad()
    def score_features(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Like `score`, from ready features: per question (K_q, F) float."""
        width = self.head.sizes["features"]
        for i, x in enumerate(features):
            if not isinstance(x, torch.Tensor) or x.ndim != 2 or x.shape[1] != width:
                got = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
                raise ValueError(f"features[{i}]: expected a tensor (K, {width}), got {got}")
        if not features:
            return []
        training, sizes = self.training, [len(x) for x in features]
        self.eval()
        logits = self.head(torch.cat(list(features)).to(self.head.outer.weight.device))
        self.train(training)
        return list(logits.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT).sigmoid().cpu().split(sizes))

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Head, tokenizer and configuration; a trained backbone with its weights, a frozen one by name and fingerprint.

        Raises:
            ValueError: a frozen backbone that was not loaded from anywhere, so that no name leads back to it.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        config: dict[str, Any] = {"format_version": FORMAT_VERSION, "head": self.head.sizes, "backbone": None}
        config |= {"max_length": self.max_length, "batch_tokens": self.batch_tokens}
        if self.backbone is not None:
            name = None if self.train_backbone else getattr(self.backbone, "name_or_path", "") or None
            if name is None and not self.train_backbone:
                raise ValueError("save_pretrained: the frozen backbone has no name_or_path to be found again by")
            folder.mkdir(parents=True, exist_ok=True)
            dtype = str(next(self.backbone.parameters()).dtype).removeprefix("torch.")
            config["backbone"] = {"trained": self.train_backbone, "name": name, "dtype": dtype}
            if self.train_backbone:
                self.backbone.save_pretrained(folder / _BACKBONE)
            else:
                config["backbone"]["fingerprint"] = fingerprint(self.backbone)
            self.tokenizer.save_pretrained(folder / _TOKENIZER)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous().cpu() for k, v in self.head.state_dict().items()}, folder / _HEAD)
        (folder / _CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, *, backbone: str | os.PathLike | None = None) -> Ranker:
        """What `save_pretrained` wrote.

        Args:
            backbone: where the frozen backbone is now, if it moved.
        Raises:
            ValueError: no ranker there, another format version, or another backbone than the head was trained on.
        """
        from safetensors.torch import load_file
        from transformers import AutoTokenizer

        folder = Path(folder)
        if not (folder / _CONFIG).is_file():
            raise ValueError(f"Ranker.from_pretrained: {folder} has no {_CONFIG}")
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        if config.get("format_version") != FORMAT_VERSION:
            found = config.get("format_version")
            raise ValueError(f"{folder}: format version {found}, this release reads {FORMAT_VERSION}")
        head = RankerHead(**config["head"])
        head.load_state_dict(load_file(folder / _HEAD))
        base = config["backbone"]
        if base is None:
            return cls(head, max_length=config["max_length"], batch_tokens=config["batch_tokens"]).eval()
        source = folder / _BACKBONE if base["trained"] else backbone or base["name"]
        loaded = _load_backbone(source, getattr(torch, base["dtype"]))
        if not base["trained"] and fingerprint(loaded) != base["fingerprint"]:
            raise ValueError(f"Ranker.from_pretrained: {source} is not the backbone that this head was trained on")
        return cls(
            head, loaded, AutoTokenizer.from_pretrained(folder / _TOKENIZER), train_backbone=base["trained"],
            max_length=config["max_length"], batch_tokens=config["batch_tokens"],
        ).eval()  # fmt: skip


def check_groups(questions: Sequence[str], rationales: Sequence[Sequence[str]]) -> None:
    """Raises TypeError or ValueError unless these are Q strings and Q sequences of strings."""
    for name, value in (("questions", questions), ("rationales", rationales)):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError(f"{name}: expected a sequence, one entry per question, got {type(value).__name__}")
    if len(questions) != len(rationales):
        raise ValueError(f"rationales: expected one sequence for each of {len(questions)} questions: {len(rationales)}")
    for i, (question, group) in enumerate(zip(questions, rationales, strict=True)):
        if not isinstance(question, str):
            raise TypeError(f"questions[{i}]: expected str, got {type(question).__name__}")
        if isinstance(group, str) or not isinstance(group, Sequence) or not all(isinstance(r, str) for r in group):
            raise TypeError(f"rationales[{i}]: expected a sequence of str, got {type(group).__name__}")


def fingerprint(model: nn.Module, edge: int = 64) -> str:
    """Tells models apart without reading all of them: name, shape and the first elements of every parameter."""
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        first = p.detach().flatten()[:edge].double().cpu().tolist()
        digest.update(f"{name} {tuple(p.shape)} {first}".encode())
    return digest.hexdigest()


def _fresh_head(features: int, hidden: int, dropout: float, seed: int) -> RankerHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RankerHead(features, hidden, dropout)


def _without_head(model: nn.Module) -> nn.Module:
    model = getattr(model, "base_model", model)
    if getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "decoder"):
        kind = type(model).__name__
        raise ValueError(f"model: {kind} has a decoder; pass its path, or a loaded encoder-only class")
    return model


def _load_backbone(source: str | os.PathLike, dtype: torch.dtype) -> nn.Module:
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoConfig, AutoModel, AutoModelForTextEncoding

    config = AutoConfig.from_pretrained(os.fspath(source))
    encoder_only = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING  # of T5 and its like, the encoder alone
    if config.is_encoder_decoder and not encoder_only:
        raise ValueError(f"{source}: transformers has no encoder-only class for {config.model_type}")
    kind = AutoModelForTextEncoding if encoder_only else AutoModel
    return kind.from_pretrained(os.fspath(source), dtype=dtype).eval()
