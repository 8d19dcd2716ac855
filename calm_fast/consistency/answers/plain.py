"""Read answers that need no algebra: numbers with units, percentages, times, dates, bases, choices, words, lists."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from calm_fast.consistency.answers.notation import to_latex, without_text_commands
from calm_fast.consistency.answers.number_words import number_of_words
from calm_fast.consistency.answers.units import (
    CAPITALS,
    MONTHS,
    NEED_SPACE,
    NOT_UNITS,
    PER,
    SCALES,
    SYNONYMS,
    UNITS,
)

MAX_PLAIN_LENGTH = 1000
_MOST_DIGITS = 2000  # of a power
_MOST_EXPONENT = 5000

_INT = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?:\{,\}\d{3})+|\d+)"
_DECIMAL = rf"(?:{_INT}(?:\.\d*)?|\.\d+)"
_POWER = rf"{_DECIMAL}(?:\^\{{?[+-]?\d+\}}?)?"
_ABOVE = rf"(?:\{{\s*(?P<above>[+-]?\s*{_POWER})\s*\}}|(?P<above1>\d))"
_BELOW = rf"(?:\{{\s*(?P<below>[+-]?\s*{_POWER})\s*\}}|(?P<below1>\d))"
_SIGN = r"(?P<sign>[+-]?)\s*"
_FORMS = tuple(
    re.compile(_SIGN + form)
    for form in (
        rf"(?P<number>{_DECIMAL})(?:\s*[eE]\s*(?P<e>[+-]?\d+))?",
        rf"(?P<number>{_DECIMAL})\s*(?:\\times|\\cdot|\*|x|X)\s*10\s*\^\s*\{{?\s*(?P<e>[+-]?\d+)\s*\}}?",
        rf"(?P<above>{_POWER})\s*/\s*(?P<below>[+-]?{_POWER})",
        rf"\(\s*(?P<above>[+-]?{_POWER})\s*\)\s*/\s*\(?\s*(?P<below>[+-]?{_POWER})\s*\)?",
        rf"(?P<whole>\d*)\s*\\[dt]?frac\s*{_ABOVE}\s*{_BELOW}",
        r"(?P<whole>\d+)(?:\s+|\s*-\s*(?=\d+/))(?P<above>\d+)\s*/\s*(?P<below>\d+)",
        rf"(?P<power>{_DECIMAL}\^\{{?[+-]?\d+\}}?)",
        r"(?P<start>\d*)\.(?P<fixed>\d*)(?:\\overline\s*\{?(?P<again>\d+)\}?|\((?P<again2>\d+)\)|\\dot\{?(?P<again3>\d)\}?)",
        r"(?P<start>\d*)\.(?P<fixed>\d*?)(?P<again>\d{1,6}?)(?P=again){2,}(?:\.\.\.|\\[lc]?dots)",
    )
)
_DATE = re.compile(r"(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})")
_OTHER_DATE = re.compile(r"(\d{1,2})[/.](\d{1,2})[/.](\d{4}|\d{2})|(\d{1,2})-(\d{1,2})-(\d{4})")
_LONG_DATE = re.compile(
    r"(?:([a-z]{3,9})\.?\s+(\d{1,2})(?:st|nd|rd|th)?,?\s+(\d{4})|(\d{1,2})(?:st|nd|rd|th)?\s+([a-z]{3,9})\.?,?\s+(\d{4}))"
)
_TIME = re.compile(r"(\d{1,2})(?::([0-5]\d))?(?::([0-5]\d))?\s*(a\.?m\.?|p\.?m\.?|o'clock)?", re.IGNORECASE)
_DURATION = re.compile(
    r"(\d+)\s*(hours?|hrs?|h|minutes?|mins?|min|m)\.?,?\s*(?:and\s+)?(\d+)\s*(minutes?|mins?|min|m|seconds?|secs?|sec|s)\.?"
)
_BASE = re.compile(
    r"([0-9A-Fa-f.]+)\s*(?:_\{?\s*(\d+)\s*\}?|\(?\s*\(?base\s*(\d+)\)?|_\{?\s*\(?(two|eight|ten|sixteen)\)?\s*\}?)"
)
_BASES = {"two": 2, "eight": 8, "ten": 10, "sixteen": 16}
_DOTS = re.compile(r"\.\.\.|\\(?:[lc]?dots|dotsc|dotsb)(?![A-Za-z])")
_CHOICE = re.compile(r"[(\[]\s*([A-Za-z])\s*[)\]][.:]?|([A-Z])\)\.?|([A-Ja-j])[.:]?")
_CHOICE_TEXT = re.compile(r"\(([A-J])\)\s+\S.*|([A-J])[).]\s+\S.*", re.DOTALL)
_NAMED = re.compile(r"([A-Za-z](?:_\{?\w{1,3}\}?)?|[A-Za-z]{3,}(?: [A-Za-z]+)?|\\[a-z]+)\s*=\s*(?=\S)")
_PERCENT = re.compile(r"\s*(?:\\?%|\b(?:percent|per cent|pct|percentage points)\b\.?)$", re.IGNORECASE)
_UNIT = re.compile(
    r"(?P<gap>\s*)(?P<unit>(?:\^\s*\{?\s*\\circ\s*\}?\s*[CF]?|\\?[$€£¥₹¢]|[^\W\d_][^\d=+*(),;\\{}]*(?:\^\{?[23]\}?)?))\.?$"
)
_CURRENCY = re.compile(r"(?P<sign>[+-]?)\s*(?:US)?(?P<currency>\\?[$€£¥₹])\s*(?=[+-]?[\d.])")
_RATE = re.compile(r"(?P<value>.*\d)\s*/\s*(?P<per>[a-z]{3,})\.?")
_WORDS = re.compile(r"[^\W\d_][^\d=+*/^\\<>|{}\[\]()]*")
_FUNCTION = re.compile(r"\b(?:arc(?:sin|cos|tan)|(?:sin|cos|tan)h|lambda|sigma|omega|delta|gamma|floor|ceil)\b")
_SHORT_WORDS = ("yes", "no", "odd", "all", "red")
_ARTICLE = re.compile(r"^(?:a|an|the)\s+(?=\S)")


@dataclass(frozen=True)
class Plain:
    """An answer that needs no algebra.

    kind: "number", "date", "time", "base", "choice", "words" or "dots" (a list with an ellipsis). value: what answers
    of the kind are compared by. unit: (dimension, size) of a number, None without a known unit. percent: the number is
    a percentage. decimal: it was written with a decimal point. name: the variable that it was given to ("x = 5").
    """

    kind: str
    value: object
    unit: tuple[str, Fraction] | None = None
    percent: bool = False
    decimal: bool = False
    name: str = ""

    @property
    def rational(self) -> Fraction | None:
        """The exact value of a bare number, which alone decides; None for everything else."""
        bare = self.kind == "number" and self.unit is None and not self.percent and not self.name
        return self.value if bare and isinstance(self.value, Fraction) else None


@lru_cache(maxsize=65536)
def read_plain(answer: str) -> Plain | None:
    """Return an answer that needs no algebra, None for one that may."""
    if len(answer) > MAX_PLAIN_LENGTH:
        return None
    raw = to_latex(answer)
    raw = re.sub(r"\\(?:left|right|displaystyle|,|;|:|!|quad|qquad)(?![a-zA-Z])|\\ |~", " ", raw)
    in_text = "\\text" in raw or "\\mathrm" in raw or "\\mbox" in raw
    text = " ".join(without_text_commands(raw).split()).strip('"\u201c\u201d\u2018\u2019')
    text = text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text
    text = text[1:-1].strip() if re.fullmatch(r"\{[^{}\\,]*\}", text) else text
    if not text:
        return None
    return (
        _date(text)
        or _time(text)
        or _base(text)
        or _number(text, in_text)
        or _dots(text)
        or _choice(text)
        or _words(text, in_text)
    )


# ---- numbers --------------------------------------------------------------------------------------------------------


def _number(text: str, in_text: bool) -> Plain | None:
    """Return a number with its name, currency, unit or percent sign."""
    name = ""
    if (named := _NAMED.match(text)) is not None:
        name, text = named[1] if len(named[1]) == 1 or "_" in named[1] else "", text[named.end() :]
    value = exact_number(text)
    if value is not None:
        return Plain("number", value, decimal=_is_decimal(text), name=name)
    if (percent := _PERCENT.search(text)) is not None:
        value = exact_number(text[: percent.start()])
        return None if value is None else Plain("number", value, percent=True, decimal=_is_decimal(text), name=name)
    unit = None
    if (currency := _CURRENCY.match(text)) is not None:
        unit = UNITS[currency["currency"].lstrip("\\")]
        text = currency["sign"] + text[currency.end() :]
        value = exact_number(text)
        if value is not None:
            return Plain("number", value, unit=unit, decimal=_is_decimal(text), name=name)
    return _with_unit(text, unit, in_text, name)


def _with_unit(text: str, unit: tuple[str, Fraction] | None, in_text: bool, name: str) -> Plain | None:
    """Return a number before a unit, a scale ("million") or other words."""
    if (duration := _DURATION.fullmatch(text.lower())) is not None:
        first, second = UNITS[_unit_name(duration[2])], UNITS[_unit_name(duration[4])]
        if first[1] > second[1]:
            seconds = int(duration[1]) * first[1] + int(duration[3]) * second[1]
            return Plain("number", seconds, unit=("time", Fraction(1)), name=name)
    if (rate := _RATE.fullmatch(text)) is not None and (rate["per"] in UNITS or rate["per"] in PER):
        value = exact_number(rate["value"])
        return None if value is None else Plain("number", value, unit=unit, decimal=_is_decimal(text), name=name)
    for match in re.finditer(r"(?<=[\d}.)])(?=\s*[^\d\s.,/)}-])", text):
        value, tail = exact_number(text[: match.start()]), text[match.start() :]
        if value is None:
            continue
        decimal = _is_decimal(text[: match.start()])
        scale = re.match(rf"\s*({'|'.join(SCALES)})s?\b", tail, re.IGNORECASE)
        if scale is not None:
            value, tail = value * SCALES[scale[1].lower()], tail[scale.end() :]
            if not tail.strip():
                return Plain("number", value, unit=unit, decimal=decimal, name=name)
        found = _UNIT.fullmatch(tail)
        if found is None:
            continue
        known = _known_unit(found["unit"], bool(found["gap"]), in_text)
        if known is False:
            continue
        return Plain("number", value, unit=unit or known, decimal=decimal, name=name)
    return None


def _unit_name(word: str) -> str:
    return {"m": "min", "hrs": "hr"}.get(word, word)


def _known_unit(text: str, gap: bool, in_text: bool) -> tuple[str, Fraction] | None | Literal[False]:
    """Return a unit's dimension and size, None for other words after a number, False for what may be algebra."""
    unit = re.sub(r"\^\s*\{?\s*\\circ\s*\}?\s*", r"^\\circ ", text).strip().lower().lstrip("\\").strip(" .")
    unit = "^\\circ" + unit.removeprefix("^\\circ").rstrip() if unit.startswith("^\\circ") else unit
    unit = re.sub(r"\^\{(\d)\}", r"^\1", unit)
    if unit in UNITS and unit not in ("c", "f"):
        if unit in NEED_SPACE and not (gap or in_text):
            return False
        if unit in CAPITALS and not text.strip(" .").isupper():
            return False
        return UNITS[unit]
    words = unit.split()
    if not words or any(word.strip(".,'") in NOT_UNITS for word in words) or len(words) > 6:
        return False
    first = words[0]
    if first in UNITS and first not in (*NEED_SPACE, "c", "f", "in") and len(words) > 1 and words[1] not in ("per",):
        return UNITS[first] if "/" not in unit else None
    if not first.isascii():
        return UNITS.get(first)
    if not all(re.fullmatch(r"[^\W\d_](?:[^\W\d_]|[.'/-])*", word) for word in words):
        return False
    return None if len(first) >= 3 and (gap or in_text) or in_text and len(first) > 1 else False


def exact_number(text: str) -> Fraction | None:
    """Return the exact value of an integer, decimal, fraction, mixed number, power or recurring decimal, or None."""
    text = text.strip()
    text = text[1:-1].strip() if re.fullmatch(r"\(\s*[+-]?[\d.,/]+\s*\)", text) and not _has_list(text) else text
    if (spelled := number_of_words(text) if text[:1].isalpha() else None) is not None:
        return spelled
    for form in _FORMS:
        if (match := form.fullmatch(text)) is not None:
            value = _value(match)
            return None if value is None else -value if match["sign"] == "-" else value
    return None


def _has_list(text: str) -> bool:
    return "," in text and re.fullmatch(r"\(\s*[+-]?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?\s*\)", text) is None


def _value(match: re.Match[str]) -> Fraction | None:
    parts = match.groupdict()
    if parts.get("number") is not None:
        value, e = _decimal(parts["number"]), int(parts["e"] or 0)
        return value * Fraction(10) ** e if abs(e) <= _MOST_EXPONENT else None
    if parts.get("power") is not None:
        return _power(parts["power"])
    again = parts.get("again") or parts.get("again2") or parts.get("again3")
    if again is not None:
        fixed = parts["fixed"]
        ninths = Fraction(int(again), 10 ** len(again) - 1)
        return int(parts["start"] or 0) + (int(fixed or 0) + ninths) / 10 ** len(fixed)
    above, below = (_power(parts[part] or parts.get(f"{part}1") or "") for part in ("above", "below"))
    if above is None or not below:
        return None
    whole = parts.get("whole") or ""
    if whole and (above < 0 or below < 0):
        return None
    return int(whole or 0) + above / below


def _power(text: str) -> Fraction | None:
    base, _, exponent = text.replace(" ", "").partition("^")
    sign = -1 if base.startswith("-") else 1
    value = _decimal(base.lstrip("+-"))
    if exponent:
        e = int(exponent.strip("{}"))
        digits = max(len(str(value.numerator)), len(str(value.denominator)))
        if abs(e) > _MOST_EXPONENT or digits * abs(e) > _MOST_DIGITS or (value == 0 and e <= 0):
            return None
        value = value**e
    return sign * value


def _decimal(text: str) -> Fraction:
    plain = text.replace("{,}", "").replace(",", "")
    return Fraction(plain + "0" if plain.endswith(".") else plain)


def _is_decimal(text: str) -> bool:
    return re.search(r"\.\d", text) is not None and "\\overline" not in text


# ---- other kinds ----------------------------------------------------------------------------------------------------


def _date(text: str) -> Plain | None:
    if (match := _DATE.fullmatch(text)) is not None:
        return Plain("date", tuple(int(part) for part in match.groups()))
    if (match := _OTHER_DATE.fullmatch(text)) is not None:
        return Plain("date", ("text", *(int(part) for part in match.groups() if part is not None)))
    if (match := _LONG_DATE.fullmatch(text.lower())) is not None:
        month, day, year = (match[1], match[2], match[3]) if match[1] else (match[5], match[4], match[6])
        return Plain("date", (int(year), MONTHS[month], int(day))) if month in MONTHS else None
    return None


def _time(text: str) -> Plain | None:
    """Return a time of day: (hour, minute, second, known to be in 24 hours or half of the day)."""
    if text.lower() in ("noon", "midnight"):
        return Plain("time", (12 if text.lower() == "noon" else 0, 0, 0, True))
    if (match := _TIME.fullmatch(text)) is None or (match[2] is None and match[4] is None):
        return None
    hour, minute, second = int(match[1]), int(match[2] or 0), int(match[3] or 0)
    half = (match[4] or "").lower().replace(".", "")
    if half == "pm":
        hour = hour if hour == 12 else hour + 12
    elif half == "am":
        hour = 0 if hour == 12 else hour
    if hour > 24:
        return None
    return Plain("time", (hour, minute, second, half in ("am", "pm") or hour > 12))


def _base(text: str) -> Plain | None:
    if (match := _BASE.fullmatch(text)) is None:
        return None
    base = int(match[2] or match[3] or _BASES[match[4]])
    return Plain("base", (match[1].lower().lstrip("0"), base))


def _dots(text: str) -> Plain | None:
    if _DOTS.search(text) is None or "," not in text:
        return None
    return Plain("dots", re.sub(r"\s+", "", _DOTS.sub("...", text)))


def _choice(text: str) -> Plain | None:
    if (match := _CHOICE.fullmatch(text)) is not None:
        return Plain("choice", (match[1] or match[2] or match[3]).casefold())
    if (match := _CHOICE_TEXT.fullmatch(text)) is not None:
        return Plain("choice", (match[1] or match[2]).casefold())
    return None


def _words(text: str, in_text: bool) -> Plain | None:
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(
        ".,;:!?\"'`*_ \u201c\u201d\u2018\u2019"
    )
    if plain in SYNONYMS:
        return Plain("words", SYNONYMS[plain])
    if _WORDS.fullmatch(text) is None:
        return None
    longest = max((len(word) for word in re.findall(r"[^\W\d_]+", plain)), default=0)
    words = in_text and longest > 1 or longest >= 4 and re.search(r"[aeiouy]|[^\x00-\x7f]", plain) is not None
    words = (words and _FUNCTION.search(plain) is None) or plain in _SHORT_WORDS
    return Plain("words", _ARTICLE.sub("", plain)) if words or not plain.isascii() else None
