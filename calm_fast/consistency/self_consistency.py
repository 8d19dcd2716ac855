"""SelfConsistency: sample rationales, extract and group their answers, score, vote."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

from calm_fast import ops
from calm_fast._ops.voting.decide import RULES
from calm_fast.consistency.answers.extraction import extract_answer
from calm_fast.consistency.answers.gold import gold_answer
from calm_fast.consistency.answers.grouping import Groups, group_answers
from calm_fast.consistency.endpoint.asking import asked
from calm_fast.consistency.endpoint.client import Drawn, Endpoint
from calm_fast.consistency.identity import dual_lora_modes, model_identity, setting_name, vocabulary_checksum
from calm_fast.consistency.sampling.padding import leaves_padding_out, prompt_batches
from calm_fast.consistency.sampling.prefix import PrefixReader, check_model
from calm_fast.consistency.sampling.prompt import Prompt, chosen_form
from calm_fast.consistency.sampling.sampler import PromptBatch, Sample, Sampling
from calm_fast.consistency.sampling.scoring import score_sequences
from calm_fast.consistency.sampling.stopping import leader_probability
from calm_fast.consistency.voting.consensus import (
    Question,
    SelfConsistencyResult,
    add_ranker_scores,
    new_questions,
    questions_of_rows,
    same_question,
    vote_results,
)
from calm_fast.consistency.voting.journal import Journal
from calm_fast.consistency.voting.samples import read_rows
from calm_fast.consistency.voting.weights import check_scores_are
from calm_fast.core.checks import bad_type, check_finite_number
from calm_fast.core.eval_mode import eval_mode
from calm_fast.core.progress import progress_bar
from calm_fast.core.token_ids import check_token_ids
from calm_fast.modules.fixed_weights import fixed_weights

_CALLER = "SelfConsistency"
_VOTE_AT_ONCE = 256  # questions of existing samples between two writes

_Work = Callable[[list[Question], Any], Iterator[list[SelfConsistencyResult]]]


class SelfConsistency:
    """Answers questions by a vote over n sampled rationales (self-consistency, arXiv 2203.11171; ASC, 2312.12832).

    Each question's prompt is read once and continued n times, in batches over questions. The answers are extracted,
    grouped, weighted and voted on. A sample depends on (seed, prompt, index of the sample) alone: neither the other
    samples of a batch nor a resume changes it, up to float rounding in batches of another shape.

    Args:
        model, tokenizer: a decoder-only transformers model, composed and dual-LoRA models included, and its tokenizer.
            Required to sample, and to score existing samples without a ranker. Or an `Endpoint` without a tokenizer, to
            sample from a server.
        ranker: an object with score(questions, rationales) -> one tensor per question, such as `Ranker`. Without one
            the score of a sample is exp of its mean log-probability under the model, the normalised weighting of
            2203.11171.
        n: samples per question. rule, lam: see `ops.vote`.
        prompt: makes the prompt of a question: "chat" (the tokenizer's chat template with the question as the user's
            turn), "plain" (the question and a newline), a string with {question} in it, a function that returns a text,
            token ids or the turns of a chat, or the pathlib.Path of an adapter that `nat` trained, for the form it was
            trained with. None = the form that `model` was trained with, if it is known; else "chat", or "plain" without
            a template.
        system: a system turn before the question. chat_template_kwargs: variables for the chat template, such as
            {"enable_thinking": False}. Both are refused where no chat template makes the prompts.
        pattern: last resort of `extract_answer`. equality: see `group_answers`. grouping: its other arguments.
        confidence: stop sampling a question once `leader_probability` of its two most frequent answers reaches this;
            None = draw all n. round_size: samples between two checks (default 4; n without confidence).
        batch_size: most samples in memory at once. seed: of the samples. progress: show a bar.
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
        prompt: Prompt = None,
        system: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
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
        remote = model if isinstance(model, Endpoint) else None
        if remote is not None and tokenizer is not None:
            raise ValueError(f"{_CALLER}: `tokenizer` must be None with an Endpoint, whose server has its own, got one")
        if model is not None and remote is None:
            check_model(_CALLER, model)
        if remote is None and (model is None) != (tokenizer is None):
            raise ValueError(f"{_CALLER}: `model` and `tokenizer` must be given together, got only one of them")
        if ranker is not None and not callable(getattr(ranker, "score", None)):
            raise TypeError(f"{_CALLER}: `ranker` must have score(questions, rationales), got {type(ranker).__name__}")
        if rule not in RULES:
            raise ValueError(f"{_CALLER}: `rule` must be 'count', 'weighted' or 'adaptive', got {rule!r}")
        check_finite_number(_CALLER, "lam", lam)
        if remote is not None:
            self.form = remote.form(prompt, system, chat_template_kwargs)
        else:
            self.form = chosen_form(
                prompt, model, tokenizer, _CALLER, system=system, chat_template_kwargs=chat_template_kwargs
            )
        if confidence is not None:
            check_finite_number(_CALLER, "confidence", confidence)
            if not 0.5 < confidence <= 1:
                raise ValueError(f"{_CALLER}: `confidence` must be above 1/2 and at most 1, got {confidence!r}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise bad_type(_CALLER, "seed", "an integer", seed)
        # arguments that are used after sampling: check them now, so that a mistake costs no samples
        extract_answer("", pattern)
        group_answers([], gold=None, equality=equality, **dict(grouping or {}))
        rounds = (n if confidence is None else min(n, 4)) if round_size is None else round_size
        for name, value in (("n", n), ("batch_size", batch_size), ("round_size", rounds)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{_CALLER}: `{name}` must be a positive integer, got {value!r}")
        options = [field.name for field in fields(Sampling)]
        if unknown := sorted(sampling.keys() - set(options)):
            raise TypeError(
                f"{_CALLER}: unknown option {', '.join(unknown)}; besides its own arguments it takes those of "
                f"sampling: {', '.join(options)}"
            )
        self.model, self.tokenizer, self.ranker, self.remote = model, tokenizer, ranker, remote
        self.n, self.rule, self.lam, self.seed = n, rule, lam, seed
        self.pattern, self.equality, self.grouping = pattern, equality, dict(grouping or {})
        self.confidence, self.round_size, self.batch_size = confidence, min(rounds, n), batch_size
        self.progress, self.sampling = progress, Sampling(**sampling)

    def __call__(
        self,
        questions: Sequence[str],
        references: Sequence[str | None] | None = None,
        *,
        out: str | os.PathLike[str] | None = None,
    ) -> list[SelfConsistencyResult]:
        """Sample rationales, score them and vote.

        Args:
            questions: Q strings. references: for each question the gold answer or a solution, or None; they do not
                influence the vote.
            out: a JSONL file to which each finished question is appended, and from which a second call resumes:
                questions in it are not sampled again. It is gzipped if its name ends in .gz.
        Returns:
            one result for each question, in order.
        Raises:
            TypeError, ValueError: an argument is wrong, or `out` was made with other settings, models or questions.
            RuntimeError: another process writes `out`.
        """
        if self.model is None:
            raise ValueError(
                f"{_CALLER}: `model` and `tokenizer` must be given to sample, got None; from_samples() needs none"
            )
        items = new_questions(questions, references)
        with (
            progress_bar(total=len(items), desc="sampling", unit="question", shown=self.progress) as bar,
            contextlib.ExitStack() as stack,
        ):
            if self.remote is not None:
                return self._resume(items, out, "sampled", bar, self._ask_and_vote)
            stack.enter_context(eval_mode(self.model))
            stack.enter_context(fixed_weights(self.model))
            return self._resume(items, out, "sampled", bar, self._sample_and_vote)

    def from_samples(
        self,
        rows: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
        *,
        out: str | os.PathLike[str] | None = None,
        scores_are: str = "weights",
    ) -> list[SelfConsistencyResult]:
        """Vote over existing samples, from any engine.

        Args:
            rows: a JSONL file or rows: question, generated_answer (list of str), optional answer (the reference) and
                scores (for each sample a number or None). Scores come from the ranker if there is one, else from the
                rows, else from the model; rule "count" needs none.
            out: as in a call.
            scores_are: what the rows' scores are: "weights" of at least 0, or "log" for log-probabilities, whose
                weights are exp(score - largest score of the question). Results keep the scores as they are given.
        Returns, raises:
            as a call.
        """
        check_scores_are(_CALLER, scores_are)
        if scores_are != "weights" and self.ranker is not None:
            raise ValueError(
                f"{_CALLER}: `scores_are` must be 'weights' with a ranker, whose scores are weights, got {scores_are!r}"
            )
        rows = read_rows(rows, need_answer=False) if isinstance(rows, (str, os.PathLike)) else list(rows)
        items = questions_of_rows(rows)
        if self.rule != "count" and self.ranker is None and (self.model is None or self.remote is not None):
            without = next((item.index for item in items if item.scores is None), None)
            if without is not None:
                raise ValueError(
                    f"{_CALLER}: `rule` must be 'count' without scores, got {self.rule!r}, and row {without} has none; "
                    "give `ranker`, `model` with `tokenizer`, or rows with scores"
                )
        with progress_bar(total=len(items), desc="voting", unit="question", shown=self.progress) as bar:
            work = functools.partial(self._vote_over_existing, scores_are=scores_are)
            return self._resume(items, out, "ready", bar, work, scores_are)

    # ---- resuming ---------------------------------------------------------------------------------------------------

    def _resume(
        self,
        items: list[Question],
        out: str | os.PathLike[str] | None,
        kind: str,
        bar: Any,
        work: _Work,
        scores_are: str = "weights",
    ) -> list[SelfConsistencyResult]:
        """Return the results of all items: read those in `out`, and append those that `work` yields for the rest."""
        if out is None:
            results = {result.index: result for done in work(items, bar) for result in done}
            return [results[item.index] for item in items]
        with Journal(out, self._settings(kind, scores_are), _CALLER) as journal:
            for index, row in journal.rows.items():
                if index >= len(items) or not same_question(items[index], row):
                    raise ValueError(
                        f"{_CALLER}: `out` must be a file of the same questions, got {journal.file.name}, whose row "
                        f"{index} answers another question; give another file"
                    )
            results = {index: SelfConsistencyResult.from_row(row) for index, row in journal.rows.items()}
            bar.update(len(results))
            for done in work([item for item in items if item.index not in results], bar):
                journal.append(result.to_row() for result in done)
                results |= {result.index: result for result in done}
        return [results[item.index] for item in items]

    def _settings(self, kind: str, scores_are: str = "weights") -> dict[str, Any]:
        """Return everything that a row depends on, as JSON."""
        common = {
            "kind": kind, "rule": self.rule, "lam": self.lam, "pattern": self.pattern,
            "equality": setting_name(self.equality), "ranker": model_identity(self.ranker),
            "model": model_identity(self.model), "prompt": self.form.text or setting_name(self.form.function),
            "timeout": self.grouping.get("timeout"),
        }  # fmt: skip
        if kind == "ready":
            # earlier versions, whose runs go on, knew weights alone
            return common if scores_are == "weights" else {**common, "scores_are": scores_are}
        drawn = {"n": self.n, "confidence": self.confidence, "round_size": self.round_size, "seed": self.seed}
        if self.remote is not None:
            told = {"chat_template": self.form.chat, **self.form.extras(), **self.remote.settings()}
            return {**common, **drawn, **told, **vars(self.sampling)}
        read = {
            "chat_template": self.form.chat,
            "tokenizer": vocabulary_checksum(self.tokenizer),
            "dual_lora_modes": dual_lora_modes(self.model),
            **self.form.extras(),  # absent by default, as in runs of earlier versions, which go on
        }
        return {**common, **drawn, **read, **vars(self.sampling)}

    # ---- sampling ---------------------------------------------------------------------------------------------------

    def _sample_and_vote(self, items: list[Question], bar: Any) -> Iterator[list[SelfConsistencyResult]]:
        """Yield lists of results, as their questions finish."""
        reader = PrefixReader(self.model)
        pads = functools.partial(leaves_padding_out, reader, self.tokenizer)
        together = max(1, self.batch_size // self.round_size)
        for pairs in prompt_batches(((item, self._prompt_ids(item.text)) for item in items), together, pads):
            batch, prompts = [item for item, _ in pairs], [prompt for _, prompt in pairs]
            for item in batch:
                item.rationales, item.answers, item.scores = [], [], []
            source = PromptBatch(reader, self.tokenizer, prompts, self.sampling)
            active = list(range(len(batch)))
            while active:
                self._draw_round(source, batch, active)
                going = self._still_active(batch, active)
                finished = [batch[q] for q in active if q not in going]
                if finished:
                    yield self._vote(finished)
                    bar.update(len(finished))
                active = going

    def _ask_and_vote(self, items: list[Question], bar: Any) -> Iterator[list[SelfConsistencyResult]]:
        """Yield lists of results, as an endpoint has given their questions all samples."""
        remote, scored = cast(Endpoint, self.remote), self.rule != "count" and self.ranker is None

        def draw(item: Question, numbers: range) -> list[Drawn]:
            return remote.draw(self.form, item.text, numbers, self.seed, self.sampling, scored)

        chosen = asked(
            remote, items, draw, n=self.n, round_size=self.round_size, pattern=self.pattern, going=self._still_active
        )
        for finished in chosen:
            if not scored:
                for item in finished:
                    item.scores = None
            yield self._vote(finished)
            bar.update(len(finished))

    def _draw_round(self, source: PromptBatch, batch: list[Question], active: list[int]) -> None:
        """Draw the next samples of every active question, batch_size at once."""
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
                cast(list[float], batch[q].scores).append(math.exp(sample.logprob / len(sample.tokens)))

    def _still_active(self, batch: list[Question], active: list[int]) -> list[int]:
        """Return the active questions that need more samples."""
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
        ids = self.form.ids(self.tokenizer, question)
        if not ids:
            raise ValueError(f"{_CALLER}: `prompt` must have tokens for every question, got none for {question!r}")
        check_token_ids(_CALLER, "tokenizer", ids, self.model)
        return ids

    def _text(self, sample: Sample, ends: Sequence[int]) -> str:
        tokens = sample.tokens[:-1] if sample.tokens[-1] in ends else sample.tokens
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        for stop in self.sampling.stop:
            text = text.partition(stop)[0]
        return text

    # ---- scores and votes -------------------------------------------------------------------------------------------

    def _vote_over_existing(
        self, items: list[Question], bar: Any, scores_are: str
    ) -> Iterator[list[SelfConsistencyResult]]:
        """Yield lists of results for questions with samples, scored first where a score is needed."""
        for start in range(0, len(items), _VOTE_AT_ONCE):
            batch = items[start : start + _VOTE_AT_ONCE]
            for item in batch:
                item.answers = [extract_answer(text, self.pattern) for text in item.rationales]
            without = [item for item in batch if item.scores is None]
            if self.rule != "count" and self.ranker is None and without:
                prompts = [self._prompt_ids(item.text) for item in without]
                texts = [item.rationales for item in without]
                found = score_sequences(self.model, prompts, texts, tokenizer=self.tokenizer)
                for item, scores in zip(without, found, strict=True):
                    values = scores.mean if scores_are == "log" else scores.mean.exp()
                    item.scores = [None if math.isnan(x) else x for x in values.tolist()]
            yield self._vote(batch, scores_are)
            bar.update(len(batch))

    def _groups(self, items: list[Question], gold: list[str | None] | None) -> Groups:
        answers = [item.answers for item in items]
        return group_answers(answers, gold=gold, equality=self.equality, **self.grouping)

    def _vote(self, items: list[Question], scores_are: str = "weights") -> list[SelfConsistencyResult]:
        if self.ranker is not None:
            add_ranker_scores(items, self.ranker)
        gold = [gold_answer(item.reference, self.pattern) for item in items]
        groups = self._groups(items, gold if any(text is not None for text in gold) else None)
        return vote_results(items, groups, gold, self.rule, self.lam, scores_are)
