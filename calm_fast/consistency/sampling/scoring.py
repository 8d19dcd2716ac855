"""Log-probabilities of many completions of each prompt; the prompt is encoded once, and no logits are stored."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from calm_fast.consistency.sampling.boundary import Continuation
from calm_fast.consistency.sampling.head import find_linear_head, head_input, probe_token
from calm_fast.consistency.sampling.prefix import PrefixReader, branch, check_model
from calm_fast.core.checks import bad_type
from calm_fast.core.eval_mode import eval_mode
from calm_fast.core.progress import progress_bar
from calm_fast.core.token_ids import check_token_ids, table_rows
from calm_fast.core.token_ids import prompt_ids as text_prompt_ids
from calm_fast.hf.causality import check_causal
from calm_fast.modules.fixed_weights import fixed_weights

_CALLER = "score_sequences"
_LOGITS_AT_ONCE = 2**26  # elements; for heads that are not linear
Text = str | Sequence[int]


@dataclass(frozen=True)
class SequenceScores:
    """Scores of the K completions of one prompt, in order, on the CPU.

    sum (K,) float64: log p(completion | prompt), 0 for an empty completion. mean (K,) float64: sum / tokens, NaN for an
    empty completion, which `ops.vote` reads as "no score". tokens (K,) int64. token_logprobs, token_entropies: one
    float32 tensor (tokens,) for each completion, if requested; an entropy is that of the whole distribution, in nats.
    """

    sum: torch.Tensor
    mean: torch.Tensor
    tokens: torch.Tensor
    token_logprobs: list[torch.Tensor] | None = None
    token_entropies: list[torch.Tensor] | None = None


def score_sequences(
    model: PreTrainedModel,
    prompts: Sequence[Text],
    completions: Sequence[Sequence[Text]],
    *,
    tokenizer: Any = None,
    max_tokens: int = 8192,
    share_prompt: bool = True,
    return_tokens: bool = False,
    return_entropy: bool = False,
    progress: bool = False,
    impl: str = "auto",
) -> list[SequenceScores]:
    """Return the sum and mean log-probability of K completions of each prompt.

        sum_k = sum_t log p(c_kt | prompt, c_k1 ... c_k,t-1);   mean_k = sum_k / tokens_k

    Each prompt is encoded once, alone, and the completions continue its cache in batches of similar length. The states
    of the last layer go to `ops.linear_logprob`, so (T, V) logits never exist. The model runs in eval mode without
    gradients. Models with a recurrent state (Mamba, RWKV, hybrids) read prompt + completion again for each completion.
    A head that is not one linear layer with an optional factor and soft cap computes its logits, 256 MiB at a time.

    Args:
        model: a decoder-only transformers model, composed and dual-LoRA models included.
        prompts: token ids or strings, with at least one token each. completions: for each prompt any number of them.
        tokenizer: for strings. A prompt gets the special tokens that begin a text, once, and a completion none (add the
            end token's text to score it). A completion's ids are those that follow the prompt's in the ids of prompt +
            completion. If these do not begin with the prompt's ids, because a token spans the boundary, the completion
            is tokenized as the middle of a text, without a space before it: the prompt is never re-tokenized, as in
            generation. Pass ids for sampled completions.
        max_tokens: most rows x (prompt + longest completion) of a batch, which has at least one row; it bounds memory
            for any K.
        share_prompt: False reads the prompt again for every completion.
        return_tokens, return_entropy: also return the log-probability, or the entropy, at each token.
        impl: of `ops.linear_logprob`.
    Returns:
        one SequenceScores for each prompt.
    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came. An empty
            prompt is an error: a first token must be conditioned on something, such as the begin-of-sequence token.
    """
    check_model(_CALLER, model)
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise ValueError(f"{_CALLER}: `max_tokens` must be a positive integer, got {max_tokens!r}")
    pairs = _token_ids(model, tokenizer, prompts, completions)
    results = []
    with eval_mode(model), fixed_weights(model):
        scorer = _Scorer(model, max_tokens, share_prompt, return_entropy, impl)
        for prompt, rows in progress_bar(pairs, desc="scoring", unit="prompt", shown=progress):
            logprobs, entropies = scorer.score(prompt, rows)
            tokens = torch.tensor([len(row) for row in rows], dtype=torch.int64)
            total = torch.tensor([row.double().sum().item() for row in logprobs], dtype=torch.float64)
            mean = total / tokens  # 0 / 0 is NaN
            kept = (logprobs if return_tokens else None, entropies if return_entropy else None)
            results.append(SequenceScores(total, mean, tokens, *kept))
    return results


class _Scorer:
    """Scores completions with one model, prompt by prompt."""

    def __init__(self, model: PreTrainedModel, max_tokens: int, share: bool, entropy: bool, impl: str) -> None:
        self.reader = PrefixReader(model, share)
        self.max_tokens, self.entropy, self.impl = max_tokens, entropy, impl
        check_causal(_CALLER, "model", model, self.reader)
        token = probe_token(model)
        self.head = find_linear_head(model, lambda: self.reader(token))
        if self.head is None:
            self.max_tokens = min(max_tokens, max(1, _LOGITS_AT_ONCE // table_rows("score_sequences", "model", model)))

    def score(self, prompt: list[int], rows: list[list[int]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return log-probabilities and entropies (empty unless requested) of each row's tokens."""
        results: list[Any] = [(torch.empty(0), torch.empty(0)) for _ in rows]
        nonempty = [k for k, row in enumerate(rows) if row]
        cache = first = None
        if self.reader.shares and nonempty:
            cache = self.reader.new_cache()
            first = self._states(torch.tensor([prompt]), cache, 0, 1, len(prompt))
            if not self.reader.check_filled(cache, len(prompt)):
                cache = first = None
        for batch in _batches(nonempty, rows, len(prompt), self.max_tokens):
            states = self._continue(prompt, [rows[k] for k in batch], cache, first)
            for k, result in zip(batch, self._read(states, [rows[k] for k in batch]), strict=True):
                results[k] = result
        return [logprob for logprob, _ in results], [entropy for _, entropy in results]

    def _continue(
        self, prompt: list[int], rows: list[list[int]], cache: Any, first: torch.Tensor | None
    ) -> torch.Tensor:
        """Return states (B, longest, d or V); state t of a row predicts its token t, and padding follows its end."""
        # in a causal model no real token sees the padding after it, so no mask is needed
        longest = max(map(len, rows))
        padded = [row[:-1] + row[-1:] * (longest - len(row)) for row in rows]
        fed = torch.tensor(padded, dtype=torch.int64).reshape(len(rows), longest - 1)
        if cache is None or first is None:
            whole = torch.cat([torch.tensor([prompt]).expand(len(rows), -1), fed], dim=1)
            return self._states(whole, None, 0, longest, len(prompt))
        first = first.expand(len(rows), -1, -1)
        if longest == 1:
            return first
        # every batch continues a copy, so that the prompt's own cache holds the prompt only
        twin = branch(cache, torch.zeros(len(rows), dtype=torch.int64, device=self.reader.model.device))
        return torch.cat([first, self._states(fed, twin, len(prompt), longest - 1, len(prompt))], dim=1)

    def _states(self, ids: torch.Tensor, cache: Any, past: int, keep: int, prompt: int) -> torch.Tensor:
        """Return the states before the head, or the logits, at the last `keep` of ids (B, M); prompt: its length."""
        ids = ids.to(self.reader.model.device)
        if self.head is None:
            return self.reader(ids, cache=cache, past=past, keep=keep, prompt_length=prompt).logits[:, -keep:]
        states = head_input(self.head, lambda: self.reader(ids, cache=cache, past=past, prompt_length=prompt))
        if states.shape[:2] != ids.shape:
            kind = type(self.reader.model).__name__
            raise RuntimeError(
                f"{_CALLER}: `model` must give its head one state for each token, got {kind}, which gives states of "
                f"shape {tuple(states.shape)} for {tuple(ids.shape)} tokens"
            )
        return states[:, -keep:]

    def _read(self, states: torch.Tensor, rows: list[list[int]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        lengths = [len(row) for row in rows]
        real = torch.arange(states.shape[1])[None] < torch.tensor(lengths)[:, None]
        flat = states[real.to(states.device)]
        targets = torch.tensor([token for row in rows for token in row], device=flat.device)
        if self.head is not None:
            found = self.head.logprobs(flat, targets, return_entropy=self.entropy, impl=self.impl)
            logprobs, entropies = found if self.entropy else (found, found[:0])
        else:
            table = flat.float().log_softmax(-1)
            logprobs = table.gather(1, targets[:, None])[:, 0]
            entropies = torch.special.entr(table.exp()).sum(-1) if self.entropy else logprobs[:0]
        parts = logprobs.float().cpu().split(lengths)
        others = entropies.float().cpu().split(lengths) if self.entropy else [torch.empty(0)] * len(rows)
        return zip(parts, others, strict=True)


def _batches(nonempty: list[int], rows: list[list[int]], past: int, max_tokens: int) -> Iterator[list[int]]:
    """Yield indices of rows of similar length, longest first: rows x (past + longest) <= max_tokens, or one row."""
    order = sorted(nonempty, key=lambda k: (-len(rows[k]), k))
    start = 0
    while start < len(order):
        count = max(1, max_tokens // (past + len(rows[order[start]])))
        yield order[start : start + count]
        start += count


def _token_ids(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[Text], completions: Sequence[Sequence[Text]]
) -> list[tuple[list[int], list[list[int]]]]:
    for name, value in (("prompts", prompts), ("completions", completions)):
        if isinstance(value, str) or not hasattr(value, "__len__"):
            raise bad_type(_CALLER, name, "a sequence with one entry for each prompt", value)
    if len(prompts) != len(completions):
        raise ValueError(
            f"{_CALLER}: `completions` must have a list of completions for each of the {len(prompts)} prompts, got "
            f"{len(completions)}"
        )
    pairs = []
    after = Continuation(tokenizer)
    for i, (prompt, rows) in enumerate(zip(prompts, completions, strict=True)):
        if isinstance(rows, str) or not hasattr(rows, "__len__"):
            raise bad_type(_CALLER, f"completions[{i}]", "a list of completions", rows)
        ids = _encode(model, tokenizer, prompt, f"prompts[{i}]")
        if not ids:
            raise ValueError(
                f"{_CALLER}: `prompts[{i}]` must have at least one token to condition the first token on, got none; "
                "begin it with the model's begin-of-sequence token"
            )
        tokenize = functools.partial(after.ids, prompt=prompt if isinstance(prompt, str) else None, prompt_ids=ids)
        named = [(row, f"completions[{i}][{k}]") for k, row in enumerate(rows)]
        pairs.append((ids, [_encode(model, tokenizer, row, name, tokenize) for row, name in named]))
    return pairs


def _encode(
    model: PreTrainedModel,
    tokenizer: Any,
    text: Text,
    name: str,
    tokenize: Callable[[str], list[int]] | None = None,
) -> list[int]:
    """Return checked ids; tokenize: for a text that is no prompt."""
    if not isinstance(text, str):
        if not hasattr(text, "__iter__") or (isinstance(text, torch.Tensor) and text.dim() != 1):
            raise bad_type(_CALLER, name, "a string or a sequence of token ids", text)
        ids = text.tolist() if hasattr(text, "tolist") else list(text)
        if not all(type(token) is int for token in ids):
            raise ValueError(f"{_CALLER}: `{name}` must hold token ids, which are integers, got {ids[:8]}...")
    elif tokenizer is None:
        raise ValueError(f"{_CALLER}: `tokenizer` must be given for strings, got None, and `{name}` is a string")
    else:
        ids = text_prompt_ids(tokenizer, text) if tokenize is None else tokenize(text)
    check_token_ids(_CALLER, name, ids, model)
    return ids
