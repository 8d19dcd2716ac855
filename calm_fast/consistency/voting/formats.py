"""Rows of other tools: lm-evaluation-harness, OpenAI and vLLM, TRL and Hugging Face datasets, verl.

A record is recognised by its content and becomes question, gold answer, samples and scores. Records with one sample are
grouped by their id or question.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

NOT_TEXT = ""  # stands for a sample that is not text: it has no answer

# names in the order in which they are looked for
QUESTIONS = ("question", "problem", "prompt", "query", "instruction", "input", "inputs", "messages", "conversations")
ANSWERS = (
    "answer", "gold", "ground_truth", "final_answer", "expected_answer", "reference_answer", "target", "gts",
    "solution", "label", "reference", "expected",
)  # fmt: skip
SAMPLES = (
    "generated_answer", "generated_answers", "generated_answer_list", "samples", "completions", "responses", "outputs",
    "generations", "generated_responses", "model_outputs", "predictions", "candidates", "rollouts", "resps", "choices",
    "completion", "response", "output", "generation", "generated_text", "prediction", "model_output", "code", "text",
)  # fmt: skip
SCORES = (
    "scores", "score", "cumulative_logprob", "cumulative_logprobs", "logprobs_sum", "logprob", "rewards", "reward",
)  # fmt: skip
IDS = (
    "question_id", "problem_id", "doc_id", "prompt_id", "unique_id", "custom_id", "task_id", "request_id", "uid", "id",
    "idx", "index",
)  # fmt: skip
_TEXTS = ("text", "content", "generated_text", "output", "response", "completion")


@dataclass(frozen=True)
class Fields:
    """Names of fields that a user gives, with dots into nested ones; None = by content."""

    question: str | None = None
    answer: str | None = None
    samples: str | None = None
    scores: str | None = None

    def any(self) -> bool:
        return any((self.question, self.answer, self.samples, self.scores))


@dataclass
class Sampled:
    """The question of a record, its gold answer, and samples with their scores, if there are any."""

    question: str
    answer: Any
    samples: list[str]
    scores: list[float | None] | None = None
    key: str = ""
    single: bool = False
    not_text: int = 0


def is_native(record: Any) -> bool:
    """Return True for a row of our own form, which is checked strictly."""
    return not isinstance(record, Mapping) or isinstance(record.get("generated_answer"), list)


def read_record(record: Mapping[str, Any], fields: Fields) -> Sampled | None:
    """Return the question and samples of a record of another tool; None if it has no samples under a known name."""
    flat = _flat(record)
    samples, name = _found(flat, fields.samples, SAMPLES)
    if name is None:
        return None
    if name == "resps" and fields.samples is None:
        samples = [text for group in _listed(samples) for text in _listed(group)]
    question, question_name = _found(flat, fields.question, QUESTIONS, but=name)
    answer, _ = _found(flat, fields.answer, ANSWERS, but=name)
    if "resps" in record and fields.answer is None:  # lm-evaluation-harness: the gold answer as the task compares it
        answer = record.get("target", answer)
    given, _ = _found(flat, fields.scores, SCORES)
    identity, _ = _found(flat, None, IDS)
    texts, scores, not_text = [], [], 0
    single = not isinstance(samples, (list, tuple)) or _is_messages(samples)
    for sample in [samples] if single else samples:
        text, score = _text_of(sample)
        not_text += text is None
        texts.append(NOT_TEXT if text is None else text)
        scores.append(score)
    asked = _question_text(question)
    if asked is None:
        asked = None if identity is None else str(identity)
    if asked is None:
        return None
    own = _scores_of(given, len(texts)) if given is not None else scores if any(s is not None for s in scores) else None
    key = f"{identity}\0" if identity is not None and question_name is None else asked
    return Sampled(asked, _answer_of(answer), texts, own, key, single=len(texts) == 1, not_text=not_text)


def group(found: Iterable[tuple[str, Sampled]]) -> Iterator[tuple[str, Sampled]]:
    """Yield questions in the order of their first record; records with one sample each are joined."""
    whole: dict[str, tuple[str, Sampled]] = {}
    for place, sampled in found:
        if not sampled.single:
            yield place, sampled
            continue
        if sampled.key not in whole:
            whole[sampled.key] = (place, sampled)
            continue
        first = whole[sampled.key][1]
        if (first.scores is None) is not (sampled.scores is None):
            missing: list[float | None] = [None]
            first.scores = first.scores or missing * len(first.samples)
            sampled.scores = sampled.scores or missing * len(sampled.samples)
        first.samples += sampled.samples
        first.scores = None if first.scores is None else first.scores + (sampled.scores or [])
        first.not_text += sampled.not_text
        first.answer = sampled.answer if first.answer is None else first.answer
    yield from whole.values()


# ---- finding fields -------------------------------------------------------------------------------------------------


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a record, with those of the objects in which tools put theirs."""
    flat = dict(record)
    for holder in ("doc", "request", "response", "body", "reward_model", "extra_info"):
        inner = flat.get(holder)
        if isinstance(inner, str) and inner.startswith("{"):
            try:
                inner = json.loads(inner)
            except ValueError:
                continue
        if isinstance(inner, Mapping):
            if holder in ("request", "response"):
                flat.pop(holder)
            for name, value in inner.items():
                flat.setdefault(name, value)
            body = inner.get("body")
            if isinstance(body, Mapping):
                for name, value in body.items():
                    flat.setdefault(name, value)
    arguments = flat.get("arguments")
    if arguments and "question" not in flat:
        flat.setdefault("prompt", _first_text(arguments))
    return flat


def _found(
    flat: Mapping[str, Any], given: str | None, names: tuple[str, ...], but: str | None = None
) -> tuple[Any, str | None]:
    """Return the value of the field that the user names, else of the first known name, and the name."""
    if given is not None:
        value: Any = flat
        for part in given.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value, None if value is None else given
    for name in names:
        if name != but and flat.get(name) is not None:
            return flat[name], name
    return None, None


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _first_text(value: Any) -> str | None:
    """Return the first string in nested lists and objects."""
    if isinstance(value, str):
        return value
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return next((text for item in inner if (text := _first_text(item)) is not None), None)


def _is_messages(value: Any) -> bool:
    """Return True for the turns of one conversation."""
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in value)
    )


# ---- values ---------------------------------------------------------------------------------------------------------


def _text_of(sample: Any) -> tuple[str | None, float | None]:
    """Return the text of a sample and its log-probability, if it carries one."""
    if isinstance(sample, str):
        return sample, None
    if isinstance(sample, (int, float)) and not isinstance(sample, bool):
        return str(sample), None
    if _is_messages(sample):
        return _text_of(sample[-1])
    if not isinstance(sample, Mapping):
        return None, None
    if isinstance(message := sample.get("message"), Mapping):
        return _text_of(message)[0], _logprob(sample)
    text = next((sample[name] for name in (*_TEXTS, "value") if sample.get(name) is not None), None)
    if isinstance(text, (list, tuple)):  # parts of a message
        parts = [part.get("text") for part in text if isinstance(part, Mapping)]
        text = "".join(part for part in parts if isinstance(part, str)) or None
    return text if isinstance(text, str) else None, _logprob(sample)


def _logprob(sample: Mapping[str, Any]) -> float | None:
    """Return the log-probability of a sample of OpenAI's or vLLM's form: given, or summed over its tokens."""
    given: Any = sample.get("cumulative_logprob")
    if _finite(given):
        return float(given)
    inner = sample.get("logprobs")
    if not isinstance(inner, Mapping):
        return None
    values = inner.get("token_logprobs")
    if values is None and isinstance(content := inner.get("content"), list):
        values = [token.get("logprob") for token in content if isinstance(token, Mapping)]
    if not isinstance(values, list) or not values or not all(_finite(value) for value in values):
        return None
    return float(sum(values))


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _question_text(value: Any) -> str | None:
    """Return a question as text: the last turn of the user where it is a conversation."""
    if isinstance(value, str):
        return value
    if _is_messages(value):
        asked = [turn for turn in value if turn.get("role", turn.get("from")) in ("user", "human")]
        return _text_of((asked or list(value))[-1])[0]
    return None


def _answer_of(value: Any) -> Any:
    """Return a gold answer: of a list the first entry, of an object its value."""
    if isinstance(value, (list, tuple)):
        return _answer_of(value[0]) if value else None
    if isinstance(value, Mapping):
        inner = next((value[name] for name in ("value", "ground_truth", "answer", "text") if name in value), None)
        return _answer_of(inner) if not isinstance(inner, Mapping) else None
    return value


def _scores_of(value: Any, count: int) -> list[float | None] | None:
    """Return one score for each sample; None unless there is one for each."""
    values = _listed(value)
    if len(values) != count:
        return None
    return [float(one) if _finite(one) else None for one in values]
