"""Read numbers that are written in English words: "three hundred and five", "two thirds", "one and a half"."""

from __future__ import annotations

import re
from fractions import Fraction

from calm_fast.consistency.answers.units import LARGE_WORDS, NUMBER_WORDS, PARTS

_LONGEST = 20  # words of a number


def number_of_words(text: str) -> Fraction | None:
    """Return the value of a number in English words and nothing else; None for other text."""
    words = re.split(r"[\s-]+", text.strip().lower())
    if len(words) > _LONGEST or not words[0].isalpha():
        return None
    if words[-1] not in PARTS:
        value = _integer(words)
        return None if value is None else Fraction(value)
    if words == ["half"]:
        return Fraction(1, 2)
    plural, below, words, whole = words[-1][-1] == "s", PARTS[words[-1]], words[:-1], 0
    if "and" in words:
        place = len(words) - 1 - words[::-1].index("and")
        start = _integer(words[:place])
        if start is None or start == 0:
            return None
        whole, words = start, words[place + 1 :]
    above = 1 if words in (["a"], ["an"]) else _integer(words)
    # "third" and "twenty-third" are places in an order
    if not above or (above > 1) is not plural or (whole and above >= below):
        return None
    return whole + Fraction(above, below)


def _integer(words: list[str]) -> int | None:
    """Return the value of words such as two thousand three hundred and five; None if they are no single number."""
    total, group, largest = 0, 0, 10**15
    previous = ""  # the kind of the word before: "one", "ten", "hundred", "large" or "and"
    for place, word in enumerate(words):
        if word == "and":
            if previous not in ("hundred", "large") or place == len(words) - 1:
                return None
            previous = "and"
        elif word in ("a", "an") and place == 0 and len(words) > 1 and words[1] in ("hundred", *LARGE_WORDS):
            group, previous = 1, "one"
        elif word == "hundred":
            if previous not in ("one", "") or group >= 100:
                return None
            group, previous = 100 * (group or 1), "hundred"
        elif word in LARGE_WORDS:
            if LARGE_WORDS[word] >= largest or previous in ("large", "and") or (previous and not group):
                return None
            largest = LARGE_WORDS[word]
            total, group, previous = total + largest * (group or 1), 0, "large"
        elif word in NUMBER_WORDS:
            number = NUMBER_WORDS[word]
            after_ten = previous == "ten" and 0 < number < 10
            if not (after_ten or previous in ("", "hundred", "large", "and")) or (number == 0 and len(words) > 1):
                return None
            group, previous = group + number, "ten" if number >= 20 else "one"
        else:
            return None
    return total + group if previous else None
