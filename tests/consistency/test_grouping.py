"""Grouping of equal answers under every rule of equality, and errors for bad input."""

from __future__ import annotations

import itertools
import random
import threading

import pytest
import torch

from calm_fast.consistency import extract_answer, group_answers, read_rows
from calm_fast.consistency.answers.equality import (
    first_match_classes,
    normalise,
    parse_math,
    quick_verdict,
    verify_both,
)
from calm_fast.consistency.answers.plain import exact_number
from calm_fast.consistency.answers.verdicts import numbers_equal

# one question: the gold answer, then samples; None where nothing was found
GOLD = r"\frac{1}{2}"
ROW = ["0.5", None, r"\dfrac12", "2", r"\frac{2}{4}", "  ", r"x+1", "1+x", "2.0", r"\sin^2 t+\cos^2 t+1"]
CLASSES = [0, 0, 0, 1, 0, 0, 2, 2, 1, 1]
VALID = [True, False, True, True, True, False, True, True, True, True]

ANSWERS = [
    "5", "5.0", "+5", "007", "7", "-5", "5\\%", "0.05", "1/20", "50%", r"0.5", ".5", r"\frac{1}{2}", r"\frac12",
    "1,000", "1000", "1,0", "0,1", "(0,1)", "[0,1]", r"\{0,1\}", "x=5", "y=5", "5 cm", "5^\\circ", r"\$5", "1 1/2",
    "11/2", r"1\frac{1}{2}", "1.5", "1/3", "0.333333", "0.33", r"\sqrt{8}", r"2\sqrt{2}", "2.828427", r"\infty",
    r"-\infty", "1/0", "x+1", "1+x", "x", r"\cos a", r"\cos  a", "a b", "ab", "yes", r"\text{Yes}", r"\text{no}",
    "10^{20}", "10^{20}+1", "1+i", "i+1", "1-i", r"\pi", "3.14159265", r"x^2-1", "(x-1)(x+1)", "x>1", "1<x",
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", "", r"\frac", "a", "A",
]  # fmt: skip


def test_equal_answers_share_a_class_and_none_never_votes() -> None:
    groups = group_answers([ROW, ["3"], []], gold=[GOLD, None, "7"], workers=1)
    assert groups.answers.dtype == groups.correct.dtype == torch.int64 and groups.valid.dtype == torch.bool
    assert groups.answers.tolist() == [CLASSES, [0] * 10, [0] * 10]
    assert groups.valid.tolist() == [VALID, [True] + [False] * 9, [False] * 10]
    assert groups.correct.tolist() == [0, -1, 0]
    assert groups.texts == [[GOLD, "2", "x+1"], ["3"], ["7"]]
    assert groups.timeouts == 0 and groups.given_up == ()


def test_without_gold_classes_count_from_the_first_answer() -> None:
    groups = group_answers([["2", GOLD, None, "0.5"]])
    assert groups.answers.tolist() == [[0, 1, 0, 1]] and groups.correct.tolist() == [-1]
    assert groups.texts == [["2", GOLD]]


@pytest.mark.parametrize("answers", [[], [[]], [[], [None, " "]]])
def test_nothing_to_group(answers) -> None:
    groups = group_answers(answers)
    assert groups.answers.shape == (len(answers), max(map(len, answers), default=0)) == groups.valid.shape
    assert not groups.valid.any() and groups.texts == [[] for _ in answers]


@pytest.mark.slow
def test_pairs_agree_with_plain_math_verify() -> None:
    """Every pair of a list of awkward answers that no rule decides."""
    pairs = [pair for pair in itertools.combinations(ANSWERS, 2) if quick_verdict(*pair) is None]
    groups = group_answers([[right] for _, right in pairs], gold=[left for left, _ in pairs], workers=2)
    parsed = {text: parse_math(text, 5) for text in ANSWERS}
    wrong = [
        (left, right)
        for number, (left, right) in enumerate(pairs)
        if verify_both(parsed[left], parsed[right], 5)
        is not bool(groups.valid[number, 0] and groups.answers[number, 0] == groups.correct[number])
    ]
    assert wrong == [] and groups.timeouts == 0


@pytest.mark.slow
def test_real_pairs_agree_with_plain_math_verify(shared_data) -> None:
    """100 random pairs of answers to the same question that no rule decides; half of them with the right answer."""
    rows = read_rows(shared_data / "math_gpt35_dev.jsonl.gz")
    draw = random.Random(0)
    pairs = []
    while len(pairs) < 100:
        row = draw.choice(rows)
        texts = [extract_answer(text) for text in row["generated_answer"]]
        left = extract_answer(row["answer"]) if len(pairs) % 2 else draw.choice(texts)
        right = draw.choice(texts)
        if left and right and normalise(left) != normalise(right) and quick_verdict(left, right) is None:
            pairs.append((left, right))
    groups = group_answers([[right] for _, right in pairs], gold=[left for left, _ in pairs])
    plain = [verify_both(parse_math(left, 5), parse_math(right, 5), 5) for left, right in pairs]
    assert groups.answers[:, 0].eq(0).tolist() == plain


@pytest.mark.slow
def test_real_answers_are_grouped_and_counted(shared_data) -> None:
    rows = read_rows(shared_data / "math_gpt35_dev.jsonl.gz", 120)
    answers = [[extract_answer(text) for text in row["generated_answer"]] for row in rows]
    gold = [extract_answer(row["answer"]) for row in rows]
    one, two = (group_answers(answers, gold=gold, workers=n) for n in (1, 2))
    assert torch.equal(one.answers, two.answers) and one.texts == two.texts and one.timeouts == 0
    right = (one.valid & (one.answers == 0)).float().mean()
    assert 0.2 < right < 0.5


@pytest.mark.parametrize(
    ("equality", "row", "classes"),
    [
        ("exact", ["1", "1.0", "1", " 1"], [0, 1, 0, 2]),
        ("text", ["The Eiffel  tower.", "eiffel tower", "“Eiffel Tower”", "tower"], [0, 0, 0, 1]),
        ("text", ["A", "a", "A.", "B"], [0, 0, 0, 1]),
        ("text", ["STRASSE", "straße", "Ｓtrasse", "?", "!"], [0, 0, 0, 1, 2]),
        ("text", ["-5", "5", "$5", "5%"], [0, 1, 2, 3]),
        (lambda a, b: len(a) == len(b), ["ab", "x", "cd", "y"], [0, 1, 0, 1]),
        (lambda a, b: a[0] == b[-1], ["ab", "ba", "cc"], [0, 0, 1]),
    ],
)
def test_other_ways_to_be_equal(equality, row, classes) -> None:
    groups = group_answers([row, [None]], equality=equality)
    assert groups.answers[0].tolist() == classes
    assert not groups.valid[1].any()


def test_infinity_equals_only_itself_and_huge_numbers_overflow_nothing() -> None:
    row = ["5", r"\infty", "10^{400}+10^{400}i", "9" * 400, r"\cos a", "1/0", r"\tan(\frac{\pi}{2})"]
    groups = group_answers([row], workers=1)
    assert groups.answers.tolist() == [list(range(len(row)))] and groups.timeouts == 0
    # math-verify alone would raise 9 to a power of 370 million digits
    assert group_answers([["5", r"9^{9^{9}}", "x+1", "1000000!"]], workers=1).answers.tolist() == [[0, 1, 2, 3]]
    assert group_answers([row], gold=[r"\infty"], workers=1).answers[0].eq(0).tolist() == [t == r"\infty" for t in row]


def test_very_long_answers_are_compared_as_text() -> None:
    long = "x+" * 5_000_000 + "1"
    groups = group_answers([[long, "1", long + " ", long + "1", "9" * 5000, "9" * 5001]])
    assert groups.answers.tolist() == [[0, 1, 0, 2, 3, 4]]


def test_surrogates_and_control_characters_pass() -> None:
    row = ["\ud83d", "\0", "a\nb", "\x1b[0m", "x+1", "1+x"]
    assert group_answers([row]).answers.tolist() == [[0, 1, 2, 3, 4, 4]]


def test_it_works_in_another_thread() -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(group_answers([["x+2", "2+x", "x"]]).answers.tolist()))
    thread.start()
    thread.join()
    assert found == [[[0, 0, 1]]]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"answers": "12"}, TypeError, "`answers` must be a sequence of sequences, got str"),
        ({"answers": ["12"]}, TypeError, r"`answers\[0\]` must be a sequence, got str"),
        ({"answers": [["1"], ["1", 2]]}, TypeError, r"`answers\[1\]\[1\]` must be a string or None, got int"),
        ({"gold": "1"}, TypeError, "`gold` must be a sequence, got str"),
        ({"gold": ["1", "2"]}, ValueError, "`gold` must have one entry for each of 1 questions, got 2"),
        ({"gold": [1.0]}, TypeError, r"`gold\[0\]` must be a string or None, got float"),
        ({"equality": "maths"}, ValueError, "`equality` must be one of .*'text'.* or a function, got 'maths'"),
        ({"workers": 0}, ValueError, "`workers` must be a positive integer or None, got 0"),
        ({"workers": True}, ValueError, "`workers`"),
        ({"timeout": 0}, ValueError, "`timeout` must be a positive number of seconds, got 0"),
        ({"timeout": float("nan")}, ValueError, "`timeout`"),
    ],
)
def test_bad_arguments_are_named(kwargs, error, message) -> None:
    with pytest.raises(error, match=message):
        group_answers(**{"answers": [["1"]], **kwargs})


def test_the_first_matching_class_wins() -> None:
    # 1 equals 0 and 2, but 0 and 2 differ: the class of the first answer takes 1
    equal = {(0, 1), (1, 2)}
    assert first_match_classes(3, lambda i, j: (i, j) in equal) == [0, 0, 1]
    assert first_match_classes(0, lambda i, j: True) == []


def test_a_decimal_may_round_a_fraction_that_has_no_end() -> None:
    third, half = exact_number("1/3"), exact_number("1/2")
    assert numbers_equal(third, exact_number("0.333333"), False, True)
    assert not numbers_equal(third, exact_number("0.33333"), False, True)
    assert not numbers_equal(half, exact_number("0.5000001"), False, True)  # 1/2 has an end
    assert not numbers_equal(exact_number("0.333333"), exact_number("0.3333333"), True, True)
    assert not numbers_equal(exact_number("1" + "0" * 20), exact_number("1" + "0" * 19 + "1"))
    huge = exact_number("1" + "0" * 400)  # no float
    assert not numbers_equal(huge, 2 * huge) and numbers_equal(huge, huge)


@pytest.mark.parametrize("end", ["#### 7", r"So it is \boxed{7}.", "The answer is 7."])
@pytest.mark.parametrize("sentences", [1, 100, 130, 1000])
def test_gold_may_be_a_solution_of_any_length(sentences, end):
    """Beyond 1,000 characters texts are compared as they are, so the answer has to be found first."""
    groups = group_answers([["7", "8"]], gold=["x is 5. " * sentences + "\n" + end], workers=1)
    assert groups.answers.tolist() == [[0, 1]]


@pytest.mark.parametrize("equality", ["exact", "text", "math", lambda left, right: left == right])
def test_gold_of_an_answers_length_is_compared_as_it_is_given(equality):
    groups = group_answers([["Answer: 5", "Answer: 6"]], gold=["Answer: 5"], equality=equality, workers=1)
    assert groups.answers.tolist() == [[0, 1]]
