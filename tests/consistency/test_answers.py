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
        (r"\fbox{7} cm", "7"),
        (r"\boxed {8}", "8"),
        (r"twice \boxed{\boxed{3}}", "3"),
        (r"a row \boxed{a \\}", r"a \\"),
        (r"\boxed{2} and { and } and }", "2"),
        ("The final answer is: **$3.5$**.\nThank you.", "3.5"),
        ("The answer is 3. The answer is", "3"),
        ("\\boxed{" * 200_000, None),
        ("The answer is " + " " * 1_000_000, None),
        ("a" * 10_000_000 + r"\boxed{1}" + "}" * 1000, "1"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)
def test_the_final_answer_is_found(text, answer) -> None:
    assert extract_answer(text) == answer


def test_a_pattern_of_the_user_comes_last() -> None:
    assert extract_answer("result=7;", r"result=(\d+)") == "7"
    assert extract_answer(r"result=7; \boxed{8}", r"result=(\d+)") == "8"
    assert extract_answer("none", r"result=(\d+)") is None
    assert extract_answer("#### 1\n#### 2", r"#### .*") == "2"  # read without a pattern too
    assert extract_answer("@@ 1\n@@ 2", r"@@ .*") == "@@ 2"
    assert extract_answer("a=", r"a=(\d)?") is None


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="`text` must be a string, got NoneType"):
        extract_answer(None)
    with pytest.raises(ValueError, match="`pattern` must be a regular expression"):
        extract_answer("x", "(")


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
        (r"\cos  a", r"\cos(a)", True),
        ("1/3", "0.3333333", True),  # math-verify rounds decimals to 6 places
        ("1 1/2", "11/2", False),
        (r"1\frac{2}{3}", "5/3", True),
        (r"\frac58", "0.625", True),
        (r"-1\tfrac12", "-1.5", True),
        ("30,\\!240", "30{,}240", True),
        (r"\$5.", "5", True),
        (".5", "1/2", True),
        ("12,34", "1234", False),
        ("110111", "110111_2", True),  # the question names the base
        ("0_2", "0", True),
        ("52_8", "42", False),
        ("52_8", "52_{10}", False),
        (r"50\%", "1/2", True),
        (r"50\%", "50", True),
        ("5 cm", "5", True),
        ("2,1", "1,2", True),
        ("(2,1)", "(1,2)", False),
        ("9" * 5000, "9" * 5001, False),
        (r"\text{Monday}", r"\text{Tuesday}", False),
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
