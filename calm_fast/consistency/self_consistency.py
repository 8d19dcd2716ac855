"""SelfConsistency: sample rationales, extract and group their answers, score, vote."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from calm_fast import ops
from calm_fast._ops.voting.decide import RULES
from calm_fast.consistency.answers.equality import extract_answer
from calm_fast.consistency.answers.grouping import group_answers
from calm_fast.consistency.ranking.ranker import fingerprint
from calm_fast.consistency.sampling.prefix import PrefixReader, check_model, evaluating
from calm_fast.consistency.sampling.sampler import PromptBatch, Sample, Sampling
from calm_fast.consistency.sampling.scoring import score_sequences
from calm_fast.consistency.sampling.stopping import leader_probability
from calm_fast.consistency.voting.consensus import (
    Question,
    SelfConsistencyResult,
    as_questions,
    ranked,
    ready_questions,
    same_question,
    solution,
    voted,
)
from calm_fast.consistency.voting.journal import Journal
from calm_fast.consistency.voting.samples import read_rows
from calm_fast.core.checks import bad_type, check_finite_number
from calm_fast.core.progress import progress_bar

_CALLER = "SelfConsistency"
_READY_AT_ONCE = 256  # questions of ready samples between two writes


class SelfConsistency:
    """Answers questions by a vote over n sampled rationales (self-consistency, arXiv 2203.11171; ASC, 2312.12832).

    Each question's prompt is read once and continued n times, in batches over questions; answers are extracted,
    grouped, weighted and voted on. A sample depends on (seed, prompt, number of the sample) alone: neither what is
    sampled beside it nor a resume changes it, up to float rounding of batches of another shape.

    Args:
        model, tokenizer: a decoder-only transformers model, composed and dual-LoRA models included, and its tokenizer.
            Needed to sample, and to score ready samples without ranker.
        ranker: has score(questions, rationales) -> one tensor per question, as `Ranker`. Without one a sample's score
            is exp of its mean log-probability under the model: the normalised weighting of 2203.11171.
        n: samples a question. rule, lam: see `ops.vote`.
        prompt: question -> prompt text; a string with {question} in it, or a callable. None: the tokenizer's chat
            template with the question as the user's turn, without a template the question itself.
        pattern: last resort of `extract_answer`. equality: see `group_answers`; grouping: more of its arguments.
        confidence: stop sampling a question once `leader_probability` of its two most frequent answers reaches this;
            None draws all n. round_size: samples between two looks (default 4; n without confidence).
        batch_size: samples in memory at once. seed: of the samples. progress: show a bar.
        **sampling: max_new_tokens, temperature, top_k, top_p, stop, see `Sampling`.
    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came.
    """

    def __init__(
        self,
        model: Any = None,
        tokenizer: Any = None,
        ranker: Any = None,
        n: int = 16,
        rule: str = "adaptive",
        lam: float = 1.0,
        *,
        prompt: str | Callable[[str], str] | None = None,
        pattern: str | None = None,
        equality: str | Callable[[str, str], bool] = "math",
        grouping: Mapping[str, Any] | None = None,
        confidence: float | None = None,
        round_size: int | None = None,
        batch_size: int = 32,
        seed: int = 0,
        progress: bool = True,
        **sampling: Any,
    ) -> None:
        if model is not None:
            check_model(_CALLER, model)
        if (model is None) != (tokenizer is None):
            raise ValueError(f"{_CALLER}: `model` and `tokenizer` come together, or neither")
        if ranker is not None and not callable(getattr(ranker, "score", None)):
            raise TypeError(f"{_CALLER}: `ranker` must have score(questions, rationales), got {type(ranker).__name__}")
        if rule not in RULES:
            raise ValueError(f"{_CALLER}: `rule` must be 'count', 'weighted' or 'adaptive', got {rule!r}")
        check_finite_number(_CALLER, "lam", lam)
        if isinstance(prompt, str) and "{question}" not in prompt:
            raise ValueError(f"{_CALLER}: `prompt` must have {{question}} in it, got {prompt!r}")
        if not (prompt is None or isinstance(prompt, str) or callable(prompt)):
            raise bad_type(_CALLER, "prompt", "a string, a callable or None", prompt)
        if confidence is not None:
            check_finite_number(_CALLER, "confidence", confidence)
            if not 0.5 < confidence <= 1:
                raise ValueError(f"{_CALLER}: `confidence` must be above 1/2 and at most 1, got {confidence!r}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise bad_type(_CALLER, "seed", "an integer", seed)
        # what is used after sampling only: a mistake in it must not cost the samples
        extract_answer("", pattern)
        group_answers([], gold=None, equality=equality, **dict(grouping or {}))
        rounds = (n if confidence is None else min(n, 4)) if round_size is None else round_size
        for name, value in (("n", n), ("batch_size", batch_size), ("round_size", rounds)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{_CALLER}: `{name}` must be a positive integer, got {value!r}")
        options = [field.name for field in fields(Sampling)]
        if unknown := sorted(sampling.keys() - set(options)):
            raise TypeError(
                f"{_CALLER}: unknown option {', '.join(unknown)}; beside its own arguments it takes those of sampling: "
                f"{', '.join(options)}"
            )
        self.model, self.tokenizer, self.ranker = model, tokenizer, ranker
        self.n, self.rule, self.lam, self.seed = n, rule, lam, seed
        self.prompt, self.pattern, self.equality, self.grouping = prompt, pattern, equality, dict(grouping or {})
        self.confidence, self.round_size, self.batch_size = confidence, min(rounds, n), batch_size
        self.progress, self.sampling = progress, Sampling(**sampling)

    def __call__(
        self,
        questions: Sequence[str],
        references: Sequence[str | None] | None = None,
        *,
        out: str | os.PathLike | None = None,
    ) -> list[SelfConsistencyResult]:
        """Sample, score and vote.

        Args:
            questions: Q strings. references: the right answers or solutions, where known; they do not take part.
            out: a JSONL file to append each finished question to, and to resume from: questions it holds are not
                sampled again; gzipped where the name ends in .gz. It is refused where settings, models or questions
                differ from those it was made with.
        Returns:
            one result per question, in their order.
        """
        if self.model is None:
            raise ValueError(f"{_CALLER}: `model` and `tokenizer` are needed to sample; from_samples() does without")
        items = as_questions(questions, references)
        with (
            progress_bar(total=len(items), desc="sampling", unit="question", shown=self.progress) as bar,
            evaluating(self.model),
        ):
            return self._resumable(items, out, "sampled", bar, self._sampled)

    def from_samples(
        self, rows: str | os.PathLike | Iterable[Mapping[str, Any]], *, out: str | os.PathLike | None = None
    ) -> list[SelfConsistencyResult]:
        """The same vote over samples that are there already, from any engine.

        Args:
            rows: a JSONL file or rows: question, generated_answer (list of str), optional answer (the reference) and
                scores (a number or None per sample). Scores come from the ranker if there is one, else from the rows,
                else from the model; rule "count" does without.
            out: as in sampling.
        """
        rows = read_rows(rows, need_answer=False) if isinstance(rows, (str, os.PathLike)) else list(rows)
        items = ready_questions(rows)
        if self.rule != "count" and self.ranker is None and self.model is None:
            bare = next((item.index for item in items if item.scores is None), None)
            if bare is not None:
                raise ValueError(
                    f"{_CALLER}: rule {self.rule!r} needs scores and row {bare} has none: give `ranker`, `model` with "
                    "`tokenizer`, rows with scores, or rule='count'"
                )
        with progress_bar(total=len(items), desc="voting", unit="question", shown=self.progress) as bar:
            return self._resumable(items, out, "ready", bar, self._ready)

    # ---- resuming ---------------------------------------------------------------------------------------------------

    def _resumable(
        self, items: list[Question], out: Any, kind: str, bar: Any, work: Any
    ) -> list[SelfConsistencyResult]:
        """Results of all items: those in `out`, and what `work` yields for the rest, written as it comes."""
        if out is None:
            results = {result.index: result for done in work(items, bar) for result in done}
            return [results[item.index] for item in items]
        with Journal(out, self._settings(kind)) as journal:
            for index, row in journal.rows.items():
                if index >= len(items) or not same_question(items[index], row):
                    raise ValueError(
                        f"out: row {index} of {journal.file.name} answers another question; give another file"
                    )
            results = {index: SelfConsistencyResult.from_row(row) for index, row in journal.rows.items()}
            bar.update(len(results))
            for done in work([item for item in items if item.index not in results], bar):
                journal.append(result.to_row() for result in done)
                results |= {result.index: result for result in done}
        return [results[item.index] for item in items]

    def _settings(self, kind: str) -> dict[str, Any]:
        """All that a row depends on, as JSON."""
        common = {
            "kind": kind, "rule": self.rule, "lam": self.lam, "pattern": self.pattern,
            "equality": _name(self.equality), "ranker": _identity(self.ranker), "model": _identity(self.model),
            "prompt": _name(self.prompt), "timeout": self.grouping.get("timeout"),
        }  # fmt: skip
        if kind == "ready":
            return common
        drawn = {"n": self.n, "confidence": self.confidence, "round_size": self.round_size, "seed": self.seed}
        template = getattr(self.tokenizer, "chat_template", None) if self.prompt is None else None
        return {**common, **drawn, "chat_template": template, **vars(self.sampling)}

    # ---- sampling ---------------------------------------------------------------------------------------------------

    def _sampled(self, items: list[Question], bar: Any) -> Any:
        """Lists of results, as their questions finish."""
        reader = PrefixReader(self.model)
        together = max(1, self.batch_size // self.round_size) if reader.pads else 1
        for start in range(0, len(items), together):
            batch = items[start : start + together]
            prompts = [self._prompt_ids(item.text) for item in batch]
            for item in batch:
                item.rationales, item.answers, item.scores = [], [], []
            source = PromptBatch(reader, self.tokenizer, prompts, self.sampling)
            active = list(range(len(batch)))
            while active:
                self._round(source, batch, active)
                going = self._undecided(batch, active)
                finished = [batch[q] for q in active if q not in going]
                if finished:
                    yield self._vote(finished)
                    bar.update(len(finished))
                active = going

    def _round(self, source: PromptBatch, batch: list[Question], active: list[int]) -> None:
        """The next samples of every active question, batch_size at once."""
        wanted = []
        for q in active:
            have = len(batch[q].rationales)
            wanted += [(q, j) for j in range(have, min(have + self.round_size, self.n))]
        for start in range(0, len(wanted), self.batch_size):
            rows, numbers = zip(*wanted[start : start + self.batch_size], strict=True)
            for q, sample in zip(rows, source.sample(rows, numbers, self.seed), strict=True):
                text = self._text(sample, source.ends)
                batch[q].rationales.append(text)
                batch[q].answers.append(extract_answer(text, self.pattern))
                batch[q].scores.append(math.exp(sample.logprob / len(sample.tokens)))

    def _undecided(self, batch: list[Question], active: list[int]) -> list[int]:
        """Active questions that need more samples."""
        going = [q for q in active if len(batch[q].rationales) < self.n]
        if self.confidence is None or not going:
            return going
        groups = self._groups([batch[q] for q in going], None)
        counts = ops.vote(groups.answers, valid=groups.valid)
        top = counts.weight.round().long()
        sure = leader_probability(top, (counts.weight - counts.margin).round().long())
        return [
            q
            for q, p, votes in zip(going, sure.tolist(), top.tolist(), strict=True)
            if not votes or p < self.confidence
        ]

    def _prompt_ids(self, question: str) -> list[int]:
        template = getattr(self.tokenizer, "chat_template", None)
        if self.prompt is None and template is not None:
            turns = [{"role": "user", "content": question}]
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            made = self.prompt(question) if callable(self.prompt) else (self.prompt or "{question}")
            text = made if callable(self.prompt) else made.replace("{question}", question)
            ids = self.tokenizer(text)["input_ids"]
        if not ids:
            raise ValueError(f"{_CALLER}: the prompt of question {question!r} has no tokens")
        return list(ids)

    def _text(self, sample: Sample, ends: Sequence[int]) -> str:
        tokens = sample.tokens[:-1] if sample.tokens[-1] in ends else sample.tokens
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        for stop in self.sampling.stop:
            text = text.partition(stop)[0]
        return text

    # ---- scores and votes -------------------------------------------------------------------------------------------

    def _ready(self, items: list[Question], bar: Any) -> Any:
        for start in range(0, len(items), _READY_AT_ONCE):
            batch = items[start : start + _READY_AT_ONCE]
            for item in batch:
                item.answers = [extract_answer(text, self.pattern) for text in item.rationales]
            bare = [item for item in batch if item.scores is None]
            if self.rule != "count" and self.ranker is None and bare:
                prompts, texts = [self._prompt_ids(item.text) for item in bare], [item.rationales for item in bare]
                found = score_sequences(self.model, prompts, texts, tokenizer=self.tokenizer)
                for item, scores in zip(bare, found, strict=True):
                    item.scores = [None if math.isnan(x) else x for x in scores.mean.exp().tolist()]
            yield self._vote(batch)
            bar.update(len(batch))

    def _groups(self, items: list[Question], gold: list[str | None] | None) -> Any:
        answers = [item.answers for item in items]
        return group_answers(answers, gold=gold, equality=self.equality, **self.grouping)

    def _vote(self, items: list[Question]) -> list[SelfConsistencyResult]:
        if self.ranker is not None:
            ranked(items, self.ranker)
        gold = [solution(item.reference, self.pattern) for item in items]
        groups = self._groups(items, gold if any(text is not None for text in gold) else None)
        return voted(items, groups, gold, self.rule, self.lam)


def _name(value: Any) -> Any:
    """A setting as JSON: functions by their name."""
    return f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else value


def _identity(model: Any) -> str | None:
    """Class and a checksum of the weights."""
    if model is None:
        return None
    weights = f" {fingerprint(model)[:16]}" if isinstance(model, torch.nn.Module) else ""
    return type(model).__qualname__ + weights
