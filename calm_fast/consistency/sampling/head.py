"""The LM head of a causal language model as arguments of the vocabulary ops, measured on the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from calm_fast import ops
from calm_fast.core.threads import in_this_thread
from calm_fast.core.token_ids import table_rows

# names under which configs keep a factor of the logits (some multiply, some divide) and their soft cap
_SCALES = ("logit_scale", "logits_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
_CAPS = ("final_logit_softcapping", "final_logit_softcap", "logits_soft_cap")
_PROBE_SIZE = 50.0  # logits of the second probe reach this, far enough for a cap to show


@dataclass(frozen=True)
class LinearHead:
    """An LM head with logits = softcap(hidden weight^T + bias) / temperature, as `ops.linear_logprob` takes them."""

    module: nn.Linear
    temperature: float
    softcap: float | None

    def logprobs(self, hidden: torch.Tensor, targets: torch.Tensor, **options: Any) -> Any:
        """Return the log-probability of targets (T,) from hidden (T, d); options of `ops.linear_logprob`."""
        weight = self.module.weight
        hidden = hidden.to(device=weight.device, dtype=weight.dtype)
        bias = None if self.module.bias is None else self.module.bias.to(weight.dtype)
        return ops.linear_logprob(
            hidden, weight, targets.to(weight.device), bias=bias, temperature=self.temperature, softcap=self.softcap,
            **options,
        )  # fmt: skip

    def nce(
        self,
        student: torch.Tensor,
        nat: torch.Tensor,
        neg: torch.Tensor,
        targets: torch.Tensor,
        seq_ids: torch.Tensor,
        **options: Any,
    ) -> torch.Tensor:
        """Return the NCE loss of hidden states (T, d) under this head; options of `ops.linear_nce`.

        The op's own temperature belongs to the distillation alone, so the head's factor goes into states, bias and cap:
        with u = W h + b, s tanh(u / s) / T = (s / T) tanh((u / T) / (s / T)) for the softcap s and the temperature T.
        """
        weight, softcap = self.module.weight, self.softcap
        student, nat, neg = (states.to(device=weight.device, dtype=weight.dtype) for states in (student, nat, neg))
        targets, seq_ids = targets.to(weight.device), seq_ids.to(weight.device)
        bias: torch.Tensor | None = None if self.module.bias is None else self.module.bias.to(weight.dtype)
        if self.temperature != 1.0:
            student, nat, neg = (states / self.temperature for states in (student, nat, neg))
            bias = None if bias is None else bias / self.temperature
            softcap = None if softcap is None else softcap / self.temperature
        return ops.linear_nce(student, nat, neg, weight, targets, seq_ids, bias=bias, softcap=softcap, **options)


@contextmanager
def _record_input(head: nn.Module, probe: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Collect the inputs of `head`, and replace each by `probe` of it: no (T, V) logits within the block.

    Other threads may run the model meanwhile; their calls are left alone.
    """
    seen: list[torch.Tensor] = []

    def replace(module: nn.Module, args: tuple[Any, ...]) -> Any:
        seen.append(args[0])
        return (probe(args[0]), *args[1:])

    handle = head.register_forward_pre_hook(in_this_thread(replace))
    try:
        yield seen
    finally:
        handle.remove()


def head_input(head: LinearHead, run: Callable[[], Any]) -> torch.Tensor:
    """Return the states (B, M, d) that enter the LM head in `run()`, which computes a single row of logits."""
    with _record_input(head.module, lambda states: states[:1, :1]) as seen:
        run()
    return seen[0]


def probe_token(model: PreTrainedModel, where: str = "score_sequences", name: str = "model") -> torch.Tensor:
    """Return (1, 1) int64, a token that is not padding, which some families warn about.

    Raises ValueError, of argument `name` of `where`, for a model without one table of token embeddings (MusicGen).
    """
    # CodeGen's, CPM-Ant's and RWKV's configs have no such attribute
    pad = getattr(model.config.get_text_config(decoder=True), "pad_token_id", None)
    rows = table_rows(where, name, model)
    return torch.tensor([[1 if pad == 0 and rows > 1 else 0]], device=model.device)


def find_linear_head(model: PreTrainedModel, run: Callable[[], Any]) -> LinearHead | None:
    """Return the head of `model` if it is one linear layer, an optional factor and an optional soft cap; else None.

    Args:
        run: a forward of `model` on one token (`probe_token`) that returns its output.
    The factor and the cap are measured. Two probes replace the layer's input, the second scaled up to where a cap shows
    in its logits, and the model's own logits must be those of factor and cap, to the rounding of their dtype. The
    candidates are the values that the config names, in every combination.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter or not head.weight.is_floating_point():
        return None
    products: list[torch.Tensor] = []
    listener = head.register_forward_hook(in_this_thread(lambda module, args, output: products.append(output)))

    def probe(states: torch.Tensor) -> torch.Tensor:
        # not the state itself: a padding token's may be zero, and zero logits show nothing
        rows = torch.randn(1, 1, states.shape[-1], generator=torch.Generator().manual_seed(0))
        rows = rows.to(device=states.device, dtype=states.dtype)
        logits = nn.functional.linear(rows.to(head.weight.dtype), head.weight, head.bias)
        return torch.cat([rows, rows * (_PROBE_SIZE / logits.abs().max()).to(rows.dtype)], dim=1)

    try:
        with _record_input(head, probe) as seen:
            logits = run().logits
    finally:
        listener.remove()
    if len(seen) != 1 or len(products) != 1 or seen[0].shape[:2] != (1, 1) or logits.shape != products[0].shape:
        return None
    product, logits = products[0], logits.to(products[0].device)
    unit = max(torch.finfo(product.dtype).eps, torch.finfo(logits.dtype).eps)
    product, logits = product.double(), logits.double()
    if not (product.isfinite().all() and logits.isfinite().all() and product.abs().amax() > 0):
        return None
    for scale, cap in _candidates(model):
        expected = product * scale if cap is None else cap * torch.tanh(product * scale / cap)
        # a scaling and a cap round at most four times in the model's dtype, each by at most half a unit
        if (expected - logits).abs().max() <= 2 * unit * expected.abs().max():
            return LinearHead(head, 1 / scale, None if cap is None else cap / scale)
    return None


def _candidates(model: PreTrainedModel) -> Iterator[tuple[float, float | None]]:
    """Yield (factor, cap) of the logits, those that the config names first."""
    config = model.config.get_text_config(decoder=True)

    def config_values(names: tuple[str, ...]) -> list[float]:
        values = [getattr(config, name, None) for name in names]
        return [float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0]

    scales = [factor for value in config_values(_SCALES) for factor in (value, 1 / value)]
    for cap in (*config_values(_CAPS), None):
        for scale in dict.fromkeys((*scales, 1.0)):
            yield scale, cap
