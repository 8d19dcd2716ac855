"""Kinds of answers that a third list of texts and pairs showed: numbers in words, qualified labels, brackets, units."""

from __future__ import annotations

from fractions import Fraction

import pytest

from calm_fast.consistency import equivalent, extract_answer
from calm_fast.consistency.answers.equality import quick_verdict
from calm_fast.consistency.answers.number_words import number_of_words


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("zero", 0), ("nineteen", 19), ("twenty-one", 21), ("hundred", 100), ("three hundred and five", 305),
        ("two thousand three hundred", 2300), ("nineteen hundred", 1900), ("a million", 10**6), ("a dozen", 12),
        ("one hundred twenty thousand and six", 120_006), ("half", Fraction(1, 2)), ("one half", Fraction(1, 2)),
        ("a quarter", Fraction(1, 4)), ("two-thirds", Fraction(2, 3)), ("three halves", Fraction(3, 2)),
        ("two and a half", Fraction(5, 2)), ("one hundred and one third", Fraction(301, 3)),
        ("one hundredth", Fraction(1, 100)),
        # places, lists, times and other words are no numbers
        ("third", None), ("twenty-fifth", None), ("one second", None), ("halves", None), ("two three", None),
        ("twenty thirty", None), ("hundred hundred", None), ("thousand thousand", None), ("and five", None),
        ("five and", None), ("twenty and one", None), ("zero five", None), ("a", None), ("a five", None), ("", None),
        ("one two thirds", None), ("five third", None), ("one thirds", None), ("zero and a half", None),
        ("one and three halves", None), ("one " * 50, None), ("alone", None),
    ],
)  # fmt: skip
def test_numbers_in_words(text, value) -> None:
    assert number_of_words(text) == value


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is $(\\pi, 2)$.", "(\\pi, 2)"),
        ("The answer is $2\\cos(\\theta)$.", "2\\cos(\\theta)"),
        ("The answer is $\\log(xy)$.", "\\log(xy)"),
        ("The answer is 5 cm (about 2 in).", "5 cm"),
        ("The answer is 12(twelve).", "12"),
        ("The answer is 2/3 of the cake.", "2/3"),
        ("Answer (in km): 7", "7"),
        ("Answer (5)\nWe add.", None),
        ("The answer is option d.", "D"),
        ("The answer is a) 5 and b) 7.", "a) 5 and b) 7"),
        ("The answer is (a)(b).", "(a)(b)"),
        ("The answer's length is 5.", None),
        ("So the answer is found to be 8.", "8"),
        ("We obtain the final answer $8$.", "8"),
        ("I take 8 as my final answer.", "8"),
        ("Solution: 8", "8"),
        ("Solution: 8 apples are left, so we go on.", None),
        ("答案：她一共花了12元。", "12"),
        ("答案：3月5日", "3月5日"),
    ],
)
def test_answers_in_texts(text, answer) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        ("5 N", "5", True), ("5 n", "5", None), ("3 kJ", "3000 J", True), ("3 J", "3 W", False), ("5pa", "5", None),
        ("18/day", "18", True), ("18/abc", "18", None), ("$18/hour", "$18", True), ("H_2O", "H2O", True),
        ("CO_2", "CO", None), ("all real numbers", "some real numbers", False), ("two-thirds", "2/3", True),
    ],
)  # fmt: skip
def test_rules(left, right, equal) -> None:
    assert quick_verdict(left, right) is equal and quick_verdict(right, left) is equal


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        ("2\\sqrt[3]{-8}", "-4", True), ("\\sqrt[3]{-8}", "2", False), ("\\sqrt[4]{-16}", "-2", False),
        ("\\text{all real numbers}", "(-\\infty,\\infty)", True), ("\\mathbb{R}", "(0,\\infty)", False),
    ],
)  # fmt: skip
def test_algebra(left, right, equal) -> None:
    assert equivalent(left, right) is equal and equivalent(right, left) is equal
