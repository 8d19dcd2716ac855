"""Find the final answer of a rationale."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from calm_fast.consistency.answers.markers import (
    CAPITALS,
    COMMA_LABEL,
    COMMA_SENTENCE,
    END_TOKEN,
    HASHES,
    LABEL,
    NEXT_TURN,
    REVERSED,
    SENTENCE,
    SHORT_LABEL,
    TAG,
    THOUGHT_END,
)
from calm_fast.consistency.answers.reading import MOST, clean, is_bare_value, read_inline, read_value, says_something

# \b is the backspace of JSON, and \f its form feed: \boxed and \fbox in strings that were not escaped
_BOX_WORD = r"(?:\\{1,2}(?:boxed|fbox|framebox)|\x08oxed|\x0cbox)"
_BOX = re.compile(rf"{_BOX_WORD}\s*\{{")
_TOKEN = re.compile(rf"(?P<box>{_BOX.pattern})|\\.|[{{}}]", re.DOTALL)
_BOX_OF_ONE = re.compile(
    rf"{_BOX_WORD}(?:\s*\((?P<inside>[^()\n]*)\)|\s*(?P<one>[-+]?\\[dt]?frac\s*(?:\{{[^{{}}]*\}}\s*\{{[^{{}}]*\}}|\d\d)"
    r"|[-+]?\\sqrt\s*(?:\{[^{}]*\}|\d)|[-+]?\d[\d,./]*(?<![,./])|[A-Za-z](?![A-Za-z])))"
)
_BETWEEN_BOXES = re.compile(
    r"(?:\s|\$|\\[()\[\] ,;]|,|;|\\quad|\\text\{\s*(?:and|or)\s*\}|\band\b|\bor\b|[A-Za-z](?:_\{?\w\}?)?\s*=)*"
)
# markers and turns of a text that are tried, so that a text of nothing else takes no time; and the length of an end
_MOST_TRIED, _SHORT = 40, 500
_HEADING = re.compile(
    r"(?:step|part|case|solution|problem|question|example|note|summary|conclusion|explanation)\b", re.I
)
_NAMED = re.compile(r"[A-Za-z]\s*=\s*")
_HASH_VALUE = re.compile(
    r"(?:[-+]?\s?[$€£¥]?\s?[-+]?\d[\d,./]*\s?%?(?:\s+[^\W\d_]+){0,2}|\$[^$]+\$|\(?[A-J]\)?)\s*\.?\s*"
)


@dataclass(frozen=True)
class Found:
    """An answer and where it stood.

    kind: "box", "tag", "hashes", "sentence", "label", "pattern" or "bare"; see docs/consistency.md. start, end: of the
    marker and the text that was read, in the rationale.
    """

    answer: str
    kind: str
    start: int
    end: int


def extract_answer(text: str, pattern: str | re.Pattern[str] | None = None) -> str | None:
    """Return the final answer of `text`: the last box, tag or ####, else the text after the last "The answer is".

    Args:
        text: a rationale. pattern: a regular expression that is tried after the conventions that are read anyway; the
            answer is the first group of its last match, or the whole match without a group.
    Returns:
        the answer without what stands around it, or None. docs/consistency.md has the conventions in their order.
    Raises:
        TypeError: `text` is not a string. ValueError: `pattern` is not a regular expression.
    The box comes before the sentence because the other order picks up units in about 2 % of real rationales.
    """
    found = find_answer(text, pattern)
    return None if found is None else found.answer


def find_answer(text: str, pattern: str | re.Pattern[str] | None = None) -> Found | None:
    """Return the final answer of `text` and where it stands; arguments and errors are those of `extract_answer`."""
    if not isinstance(text, str):
        raise TypeError(f"extract_answer: `text` must be a string, got {type(text).__name__}")
    compiled = None if pattern is None else _compile(pattern)
    begin = max((match.end() for match in THOUGHT_END.finditer(text)), default=0)
    if begin and (found := _find_marked(text, begin)) is not None:
        return found
    if (found := _find_marked(text, 0)) is not None:
        return found
    if compiled is not None:
        return _last_match(text, compiled)
    return _bare(text, begin)


def _find_marked(text: str, begin: int) -> Found | None:
    """Return the last answer after `begin` that stands at a marker; what follows a new question does not count."""
    for turn in islice(NEXT_TURN.finditer(text, begin), _MOST_TRIED):
        if (found := _last_marked(text, begin, turn.start())) is not None:
            return found
    return _last_marked(text, begin, len(text))


def _last_marked(text: str, begin: int, end: int) -> Found | None:
    strong = [*_boxes(text, begin, end), *_tags(text, begin, end), *_hashes(text, begin, end)]
    if strong:
        return max(strong, key=lambda found: found.end)
    return _last_stated(text, begin, end)


# ---- boxes ----------------------------------------------------------------------------------------------------------


def _boxes(text: str, begin: int, end: int) -> Iterator[Found]:
    """Yield the last box, joined with the boxes before it that it continues ("\\boxed{1} and \\boxed{2}")."""
    spans = _box_spans(text, begin, end)
    if not spans:
        spans = [
            (match.start(), *match.span("inside" if match["inside"] else "one"), match.end())
            for match in _BOX_OF_ONE.finditer(text, begin, end)
        ]
    spans = [span for span in spans if says_something(_box_text(text[span[1] : span[2]]) or "")]
    if not spans:
        return
    first = len(spans) - 1
    while (
        first
        and _BETWEEN_BOXES.fullmatch(text, spans[first - 1][3], spans[first][0])
        and _same_line(text, spans, first)
    ):
        first -= 1
    contents = [_box_text(text[start:stop]) or "" for _, start, stop, _ in spans[first:]]
    answer = ", ".join(dict.fromkeys(contents))
    yield Found(answer, "box", spans[first][0], spans[-1][3])


def _same_line(text: str, spans: list[tuple[int, int, int, int]], number: int) -> bool:
    between = text[spans[number - 1][3] : spans[number][0]]
    # "\boxed{1}\boxed{2}" is one box after the other, not a list
    return "\n\n" not in between and re.search(r",|;|and|or", between) is not None


def _box_text(inside: str) -> str | None:
    inside = inside.strip()
    return None if not inside else inside.rstrip(";,").strip()


def _box_spans(text: str, begin: int, end: int) -> list[tuple[int, int, int, int]]:
    """Return (start, inside, inside's end, end) of boxes whose braces balance and that hold no other box.

    One pass over any text.
    """
    if (first := _BOX.search(text, begin, end)) is None:
        return []
    opened: list[tuple[bool, int, int]] = []
    found: list[tuple[int, int, int, int]] = []
    for token in _TOKEN.finditer(text, first.start(), end):
        word = token.group()
        if token["box"] or word == "{":
            opened.append((token["box"] is not None, token.start(), token.end()))
        elif word == "}" and opened:
            boxed, start, inside = opened.pop()
            if boxed and not (found and found[-1][0] > start):
                found.append((start, inside, token.start(), token.end()))
    return sorted(found)


# ---- tags and hashes ------------------------------------------------------------------------------------------------


def _tags(text: str, begin: int, end: int) -> Iterator[Found]:
    """Yield the answers of <answer>...</answer> and the like."""
    for match in TAG.finditer(text, begin, end):
        inside = next(value for value in (match["value"], match["other"], match["tex"]) if value is not None)
        answer = _inside_tag(inside)
        if answer is not None:
            yield Found(answer, "tag", match.start(), match.end())


def _inside_tag(inside: str) -> str | None:
    stated = _last_marked(inside, 0, len(inside))
    return stated.answer if stated is not None else read_value("\n" + inside)


def _hashes(text: str, begin: int, end: int) -> Iterator[Found]:
    """Yield the answers of "#### 5", the form of GSM8K; a heading of level four is not one."""
    for match in HASHES.finditer(text, begin, end):
        line = END_TOKEN.split(match["value"])[0].strip()
        if not line or line.endswith((":", "：")) or _HEADING.match(line.strip("* ")):
            continue
        last = end - match.end() < _SHORT and not END_TOKEN.sub("", text[match.end() : end]).strip()
        if not last and not _HASH_VALUE.fullmatch(line.strip("*")):
            continue
        if _last_stated(line, 0, len(line)) is not None:
            continue  # "#### The answer is 5" is read as that sentence
        answer = clean(line) if not is_bare_value(line) else read_inline(line)
        if answer is not None:
            yield Found(answer, "hashes", match.start(), match.end())


# ---- sentences and labels -------------------------------------------------------------------------------------------

_STATED = (
    (SENTENCE, "sentence", False), (COMMA_SENTENCE, "sentence", True), (LABEL, "label", False),
    (CAPITALS, "label", False), (COMMA_LABEL, "label", True), (SHORT_LABEL, "label", False),
    (REVERSED, "sentence", False),
)  # fmt: skip


def _last_stated(text: str, begin: int, end: int) -> Found | None:
    """Return the last answer after a phrase or a label, without those that nothing readable follows."""
    matches = [
        (match.end(), match.start(), place)
        for place, (marker, _, _) in enumerate(_STATED)
        for match in marker.finditer(text, begin, end)
    ]
    for stop, start, place in sorted(matches, reverse=True)[:_MOST_TRIED]:
        marker, kind, comma = _STATED[place]
        if marker is REVERSED:
            match = marker.match(text, start, end)
            answer = None if match is None else read_inline(match["value"])
        else:
            answer = read_value(text[stop : min(end, stop + MOST)], label=kind == "label", comma=comma)
        if marker is SHORT_LABEL and answer is not None and not is_bare_value(_NAMED.sub("", answer)):
            continue
        if answer is not None:
            return Found(answer, kind, start, min(end, stop + MOST))
    return None


# ---- the user's pattern, and texts that are a value -----------------------------------------------------------------


def _compile(pattern: str | re.Pattern[str]) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as problem:
        raise ValueError(
            f"extract_answer: `pattern` must be a regular expression, got {pattern!r}: {problem}"
        ) from problem


def _last_match(text: str, pattern: re.Pattern[str]) -> Found | None:
    *_, last = [None, *pattern.finditer(text)]
    if last is None:
        return None
    answer = (last.group(1) if pattern.groups else last.group()) or ""
    return Found(answer.strip(), "pattern", last.start(), last.end()) if answer.strip() else None


def _bare(text: str, begin: int) -> Found | None:
    """Return the answer of a text that is nothing but a value, or that ends in a line of bold type which is one."""
    stripped = END_TOKEN.sub("", text[begin : begin + MOST]).strip() if len(text) - begin <= MOST else ""
    lines = [line.strip() for line in stripped.split("\n") if line.strip()]
    if not lines or not is_bare_value(lines[-1]) or (len(lines) > 1 and not lines[-1].startswith("**")):
        return None
    answer = read_inline(lines[-1])
    return None if answer is None else Found(answer, "bare", begin, len(text))
