"""What a composition weighs: parameters, the memory to expect, and the peak that was reached."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from calm_fast.hf import ComposedForCausalLM, compose
from calm_fast.hf.encoders import check_modes_given, encoder_from_config

_GIB = 1 << 30
_OPTIMIZER_BYTES = 12  # AdamW in float32: gradient and two moments


@dataclass(frozen=True)
class Part:
    """A model of a composition. name: "B" for the anchor, "A" for an augmenter ("A1", "A2" where there are several)."""

    name: str
    path: str
    family: str
    parameters: int
    bytes: int

    def record(self) -> dict[str, Any]:
        """Return the part for results.json."""
        return {"name": self.name, "path": self.path, "family": self.family, "parameters": self.parameters}

    def line(self) -> str:
        """Return the part as one line of text."""
        return f"{self.name:3} {self.path}: {self.family}, {self.parameters:,} parameters, {gib(self.bytes)}"


@dataclass(frozen=True)
class Weight:
    """What a composition holds, counted without loading a weight. model: the composition on the meta device."""

    parts: list[Part]
    trained: int
    trained_bytes: int
    model: ComposedForCausalLM

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return sum(part.bytes for part in self.parts) + self.trained_bytes

    def training(self, rows: int, tokens: int, checkpointing: bool) -> int:
        """Bytes to expect in training: weights, optimizer, and the bound on activations of `rows` x `tokens`."""
        kept = activation_bytes(self.model, rows, tokens, checkpointing)
        return self.weights + self.trained * _OPTIMIZER_BYTES + kept

    def lines(self) -> list[str]:
        """Return what is loaded and how much of it trains."""
        total = sum(part.parameters for part in self.parts) + self.trained
        share = 100 * self.trained / total
        pairs = [f"{a}->{b}" for _, a, b in self.model.pairs]
        return [
            *(part.line() for part in self.parts),
            f"A+B {len(pairs)} connections ({', '.join(pairs)}): {self.trained:,} parameters train, {share:.1f} %",
        ]


def names_of(augmenters: int) -> list[str]:
    """Return "A", or "A1", "A2", ... for several augmenters."""
    return ["A"] if augmenters == 1 else [f"A{i + 1}" for i in range(augmenters)]


def weigh(anchor: str, augmenters: Sequence[str], dtype: str, **options: Any) -> Weight:
    """Compose the models on the meta device, from their configs alone, and count.

    options: arguments of `compose`. Raises ValueError as `compose` does, before a weight is read.
    """
    models = []
    modes = [None, *check_modes_given(options.get("bidirectional"), len(augmenters))]
    for path, mode in zip((anchor, *augmenters), modes, strict=True):
        config = AutoConfig.from_pretrained(path)
        kept = torch.float32 if config.dtype is None else config.dtype
        chosen = kept if dtype == "auto" else getattr(torch, dtype)
        with torch.device("meta"):
            build: Any = AutoModelForCausalLM.from_config if mode is None else encoder_from_config
            models.append(build(config, dtype=chosen))
    sizes = [_part(name, path, model) for name, path, model in zip(
        ["B", *names_of(len(augmenters))], (anchor, *augmenters), models, strict=True)]  # fmt: skip
    # what the ids mean is compared when the models are loaded, with their tokenizers
    model = compose(models[0], models[1:], same_ids=True, probe=False, vocab_size=1, **options)
    assert isinstance(model, ComposedForCausalLM)  # the anchor is a causal LM
    return _weight(model, sizes)


def weigh_composition(model: ComposedForCausalLM, paths: Sequence[str]) -> Weight:
    """Count a loaded composition. paths: of the anchor and the augmenters."""
    names = ["B", *names_of(len(model.augmenters))]
    parts = (model.anchor, *model.augmenters)
    return _weight(model, [_part(*row) for row in zip(names, paths, parts, strict=True)])


def _part(name: str, path: str, model: nn.Module) -> Part:
    return Part(name, path, type(model).__name__, _count(model), _bytes(model))


def _weight(model: ComposedForCausalLM, parts: list[Part]) -> Weight:
    return Weight(parts, _count(model.connections), _bytes(model.connections), model)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def activation_bytes(model: ComposedForCausalLM, rows: int, tokens: int, checkpointing: bool = False) -> int:
    """Return a bound on what autograd keeps of a batch: logits, connections, the anchor's layers above the first one.

    It counts, per token, the inputs of every product and norm of a gated decoder layer; families without a gate keep
    less. checkpointing: of each layer only its input is kept, and one layer is recomputed at a time.
    """
    config = model.anchor.config.get_text_config(decoder=True)
    size = max(p.element_size() for p in model.anchor.parameters())
    width = int(config.hidden_size)
    inner = max(_sizes(getattr(config, "intermediate_size", None), 4 * width))
    heads = max(_sizes(getattr(config, "num_attention_heads", None), 1))
    vocab = int(config.vocab_size)
    layer = (16 * width + 5 * inner) * size + 6 * width * 4
    if getattr(model.anchor.config, "_attn_implementation", None) == "eager":
        layer += 2 * heads * tokens * 4
    depth = int(config.num_hidden_layers) - max(0, min(b for _, _, b in model.pairs))
    layers = layer + depth * width * size if checkpointing else depth * layer
    dims = [(int(c.anchor_dim), int(c.augmenter_dim)) for c in model.connections]  # type: ignore[arg-type]
    connection = 4 * sum(8 * own + 4 * read for own, read in dims)
    logits = vocab * (2 * size + 12)  # logits and their gradient; float32 copy, softmax and gradient of the loss
    return rows * tokens * (layers + connection + logits)


def _sizes(value: Any, default: int) -> list[int]:
    """Return the values of a config's field, which some families give per layer."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [int(v) for v in values if isinstance(v, int)] or [default]


def gib(size: float) -> str:
    """Return a size in bytes as text."""
    return f"{size / _GIB:.2f} GiB" if size >= _GIB / 10 else f"{size / (1 << 20):.1f} MiB"


def peak_bytes(device: torch.device) -> int | None:
    """Return the most memory that was in use: of the GPU for torch's tensors, of the CPU for the whole process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)
