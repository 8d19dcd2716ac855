"""lm-evaluation-harness with calm_fast's models: ``python -m calm_fast.lm_eval run --model calm_fast ...``.

The arguments are those of ``lm_eval``. Importing this module makes compositions loadable there and registers the model
"calm_fast" (docs/lm_eval.md).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import PreTrainedModel

import calm_fast.hf  # noqa: F401  registers compositions in transformers' Auto classes
from calm_fast.core.checks import bad_value
from calm_fast.hf.dual_lora_files import load_dual_lora
from calm_fast.hf.positions import most_positions

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as problem:
    raise ModuleNotFoundError(f"calm_fast.lm_eval: {problem}; pip install 'lm-eval[hf]>=0.4.13'") from problem

_NAME = "lm_eval model calm_fast"
Request = tuple[Any, list[int], list[int]]


@register_model("calm_fast")
class CalmFastLM(HFLM):
    """lm-eval's "hf" model for compositions and dual-LoRA models.

    The model "hf" reads a context and its continuation as one prompt, with the padding of the batch behind them. An
    augmenter that reads text of its own (another tokenizer, or bidirectional) would then read across the end of the
    context, and padding as text: scores would depend on the batch. Here such a composition gets the mask and the length
    of each context, so that scores are those of `score_sequences`. All other models go lm-eval's own way.

    Args:
        pretrained: a composition, the base of a dual-LoRA model or any causal model; a path or a loaded model.
        dual_lora: the folder of `save_dual_lora`, whose layers are added to `pretrained`.
        kwargs: of lm-eval's "hf".
    Raises:
        ValueError: `dual_lora` with a loaded model, or batch_size "auto" over an augmenter with text of its own.
    """

    def __init__(self, pretrained: str | PreTrainedModel, dual_lora: str | None = None, **kwargs: Any) -> None:
        self._dual_lora = dual_lora
        self._length_given = kwargs.get("max_length") is not None
        if dual_lora is not None and not isinstance(pretrained, str):
            raise bad_value(_NAME, "dual_lora", "None with a loaded model", f"{dual_lora!r}. Call load_dual_lora on it")
        super().__init__(pretrained=pretrained, **kwargs)
        if self._own_texts and str(kwargs.get("batch_size", 1)).startswith("auto"):
            expected = "a number, because an augmenter of this composition reads text of its own"
            raise bad_value(_NAME, "batch_size", expected, repr(kwargs["batch_size"]))

    @property
    def _own_texts(self) -> bool:
        return bool(getattr(self.model, "aligned", False))

    @property
    def max_length(self) -> int:
        """The tokens of the longest text: those of the part that has the fewest positions, unless the user set it."""
        longest, limit = int(super().max_length), most_positions(self.model)
        return longest if self._length_given or limit is None else min(longest, limit)

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        super()._create_model(*args, **kwargs)
        if self._dual_lora is not None:
            load_dual_lora(self.model, self._dual_lora)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return (sum of log-probabilities, whether greedy decoding gives them) of each continuation."""
        if not self._own_texts or self.backend != "causal":
            found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return found
        answers: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        size = int(override_bs or self.batch_size)
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            for i, answer in zip(batch, self._score([requests[i] for i in batch]), strict=True):
                answers[i] = answer
                if requests[i][0] is not None:  # parts of a text that is scored as a whole have no key
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
        return [answers[i] for i in range(len(requests))]

    @torch.no_grad()
    def _score(self, batch: list[Request]) -> list[tuple[float, bool]]:
        # a text that is too long loses its beginning, as in lm-eval
        kept = [((context + own)[-(self.max_length + 1) :][:-1], own) for _, context, own in batch]
        lengths = [len(ids) for ids, _ in kept]
        contexts = [length + 1 - len(own) for length, (_, own) in zip(lengths, kept, strict=True)]
        if min(contexts) < 1:
            longest = max(len(own) for _, own in kept)
            raise bad_value(
                _NAME, "max_length", f"longer than the continuation of {longest} tokens", f"{self.max_length}"
            )
        ids = torch.zeros(len(kept), max(lengths), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, (own_ids, _) in enumerate(kept):
            ids[row, : len(own_ids)], mask[row, : len(own_ids)] = torch.tensor(own_ids), 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        ends = torch.tensor(contexts, device=self.device)
        with torch.autocast(
            self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
        ):
            logits = self.model(ids, attention_mask=mask, prompt_length=ends, use_cache=False).logits
        found = []
        for row, (first, (_, own)) in enumerate(zip(contexts, kept, strict=True)):
            targets = torch.tensor(own, device=logits.device)
            scores = logits[row, first - 1 : first - 1 + len(own)].float().log_softmax(-1)
            greedy = bool((scores.argmax(-1) == targets).all())
            found.append((float(scores.gather(1, targets[:, None]).sum()), greedy))
        return found


if __name__ == "__main__":
    sys.exit(cli_evaluate())
