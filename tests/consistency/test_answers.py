"""Extraction and equivalence of answers."""

from __future__ import annotations

import threading

import pytest

from calm_fast.consistency import equivalent, extract_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $x=\boxed{9}$.", "9"),
        (r"\boxed{1} no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"nested \boxed{\text{a {b} c}}", r"\text{a {b} c}"),
        (r"first \boxed{3}, then unfinished \boxed{4", "3"),
        (r"escaped \boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("We add. The answer is 12 apples.", "12 apples"),
        ("The answer is 3. No: the answer is 4.", "4"),
        (r"The answer is 5 km, that is \boxed{5}.", "5"),
        ("nothing here", None),
        (r"\boxed{}", None),
        ("", None),
    ],
)
def test_the_final_answer_is_found(text, answer) -> None:
    assert extract_answer(text) == answer


def test_a_pattern_of_the_user_comes_last() -> None:
    assert extract_answer("result=7;", r"result=(\d+)") == "7"
    assert extract_answer(r"result=7; \boxed{8}", r"result=(\d+)") == "8"
    assert extract_answer("none", r"result=(\d+)") is None


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("9", "9", True),
        (r"\dfrac{1}{2}", r"\frac{1}{2}", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"-\frac{3}{4}", "-0.75", True),
        ("1,000", "1000", True),
        ("2/4", "1/2", True),
        ("1/3", "0.333", False),
        ("6", "9", False),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        ("x+1", "1+x", True),
        ("x+1", "x-1", False),
        (r"\cos a", r"\cos a", True),
        (r"\infty", "5", False),
        ("1/0", "1/0", True),  # the same string, whatever it means
        ("1/0", "2", False),
        ("", "", False),
        (None, None, False),
        (None, "1", False),
    ],
)
def test_equivalence(left, right, same) -> None:
    assert equivalent(left, right) is same
    assert equivalent(right, left) is same


def test_other_threads_are_told_why() -> None:
    caught = []

    def compare() -> None:
        try:
            equivalent("x+2+3", "x+5")
        except RuntimeError as problem:
            caught.append(str(problem))

    thread = threading.Thread(target=compare)
    thread.start()
    thread.join()
    assert caught and "main thread" in caught[0]
