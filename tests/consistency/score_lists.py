"""Score labelled lists of texts and pairs: our rules beside math-verify alone, as docs/consistency.md reports them.

    python tests/consistency/score_lists.py [TEXTS.jsonl PAIRS.jsonl]

A text has `text`, `answer` (null: there is none) and `style`; a pair has `left`, `right`, `equal` and `style`.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calm_fast.consistency import extract_answer, group_answers

DATA = Path(__file__).parent / "data"
Row = dict[str, Any]


def read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def our_texts(texts: Sequence[Row]) -> list[bool]:
    """Return for each text whether the right answer was found."""
    found = [extract_answer(row["text"]) for row in texts]
    groups = group_answers([[text] for text in found], gold=[row["answer"] for row in texts], workers=1)
    right = groups.right[:, 0].tolist()
    return [right[i] if row["answer"] is not None else found[i] is None for i, row in enumerate(texts)]


def our_pairs(pairs: Sequence[Row]) -> list[bool]:
    """Return for each pair whether it was judged right, the left answer as the gold one."""
    groups = group_answers([[row["right"]] for row in pairs], gold=[row["left"] for row in pairs], workers=1)
    return [same is row["equal"] for row, same in zip(pairs, groups.right[:, 0].tolist(), strict=True)]


def _boxed(answer: str) -> list[Any]:
    from math_verify import parse

    return list(parse(f"\\boxed{{{answer}}}"))


def other_texts(texts: Sequence[Row]) -> list[bool]:
    """Return what `our_texts` does, of math-verify with its default settings, which reads the whole text."""
    from math_verify import parse, verify

    found = [list(parse(row["text"])) for row in texts]
    return [
        not answer if row["answer"] is None else bool(verify(_boxed(row["answer"]), answer))
        for row, answer in zip(texts, found, strict=True)
    ]


def other_pairs(pairs: Sequence[Row]) -> list[bool]:
    """Return what `our_pairs` does, of math-verify."""
    from math_verify import verify

    return [bool(verify(_boxed(row["left"]), _boxed(row["right"]))) is row["equal"] for row in pairs]


def main() -> None:
    files = [Path(name) for name in sys.argv[1:]] or [DATA / "answers_in_texts.jsonl", DATA / "equal_answers.jsonl"]
    texts, pairs = map(read, files)
    for name in ("math-verify", "latex2sympy2_extended", "sympy"):
        print(name, importlib.metadata.version(name))
    our_verdicts, other_verdicts = our_pairs(pairs), other_pairs(pairs)
    for name, rows, ours, other in (
        ("texts", texts, our_texts(texts), other_texts(texts)),
        ("pairs", pairs, our_verdicts, other_verdicts),
    ):
        print(f"{name}: {sum(ours)} of {len(rows)}, math-verify {sum(other)}")
        for label, count in Counter(row.get("style") for row in rows).items():
            scores = [(ours[i], other[i]) for i, row in enumerate(rows) if row.get("style") == label]
            mine, theirs = map(sum, zip(*scores, strict=True))
            print(f"  {label}: {mine} of {count}, math-verify {theirs}")
        for row, right in zip(rows, ours, strict=True):
            if not right:
                print("  wrong:", json.dumps(row, ensure_ascii=False))
    for who, right in (("calm_fast", our_verdicts), ("math-verify", other_verdicts)):
        called = sum(not ok and not row["equal"] for ok, row in zip(right, pairs, strict=True))
        print(f"{who} calls {called} pairs equal that are not")


if __name__ == "__main__":
    main()
