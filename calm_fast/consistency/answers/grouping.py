"""Group equal answers: the answers of a question become class ids that can vote."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from calm_fast.consistency.answers.equality import first_match_classes, normalise, quick_verdict, rational
from calm_fast.consistency.answers.gold import gold_answer
from calm_fast.consistency.answers.math_pool import Comparison, compare
from calm_fast.consistency.answers.plain import MAX_PLAIN_LENGTH
from calm_fast.consistency.answers.verdict_cache import VerdictCache
from calm_fast.core.progress import progress_bar

EQUALITIES = ("math", "exact", "text")
_QUESTIONS_PER_WORKER = 8  # starting a process costs as much as a few questions
_SAVE_EVERY = 64  # questions between two writes to the cache
_ARTICLE = re.compile(r"^(?:a|an|the)\s+(?=\S)")
_EDGES = ".,;:!?\"'`*_ \u201c\u201d\u2018\u2019\u3002"


@dataclass(frozen=True)
class Groups:
    """Answers as class ids within their question.

    Attributes:
        answers: (Q, K) int64, class of each answer. K is the longest row; the end of a shorter row holds 0.
        valid: (Q, K) bool, True where there is an answer.
        correct: (Q,) int64, class of the gold answer (0), or -1 without one.
        texts: for each question one text per class: the gold answer, else the first answer of the class.
        given_up: (question, answer, answer) of pairs that count as different because the comparison timed out.
    """

    answers: torch.Tensor
    valid: torch.Tensor
    correct: torch.Tensor
    texts: list[list[str]]
    given_up: tuple[tuple[int, str, str], ...] = ()

    @property
    def timeouts(self) -> int:
        """Number of pairs that count as different because the comparison timed out."""
        return len(self.given_up)

    @property
    def right(self) -> torch.Tensor:
        """(Q, K) bool, True where an answer equals the gold answer."""
        return self.valid & (self.answers == self.correct[:, None])


def group_answers(
    answers: Sequence[Sequence[str | None]],
    *,
    gold: Sequence[str | None] | None = None,
    equality: str | Callable[[str, str], bool] = "math",
    workers: int | None = None,
    timeout: float = 5.0,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Groups:
    """Return class ids of answers: equal answers of a question share one, and the gold answer's class is 0.

    An answer joins the first class whose first member it equals, in sample order, so the result depends neither on
    `workers` nor on the cache. None and blank answers are not valid and never vote.

    Args:
        answers: for each question the answers of its samples; questions may have different numbers of them.
        gold: for each question the gold answer, or None. With "math" also a solution that ends with it.
        equality: "math": equal normalised strings, else rules for numbers, units, dates, words and lists, else
            finite values that differ, else math-verify in both directions. "exact": equal strings.
            "text": equal up to case, Unicode form, space,
            punctuation at the edges and a leading article. Or a function of two answers that returns a bool.
        workers: processes for math-verify. None = one for each available CPU, fewer for little work.
        timeout: CPU seconds that math-verify may take to read an answer or to compare two. A process that takes longer
            is killed; the pair counts as different and is listed in `given_up`.
        cache_dir: folder that keeps math-verify's verdicts for later calls; processes may share it. None = no cache.
        progress: show a bar over questions.
    Returns:
        Groups.
    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came.
        RuntimeError: no process could be started.
    """
    _check(answers, gold, equality, workers, timeout)
    gold = [None] * len(answers) if gold is None else gold
    if equality == "math":  # which compares longer texts as they are, so a long solution's answer has to be found first
        gold = [gold_answer(text) if text and len(text) > MAX_PLAIN_LENGTH else text for text in gold]
    rows = [[_blank_is_none(text) for text in (right, *row)] for right, row in zip(gold, answers, strict=True)]
    given_up: tuple[tuple[int, str, str], ...] = ()
    with progress_bar(total=len(rows), desc="grouping answers", unit="question", shown=progress) as bar:
        if equality == "math":
            classes, given_up = _by_math(rows, workers, timeout, VerdictCache(cache_dir, timeout), bar)
        else:
            same = _TEXT_RULES[equality] if isinstance(equality, str) else equality
            classes = [_by_rule(row, same) for row in rows if bar.update() or True]
    return _groups(rows, classes, given_up)


def _by_rule(row: list[str | None], rule: Callable[..., Any]) -> list[int | None]:
    """Return the class of each answer by a function of one answer (its key) or of two (True = equal)."""
    found = [text for text in row if text is not None]
    if rule in _TEXT_RULES.values():
        numbers: dict[str, int] = {}
        classes = iter([numbers.setdefault(rule(text), len(numbers)) for text in found])
    else:
        classes = iter(first_match_classes(len(found), lambda i, j: bool(rule(found[i], found[j]))))
    return [None if text is None else next(classes) for text in row]


def _as_text(answer: str) -> str:
    """Return `answer` in the form in which words are compared."""
    plain = " ".join(unicodedata.normalize("NFKC", answer).casefold().split())
    bare = plain.strip(_EDGES)
    return _ARTICLE.sub("", bare or plain)


_TEXT_RULES: dict[str, Callable[[str], str]] = {"exact": str, "text": _as_text}


class _Question:
    """Answers of one question. Those equal by string or rational value form one node; nodes are compared."""

    def __init__(self, row: list[str | None], plain: dict[str, tuple[str, Fraction | None]]) -> None:
        texts: list[str] = []
        nodes: dict[str | Fraction, int] = {}
        self.node: list[int | None] = []
        for text in row:
            if text is None:
                self.node.append(None)
                continue
            if text not in plain:
                string = normalise(text)
                plain[text] = (string, rational(text))
            string, value = plain[text]
            node = nodes.get(string) if value is None else nodes.get(value, nodes.get(string))
            if node is None:
                node = len(texts)
                texts.append(text)
            nodes.setdefault(string, node)
            if value is not None:
                nodes.setdefault(value, node)
            self.node.append(node)
        self.comparison = Comparison(texts)
        self._quick: dict[tuple[int, int], bool | None] = {}
        self.recalled: frozenset[tuple[int, int]] = frozenset()

    def open_pairs(self) -> list[tuple[int, int]]:
        """Return the pairs of nodes that only math-verify can decide."""
        count = len(self.comparison.texts)
        return [(i, j) for j in range(count) for i in range(j) if self._quick_verdict(i, j) is None]

    def _quick_verdict(self, i: int, j: int) -> bool | None:
        if (i, j) not in self._quick:
            self._quick[i, j] = quick_verdict(self.comparison.texts[i], self.comparison.texts[j])
        return self._quick[i, j]

    def classes(self) -> tuple[list[int | None], list[tuple[str, str]]]:
        """Return the class of each answer, and the pairs used for it whose comparison timed out.

        Raises:
            KeyError: a verdict is needed that is not known yet.
        """
        known, texts = self.comparison.known, self.comparison.texts
        given_up = []

        def same(i: int, j: int) -> bool:
            verdict = self._quick_verdict(i, j)
            if verdict is None:
                verdict = known[i, j]
                if verdict is None:
                    given_up.append((texts[i], texts[j]))
            return bool(verdict)

        of_node = first_match_classes(len(texts), same)
        return [None if node is None else of_node[node] for node in self.node], given_up

    def new_verdicts(self) -> Iterator[tuple[tuple[str, str], bool | None]]:
        """Yield the verdicts that the cache did not have."""
        texts = self.comparison.texts
        for pair, verdict in self.comparison.known.items():
            if pair not in self.recalled:
                yield (texts[pair[0]], texts[pair[1]]), verdict


def _by_math(
    rows: list[list[str | None]], workers: int | None, timeout: float, cache: VerdictCache, bar: Any
) -> tuple[list[list[int | None]], tuple[tuple[int, str, str], ...]]:
    plain: dict[str, tuple[str, Fraction | None]] = {}
    questions = [_Question(row, plain) for row in rows]
    waiting = []
    for question in questions:
        _recall(question, cache)
        try:
            question.classes()
            bar.update()
        except KeyError:
            waiting.append(question)
    fresh: dict[tuple[str, str], bool | None] = {}
    if waiting:
        several = workers or min(_cpus(), -(-len(waiting) // _QUESTIONS_PER_WORKER))
        try:
            for done, number in enumerate(compare([q.comparison for q in waiting], several, timeout), 1):
                bar.update()
                fresh.update(waiting[number].new_verdicts())
                if done % _SAVE_EVERY == 0:
                    cache.put(fresh)
                    fresh = {}
        finally:
            cache.put(fresh)  # after an interruption too
    classes, given_up = zip(*(question.classes() for question in questions), strict=True) if questions else ((), ())
    return list(classes), tuple((number, *pair) for number, pairs in enumerate(given_up) for pair in pairs)


def _recall(question: _Question, cache: VerdictCache) -> None:
    """Take over the verdicts that the cache holds."""
    if cache.file is None:
        return
    texts = question.comparison.texts
    pairs = question.open_pairs()
    found = cache.get((texts[i], texts[j]) for i, j in pairs)
    known = {(i, j): found[texts[i], texts[j]] for i, j in pairs if (texts[i], texts[j]) in found}
    question.comparison.known.update(known)
    question.recalled = frozenset(known)


def _groups(
    rows: list[list[str | None]], classes: list[list[int | None]], given_up: tuple[tuple[int, str, str], ...]
) -> Groups:
    """Build the tensors from classes; the first entry of each row belongs to the gold answer."""
    longest = max((len(row) - 1 for row in rows), default=0)
    padded = [[*row[1:], *[None] * (longest - len(row) + 1)] for row in classes]
    shape = (len(rows), longest)
    texts = []
    for row, ids in zip(rows, classes, strict=True):
        first: dict[int, str] = {}
        for text, number in zip(row, ids, strict=True):
            if number is not None and text is not None:
                first.setdefault(number, text)
        texts.append([first[number] for number in range(len(first))])
    return Groups(
        answers=torch.tensor([[number or 0 for number in row] for row in padded], dtype=torch.int64).reshape(shape),
        valid=torch.tensor([[number is not None for number in row] for row in padded], dtype=torch.bool).reshape(shape),
        correct=torch.tensor([-1 if row[0] is None else 0 for row in rows], dtype=torch.int64),
        texts=texts,
        given_up=given_up,
    )


def _blank_is_none(text: str | None) -> str | None:
    return text if text is not None and text.strip() else None


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check(answers: Any, gold: Any, equality: Any, workers: Any, timeout: Any) -> None:
    if isinstance(answers, str) or not isinstance(answers, Sequence):
        raise TypeError(f"group_answers: `answers` must be a sequence of sequences, got {type(answers).__name__}")
    for number, row in enumerate(answers):
        if isinstance(row, str) or not isinstance(row, Sequence):
            raise TypeError(f"group_answers: `answers[{number}]` must be a sequence, got {type(row).__name__}")
        _check_texts(row, f"answers[{number}]")
    if gold is not None:
        if isinstance(gold, str) or not isinstance(gold, Sequence):
            raise TypeError(f"group_answers: `gold` must be a sequence, got {type(gold).__name__}")
        if len(gold) != len(answers):
            raise ValueError(
                f"group_answers: `gold` must have one entry for each of {len(answers)} questions, got {len(gold)}"
            )
        _check_texts(gold, "gold")
    if not callable(equality) and equality not in EQUALITIES:
        raise ValueError(f"group_answers: `equality` must be one of {EQUALITIES} or a function, got {equality!r}")
    if workers is not None and (not isinstance(workers, int) or isinstance(workers, bool) or workers < 1):
        raise ValueError(f"group_answers: `workers` must be a positive integer or None, got {workers!r}")
    if not isinstance(timeout, (int, float)) or isinstance(timeout, bool) or not 0 < timeout < float("inf"):
        raise ValueError(f"group_answers: `timeout` must be a positive number of seconds, got {timeout!r}")


def _check_texts(texts: Sequence[Any], name: str) -> None:
    for place, text in enumerate(texts):
        if text is not None and not isinstance(text, str):
            raise TypeError(f"group_answers: `{name}[{place}]` must be a string or None, got {type(text).__name__}")
