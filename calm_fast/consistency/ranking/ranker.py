"""The ranking model: how likely a rationale is right, given its question (arXiv 2312.12832, section 3.4)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from calm_fast.consistency.ranking.inputs import Encoded, PairEncoder, batches_by_length, mean_states
from calm_fast.core.checks import check_whole_text
from calm_fast.core.eval_mode import eval_mode
from calm_fast.core.files import atomic_path, check_folder, write_json
from calm_fast.core.fingerprint import file_checksum, model_fingerprint
from calm_fast.core.progress import progress_bar
from calm_fast.core.token_ids import check_token_ids, padding_id

FORMAT_VERSION = 1
_CONFIG, _HEAD, _BACKBONE, _TOKENIZER = "ranker.json", "head.safetensors", "backbone", "tokenizer"
# the sigmoid of a larger logit is 1 in float32, and scores stay inside (0, 1)
_LARGEST_LOGIT = 15.0


class RankerHead(nn.Module):
    """An MLP from features to a logit.

        logit = w2 . gelu(W1 (x - mean) / scale + b1) + b2

    mean and scale are constants, 0 and 1 until `standardise`: features of frozen models have very uneven scales.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, features: int, hidden: int = 256, dropout: float = 0.5) -> None:
        super().__init__()
        self.features = features
        self.sizes = {"features": features, "hidden": hidden, "dropout": dropout}
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.inner = nn.Linear(features, hidden)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(hidden, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (...) float32 of x (..., F) float."""
        x = (x.float() - self.mean) / self.scale
        return self.outer(self.dropout(nn.functional.gelu(self.inner(x)))).squeeze(-1)

    @torch.no_grad()
    def standardise(self, x: torch.Tensor) -> None:
        """Set mean and scale to those of the training features x (n, F)."""
        self.mean.copy_(x.double().mean(0))
        deviation = x.double().std(0, correction=0)
        self.scale.copy_(torch.where(deviation > 1e-6, deviation, 1.0))


class Ranker(nn.Module):
    """Scores rationales: backbone over (question, rationale), mean over the rationale's tokens, MLP, sigmoid.

    A ranker without a backbone scores features that are computed elsewhere (`score_features`). A frozen backbone is
    always in eval mode.

    Args:
        head: the MLP. backbone: a transformers model whose output has last_hidden_state. tokenizer: of the backbone.
        train_backbone: True trains the backbone's weights and saves them with the ranker.
        max_length: most tokens of question and rationale together. batch_tokens: most tokens of a batch when scoring.
    Raises:
        ValueError: backbone without tokenizer or the reverse, or `max_length` exceeds the backbone's positions.
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
            raise ValueError("Ranker: `backbone` and `tokenizer` must be given together, got only one of them")
        self.head, self.backbone, self.tokenizer = head, backbone, tokenizer
        self.train_backbone, self.max_length, self.batch_tokens = train_backbone, max_length, batch_tokens
        if backbone is None:
            return
        backbone.requires_grad_(train_backbone).eval()
        limit = getattr(backbone.config, "max_position_embeddings", None) or max_length
        if max_length > limit:
            raise ValueError(f"Ranker: `max_length` must be at most the backbone's {limit} positions, got {max_length}")
        self.encoder = PairEncoder(tokenizer, max_length)
        self.pad_id = padding_id(tokenizer, backbone)

    @classmethod
    def from_backbone(
        cls,
        model: str | os.PathLike[str] | nn.Module,
        tokenizer: Any = None,
        *,
        train_backbone: bool = False,
        max_length: int | None = None,
        hidden: int = 256,
        dropout: float = 0.5,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Ranker:
        """Return an untrained ranker over a transformers encoder or decoder.

        Args:
            model: folder or name of a model, or a loaded one (with `tokenizer`). Its own head is left out; of an
                encoder-decoder the encoder is taken.
            max_length: default 512, or fewer if the model has fewer positions.
            dtype: of a model loaded here; use float32 for a backbone that is trained.
            seed: of the head's initial weights.
        Raises:
            ValueError: a loaded `model` without `tokenizer`, or a model without an encoder-only class.
        """
        if isinstance(model, nn.Module):
            if tokenizer is None:
                raise ValueError("Ranker.from_backbone: `tokenizer` must be given with a loaded `model`, got None")
            backbone = _without_head(model)
        else:
            from transformers import AutoTokenizer

            backbone = _load_backbone(model, dtype)
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(os.fspath(model))
        config = cast(Any, backbone.config)
        positions = getattr(config, "max_position_embeddings", None)
        length = max_length or min(512, positions or 512)
        head = _fresh_head(config.get_text_config().hidden_size, hidden, dropout, seed)
        head.to(next(backbone.parameters()).device)
        return cls(head, backbone, tokenizer, train_backbone=train_backbone, max_length=length)

    @classmethod
    def for_features(cls, features: int, *, hidden: int = 256, dropout: float = 0.5, seed: int = 0) -> Ranker:
        """Return an untrained head alone, for features of width `features` that are computed elsewhere."""
        return cls(_fresh_head(features, hidden, dropout, seed))

    def train(self, mode: bool = True) -> Ranker:
        super().train(mode)
        if self.backbone is not None and not self.train_backbone:
            self.backbone.eval()
        return self

    def required_backbone(self) -> nn.Module:
        """Return the backbone; raise ValueError if there is none."""
        if self.backbone is None:
            raise ValueError("Ranker: `backbone` must be a model to read texts, got None; use score_features")
        return self.backbone

    def encode(self, questions: Sequence[str], rationales: Sequence[Sequence[str]]) -> list[list[Encoded]]:
        """Check and tokenise every rationale of every question."""
        backbone = self.required_backbone()
        check_groups(questions, rationales)
        groups = self.encoder(questions, rationales)
        for i, group in enumerate(groups):
            for item in group:
                check_token_ids("Ranker", f"rationales[{i}]", item.ids, backbone)
        return groups

    def logits(self, items: Sequence[Encoded]) -> torch.Tensor:
        """Return (n,) float32 logits of one batch; gradients flow to all trained weights."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.train_backbone):
            states = mean_states(self.required_backbone(), items, self.pad_id)
        return self.head(states)

    def features(
        self, questions: Sequence[str], rationales: Sequence[Sequence[str]], *, progress: bool = False
    ) -> list[torch.Tensor]:
        """Return for each question (K_q, F) float32 on the CPU, the input of the head.

        At most `batch_tokens` tokens are in memory at once.
        """
        backbone = self.required_backbone()
        groups = self.encode(questions, rationales)
        items = [item for group in groups for item in group]
        out = torch.empty(len(items), self.head.features)
        with (
            eval_mode(self),
            progress_bar(total=len(items), desc="encoding rationales", unit="rationale", shown=progress) as bar,
        ):
            for batch in batches_by_length(items, self.batch_tokens):
                out[batch] = mean_states(backbone, [items[i] for i in batch], self.pad_id).cpu()
                bar.update(len(batch))
        return list(out.split([len(group) for group in groups]))

    def score(
        self, questions: Sequence[str], rationales: Sequence[Sequence[str]], *, progress: bool = False
    ) -> list[torch.Tensor]:
        """Return for each question scores (K_q,) float32 in (0, 1), on the CPU; a higher score is more likely right.

        Args:
            questions: Q strings. rationales: for each question any number of strings.
        Raises:
            TypeError, ValueError: an argument is of another type or length, or the ranker has no backbone.
        """
        return self.score_features(self.features(questions, rationales, progress=progress))

    def score_features(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return scores as `score` does, from features (K_q, F) float of each question.

        Raises:
            ValueError: an entry is not such a tensor.
        """
        width = self.head.features
        for i, x in enumerate(features):
            if not isinstance(x, torch.Tensor) or x.ndim != 2 or x.shape[1] != width:
                got = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
                raise ValueError(f"Ranker: `features[{i}]` must be a tensor (K, {width}), got {got}")
        if not features:
            return []
        with eval_mode(self):
            logits = self.head(torch.cat(list(features)).to(self.head.outer.weight.device))
        scores = logits.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT).sigmoid().cpu()
        return list(scores.split([len(x) for x in features]))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Save head, tokenizer and configuration.

        A trained backbone is saved with its weights, a frozen one by its name and a fingerprint.

        Raises:
            ValueError: a frozen backbone was built in memory, so no name leads back to it.
        """
        from safetensors.torch import save_file

        folder = check_folder("Ranker.save_pretrained", "folder", folder)
        config: dict[str, Any] = {"format_version": FORMAT_VERSION, "head": self.head.sizes, "backbone": None}
        config |= {"max_length": self.max_length, "batch_tokens": self.batch_tokens}
        if self.backbone is not None:
            name = None if self.train_backbone else getattr(self.backbone, "name_or_path", "") or None
            if name is None and not self.train_backbone:
                raise ValueError(
                    "Ranker.save_pretrained: `backbone` must have a name_or_path to be found again by, got none; save "
                    "it and load it from there, or train it"
                )
            folder.mkdir(parents=True, exist_ok=True)
            dtype = str(next(self.backbone.parameters()).dtype).removeprefix("torch.")
            config["backbone"] = {"trained": self.train_backbone, "name": name, "dtype": dtype}
            if self.train_backbone:
                cast(Any, self.backbone).save_pretrained(folder / _BACKBONE)
            else:
                config["backbone"]["fingerprint"] = model_fingerprint(self.backbone)
            self.tokenizer.save_pretrained(folder / _TOKENIZER)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / _HEAD) as partial:
            save_file({k: v.contiguous().cpu() for k, v in self.head.state_dict().items()}, partial)
        # a process that is killed here leaves a head and a config that from_pretrained refuses together
        write_json(folder / _CONFIG, config | {"head_checksum": file_checksum(folder / _HEAD)})

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], *, backbone: str | os.PathLike[str] | None = None
    ) -> Ranker:
        """Load a ranker that `save_pretrained` wrote.

        Args:
            backbone: the folder of the frozen backbone, if it was moved.
        Raises:
            ValueError: `folder` holds no ranker or one of another format version, or the backbone is not the one that
                the head was trained on.
        """
        from safetensors.torch import load_file
        from transformers import AutoTokenizer

        folder = Path(folder)
        if not (folder / _CONFIG).is_file():
            raise ValueError(
                f"Ranker.from_pretrained: `folder` must hold a ranker, got {folder}, which has no {_CONFIG}"
            )
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        if config.get("format_version") != FORMAT_VERSION:
            found = config.get("format_version")
            raise ValueError(
                f"Ranker.from_pretrained: `folder` must hold a ranker of format version {FORMAT_VERSION}, got {folder} "
                f"of format version {found}"
            )
        recorded = config.get("head_checksum")  # rankers of earlier releases have none
        if recorded is not None and recorded != file_checksum(folder / _HEAD):
            raise ValueError(
                f"Ranker.from_pretrained: `folder` must hold the files of one save, got {folder}, whose {_HEAD} is not "
                f"the one that {_CONFIG} was written with; save the ranker again"
            )
        head = RankerHead(**config["head"])
        head.load_state_dict(load_file(folder / _HEAD))
        base = config["backbone"]
        if base is None:
            return cls(head, max_length=config["max_length"], batch_tokens=config["batch_tokens"]).eval()
        source = folder / _BACKBONE if base["trained"] else backbone or base["name"]
        loaded = _load_backbone(source, getattr(torch, base["dtype"]))
        if not base["trained"] and model_fingerprint(loaded) != base["fingerprint"]:
            raise ValueError(
                f"Ranker.from_pretrained: `backbone` must be the model that this head was trained on, got {source}, "
                "which is not the backbone of that training"
            )
        return cls(
            head, loaded, AutoTokenizer.from_pretrained(folder / _TOKENIZER), train_backbone=base["trained"],
            max_length=config["max_length"], batch_tokens=config["batch_tokens"],
        ).eval()  # fmt: skip


def check_groups(questions: Sequence[str], rationales: Sequence[Sequence[str]]) -> None:
    """Raise TypeError or ValueError unless these are Q strings and Q sequences of strings."""
    for name, value in (("questions", questions), ("rationales", rationales)):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError(
                f"Ranker: `{name}` must be a sequence with one entry per question, got {type(value).__name__}"
            )
    if len(questions) != len(rationales):
        raise ValueError(
            f"Ranker: `rationales` must have one sequence for each of {len(questions)} questions, got {len(rationales)}"
        )
    for i, (question, group) in enumerate(zip(questions, rationales, strict=True)):
        if not isinstance(question, str):
            raise TypeError(f"Ranker: `questions[{i}]` must be a string, got {type(question).__name__}")
        if isinstance(group, str) or not isinstance(group, Sequence) or not all(isinstance(r, str) for r in group):
            raise TypeError(f"Ranker: `rationales[{i}]` must be a sequence of strings, got {type(group).__name__}")
        check_whole_text("Ranker", f"questions[{i}]", question)
        for place, rationale in enumerate(group):
            check_whole_text("Ranker", f"rationales[{i}][{place}]", rationale)


def _fresh_head(features: int, hidden: int, dropout: float, seed: int) -> RankerHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RankerHead(features, hidden, dropout)


def _without_head(model: nn.Module) -> nn.Module:
    model = getattr(model, "base_model", model)
    if getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "decoder"):
        kind = type(model).__name__
        raise ValueError(
            f"Ranker.from_backbone: `model` must be an encoder or a decoder, got {kind}, which is both; pass its path, "
            "or a loaded encoder-only class"
        )
    return model


def _load_backbone(source: str | os.PathLike[str], dtype: torch.dtype) -> nn.Module:
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoConfig, AutoModel, AutoModelForTextEncoding

    config = AutoConfig.from_pretrained(os.fspath(source))
    encoder_only = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING  # T5 and similar families
    if config.is_encoder_decoder and not encoder_only:
        raise ValueError(
            f"Ranker.from_backbone: `model` must be an encoder or a decoder, got {source}: transformers has no "
            f"encoder-only class for {config.model_type}"
        )
    kind = AutoModelForTextEncoding if encoder_only else AutoModel
    return cast(nn.Module, kind.from_pretrained(os.fspath(source), dtype=dtype)).eval()
