"""`calm-fast vote --compare`: every rule against its definition in plain Python, over all orders of the samples."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from calm_fast._ops.maj_at_k.api import vote_credit
from calm_fast.cli import app
from calm_fast.consistency import Groups, write_rows
from calm_fast.consistency.voting.compare import compare
from calm_fast.consistency.voting.orders import count_prefixes, draw_orders
from calm_fast.consistency.voting.report import VoteSettings, run

ROOT = Path(__file__).resolve().parents[2]
GOLD = 0
Sample = tuple[int | None, float | None]  # class of the answer, score


# ---- the definitions ------------------------------------------------------------------------------------------------


def share(weights: dict[int, float]) -> float:
    """1 / ties if the gold answer is among the heaviest, else 0."""
    top = max(weights.values(), default=0)
    tied = [answer for answer, weight in weights.items() if weight >= top * (1 - 1e-9)]
    return 1 / len(tied) if GOLD in tied else 0.0


def majority(samples: list[Sample]) -> float:
    return share(Counter(answer for answer, _ in samples if answer is not None))


def best(samples: list[Sample]) -> float:
    answered = [(-math.inf if score is None else score, answer) for answer, score in samples if answer is not None]
    leading = [answer for score, answer in answered if score == max(answered)[0]]
    return leading.count(GOLD) / len(leading) if leading else 0.0


def by_scores(samples: list[Sample], base: float) -> float:
    """The vote with weights base + score; a sample without a score has the mean of those that vote here."""
    known = [score for answer, score in samples if answer is not None and score is not None]
    mean = sum(known) / len(known) if known else 1.0
    weights: dict[int, float] = {}
    for answer, score in samples:
        if answer is not None:
            weights[answer] = weights.get(answer, 0.0) + base + (mean if score is None else score)
    return share(weights)


def windows_drawn(samples: list[Sample], window: int) -> int:
    for start in range(0, len(samples), window):
        answers = [answer for answer, _ in samples[start : start + window]]
        if len(answers) == window and None not in answers and len(set(answers)) == 1:
            return start + window
    return len(samples)


def confidently_drawn(samples: list[Sample], threshold: float) -> int:
    for drawn in range(1, len(samples) + 1):
        counts = Counter(answer for answer, _ in samples[:drawn] if answer is not None)
        top, second = ([n for _, n in counts.most_common(2)] + [0, 0])[:2]
        n = top + second + 1
        behind = sum(Fraction(math.comb(n, i), 2**n) for i in range(second + 1))
        if (1 - behind if top > second else Fraction(1, 2)) >= Fraction(threshold):
            return drawn
    return len(samples)


def definitions(questions: list[list[Sample]], ks: range) -> dict[tuple[str, float], tuple[float, float]]:
    """(method, setting) -> mean samples drawn and mean credit, over questions and all orders of their samples."""
    found: dict[tuple[str, float], list[list[tuple[float, float]]]] = {}
    for samples in questions:
        own: dict[tuple[str, float], list[tuple[float, float]]] = {}
        for order in map(list, itertools.permutations(samples)):
            for k in ks:
                seen = order[:k]
                rules = {"majority": majority(seen), "best of n": best(seen)}
                # whose scores fill the gaps is a matter of the whole question
                for name, credit in rules.items():
                    own.setdefault((name, k), []).append((len(seen), credit))
            for window in (2, 3, 4):
                if window < ks[-1]:
                    drawn = windows_drawn(order, window)
                    own.setdefault(("ESC", window), []).append((drawn, majority(order[:drawn])))
            for threshold in (0.7, 0.8, 0.9, 0.95, 0.99):
                drawn = confidently_drawn(order, threshold)
                own.setdefault(("Adaptive-Consistency", threshold), []).append((drawn, majority(order[:drawn])))
        for key, values in own.items():
            found.setdefault(key, []).append(values)
    means = {
        key: np.mean([np.mean(np.array(values), 0) for values in each], axis=0).tolist() for key, each in found.items()
    }
    return {key: (samples, credit) for key, (samples, credit) in means.items()}


# ---- questions ------------------------------------------------------------------------------------------------------


def some_questions(seed: int, count: int, most: int, scored: bool = True) -> list[list[Sample]]:
    rng = random.Random(seed)
    questions = []
    for _ in range(count):
        questions.append(
            [
                (
                    None if rng.random() < 0.15 else rng.randint(0, 2),
                    None if not scored or rng.random() < 0.15 else rng.choice([0.0, 0.25, 0.5, 0.5, 0.9]),
                )
                for _ in range(rng.randint(0, most))
            ]
        )
    questions[0] = [(rng.randint(0, 2), 0.5) for _ in range(most)]
    return questions


def as_groups(questions: list[list[Sample]]) -> tuple[Groups, list[int], torch.Tensor]:
    width = max(map(len, questions))
    answers = torch.zeros(len(questions), width, dtype=torch.int64)
    valid, scores = torch.zeros_like(answers, dtype=torch.bool), torch.full(answers.shape, math.nan).double()
    for q, samples in enumerate(questions):
        for i, (answer, score) in enumerate(samples):
            answers[q, i], valid[q, i] = answer or 0, answer is not None
            scores[q, i] = math.nan if score is None else score
    correct = torch.zeros(len(questions), dtype=torch.int64)
    return Groups(answers, valid, correct, [[] for _ in questions]), [len(row) for row in questions], scores


def points(questions: list[list[Sample]], **options):
    groups, counts, scores = as_groups(questions)
    found = compare(groups, counts, scores, scores, **options)
    return {(point.name, point.setting): point for point in found}


# ---- tests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_exact_methods_are_their_definitions_over_all_orders(seed) -> None:
    questions = some_questions(seed, count=14, most=5)
    found = points(questions, orders=120)
    wanted = definitions(questions, range(1, 6))
    assert {key for key, point in found.items() if point.exact} == set(wanted)
    for key, (samples, credit) in wanted.items():
        assert found[key].samples == pytest.approx(samples, abs=1e-12), key
        assert found[key].accuracy == pytest.approx(credit, abs=1e-12), key


def test_random_orders_approach_all_orders() -> None:
    questions = some_questions(2, count=30, most=6)
    exact, drawn = points(questions, orders=720), points(questions, orders=400)
    assert exact["ESC", 2].exact and not drawn["ESC", 2].exact
    for key in exact:
        # five standard errors of a mean of 30 x 400 values in [0, 1], and of samples in [0, 6]
        bound = 5 * 0.5 / math.sqrt(30 * 400)
        assert abs(exact[key].accuracy - drawn[key].accuracy) < bound, key
        assert abs(exact[key].samples - drawn[key].samples) < 6 * bound, key
    again = points(questions, orders=400)
    assert {key: point.to_json() for key, point in again.items()} == {k: p.to_json() for k, p in drawn.items()}
    other = points(questions, orders=400, seed=1)
    assert other["ESC", 2].samples != drawn["ESC", 2].samples


@pytest.mark.parametrize("rule", ["weighted", "adaptive"])
def test_votes_by_scores_are_their_definitions(rule) -> None:
    questions = [[(a, 0.5 if s is None else s) for a, s in row] for row in some_questions(3, count=12, most=4)]
    found, base = points(questions, orders=20_000), 0.0 if rule == "weighted" else 1.0
    for k in range(1, 5):
        wanted = np.mean(
            [np.mean([by_scores(list(s), base) for s in itertools.combinations(row, min(k, len(row)))])
             for row in questions]
        )  # fmt: skip
        assert abs(found[rule, k].accuracy - wanted) < 5 * 0.5 / math.sqrt(12 * 20_000), k


def test_all_samples_give_the_exact_vote() -> None:
    questions = some_questions(4, count=40, most=7)
    groups, _, scores = as_groups(questions)
    found = points(questions, orders=50)
    for rule in ("count", "weighted", "adaptive"):
        credit = vote_credit(groups.answers, groups.correct, scores, valid=groups.valid, rule=rule)
        point = found["majority" if rule == "count" else rule, 7]
        assert point.accuracy == pytest.approx(float(credit.mean()), abs=1e-12)
        assert point.samples == pytest.approx(np.mean([len(row) for row in questions]), abs=1e-12)
    # nothing can be surer than 1, so this rule draws all samples
    groups, counts, _ = as_groups(questions)
    (never,) = (p for p in compare(groups, counts, orders=50, windows=(), confidences=(1.0,)) if p.stops_early)
    assert never.accuracy == pytest.approx(found["majority", 7].accuracy, abs=1e-12)
    assert never.samples == pytest.approx(found["majority", 7].samples, abs=1e-12)
    assert never.gain == pytest.approx(0, abs=1e-12) and max(map(abs, never.gain_interval)) < 1e-12


def test_counts_after_each_sample_with_ties() -> None:
    rng = random.Random(5)
    rows = [[rng.choice([-1, 0, 0, 1, 1, 2, 3]) for _ in range(9)] for _ in range(300)]
    rows += [[0, 1, 2, 2, 1, 0, 3, 3, 3], [-1] * 9, [1, 0, 1, 0, -1, 0, 1, 2, 2]]
    gold = [rng.choice([-1, 0, 1]) for _ in rows]
    seen = count_prefixes(np.array(rows), np.array(gold))
    tied = 0
    for r, row in enumerate(rows):
        for k in range(1, 10):
            counts = Counter(answer for answer in row[:k] if answer >= 0)
            top, second = ([n for _, n in counts.most_common(2)] + [0, 0])[:2]
            leading = [answer for answer, n in counts.items() if n == top]
            credit = 1 / len(leading) if gold[r] in leading else 0
            assert (seen.top[r, k - 1], seen.second[r, k - 1]) == (top, second), (row, k)
            assert seen.credit[r, k - 1] == credit, (row, k)
            tied += len(leading) > 2
    assert tied > 50


def test_ties_share_their_credit() -> None:
    found = points([[(0, 0.5), (1, 0.5)]], orders=2)
    assert {key[0]: point.accuracy for key, point in found.items() if key[1] in (2, 0.99)} == {
        "majority": 0.5, "best of n": 0.5, "weighted": 0.5, "adaptive": 0.5, "Adaptive-Consistency": 0.5
    }  # fmt: skip
    assert found["majority", 2].interval is None and found["majority", 2].gain_interval is None


def test_orders_of_a_question_depend_on_it_alone() -> None:
    orders = draw_orders(8, 500, seed=3, question=7)
    assert (np.sort(orders, 1) == np.arange(8)).all() and len(np.unique(orders, axis=0)) > 480
    assert (orders == draw_orders(8, 500, seed=3, question=7)).all()
    assert (orders != draw_orders(8, 500, seed=3, question=8)).any()
    # each sample comes first as often as any other: 500 / 8, standard deviation 7.4
    assert (abs(np.bincount(orders[:, 0], minlength=8) - 62.5) < 5 * 7.4).all()
    assert len(draw_orders(4, 24, 0, 0)) == len(np.unique(draw_orders(4, 24, 0, 0), axis=0)) == 24
    assert draw_orders(0, 10, 0, 0).shape == (1, 0)


def test_the_gain_is_over_the_majority_of_as_many_samples() -> None:
    """Equal scores make best-of-n a single sample; between two sizes the majority is interpolated."""
    rng = random.Random(6)
    questions = [[(rng.choice([0, 0, 0, 1, 2]), 0.5) for _ in range(5)] for _ in range(200)]
    found = points(questions, orders=120)
    single = found["majority", 1].accuracy
    for k in range(1, 6):
        point = found["best of n", k]
        assert point.accuracy == pytest.approx(single, abs=1e-12)
        assert point.gain == pytest.approx(single - found["majority", k].accuracy, abs=1e-12)
    early = found["ESC", 2]
    low = math.floor(early.samples)
    part = early.samples - low
    between = (1 - part) * found["majority", low].accuracy + part * found["majority", low + 1].accuracy
    assert early.gain == pytest.approx(early.accuracy - between, abs=1e-12)


def test_intervals_are_those_of_a_mean_over_questions() -> None:
    questions = [[(answer, None)] * 2 for answer in [0] * 80 + [1] * 120]
    point = points(questions, orders=2)["majority", 2]
    error = math.sqrt(0.4 * 0.6 / 200)
    assert point.accuracy == pytest.approx(0.4)
    # 2,000 draws of a mean of 200 zeros and ones: ends within a tenth of the width of the normal ones
    assert point.interval == pytest.approx((0.4 - 1.96 * error, 0.4 + 1.96 * error), abs=0.2 * error + 0.5 / 200)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"windows": (1,)}, "`windows` must be at least 2 samples, got 1"),
        ({"confidences": (0.5,)}, "`confidences` must be above 1/2 and at most 1, got 0.5"),
        ({"confidences": (1.5,)}, "`confidences` must be above 1/2 and at most 1, got 1.5"),
    ],
)
def test_settings_out_of_range(options, named) -> None:
    groups, counts, _ = as_groups([[(0, None), (0, None), (1, None)]])
    with pytest.raises(ValueError, match=re.escape(named)):
        compare(groups, counts, **options)


ROWS = [
    {
        "question": "a",
        "answer": "1",
        "generated_answer": ["The answer is 1", "The answer is 1", "The answer is 1", "The answer is 2"],
        "scores": [0.9, 0.8, 0.7, 0.1],
    },
    {
        "question": "b",
        "answer": "5",
        "generated_answer": ["The answer is 4", "The answer is 5", "?", "The answer is 6"],
        "scores": [0.2, 0.9, None, 0.1],
    },
    {"question": "c", "answer": None, "generated_answer": ["The answer is 1"], "scores": [0.1]},
]


def invoke(tmp_path, rows, *options):
    write_rows(tmp_path / "r.jsonl", rows)
    found = CliRunner().invoke(app, ["vote", str(tmp_path / "r.jsonl"), "--out", str(tmp_path / "out"), *options])
    return found, " ".join(found.output.replace("│", " ").split())


def test_the_command_writes_table_plot_and_results(tmp_path) -> None:
    done, text = invoke(tmp_path, ROWS, "--compare")
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {(row["method"], row["setting"]): row for row in results["compare"]}
    assert results["questions"] == 2 and rows["best of n", 4]["accuracy"] == 1
    # a: right; b: a tie of three
    assert rows["majority", 4]["accuracy"] == pytest.approx((1 + 1 / 3) / 2)
    assert rows["best of n", 4]["gain"] == pytest.approx(1 - 2 / 3)
    assert set(rows["ESC", 2]) == {
        "method", "setting", "samples", "accuracy", "interval", "gain", "gain_interval", "exact"
    }  # fmt: skip
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    for name in ("majority", "best of n", "weighted", "adaptive", "ESC", "Adaptive-Consistency"):
        assert name in text
    plain, _ = invoke(tmp_path, ROWS)
    assert plain.exit_code == 0 and "compare" not in json.loads((tmp_path / "out" / "results.json").read_text())


def test_without_scores_the_methods_by_scores_are_left_out(tmp_path) -> None:
    rows = [{key: value for key, value in row.items() if key != "scores"} for row in ROWS]
    done, text = invoke(tmp_path, rows, "--compare")
    assert done.exit_code == 0 and "no scores: best of n and the votes by scores are left out" in text, done.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["method"] for row in results["compare"]} == {"majority", "ESC", "Adaptive-Consistency"}


def test_log_probabilities_choose_the_best_and_weigh_relative_to_it(tmp_path) -> None:
    rows = [{**row, "scores": [None if s is None else 1000 * math.log(s) for s in row["scores"]]} for row in ROWS]
    refused, text = invoke(tmp_path, rows, "--compare")
    assert refused.exit_code == 2 and "log-probabilities are counted with --scores-are log" in text
    done, _ = invoke(tmp_path, rows, "--compare", "--scores-are", "log")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "results.json").read_text())["compare"]
    ends = {row["method"]: row["accuracy"] for row in found if row["setting"] == 4}
    assert ends["best of n"] == ends["weighted"] == ends["adaptive"] == 1


@pytest.mark.parametrize(
    ("rows", "options", "named"),
    [
        ([{**ROWS[0], "answer": None}], (), "`answer` must be given in some rows for --compare, got none in any row"),
        ([ROWS[0], {**ROWS[1], "scores": None}], (), "row 1 (from 0): `scores` must be a list of 4 numbers"),
        ([ROWS[0]], ("--scores", "reward"), "`reward` must be a list of 4 numbers"),
    ],
)
def test_bad_rows_are_one_line(tmp_path, rows, options, named) -> None:
    done, text = invoke(tmp_path, rows, "--compare", *options)
    assert done.exit_code == 2 and named in text and "Traceback" not in text, done.output


def test_a_folder_in_the_way_of_the_plot(tmp_path) -> None:
    (tmp_path / "out" / "compare.png").mkdir(parents=True)
    done, text = invoke(tmp_path, ROWS, "--compare")
    assert done.exit_code == 2 and "it is a folder" in text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["compare.png"]
    plain, _ = invoke(tmp_path, ROWS)
    assert plain.exit_code == 0, plain.output


def cells(line: str, border: str) -> list[str]:
    """The cells of a line of a table without their intervals, which depend on numpy's generator."""
    return [cell.split("[")[0].strip() for cell in line.split(border)[1:-1]]


def test_the_example_of_the_docs_runs(tmp_path) -> None:
    page = (ROOT / "docs" / "consistency.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```sh\n([^`]*--compare[^`]*)^```$", page, re.MULTILINE)
    command = block.replace("calm-fast", f"{shlex.quote(sys.executable)} -m calm_fast")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run(["sh", "-ec", command], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (folder,) = {path.parent for path in tmp_path.rglob("compare.png")}
    rows = json.loads((folder / "results.json").read_text())["compare"]
    assert {row["method"] for row in rows} >= {"majority", "best of n", "ESC", "Adaptive-Consistency"}
    # the page shows the table that is printed
    shown = page.split(block)[1].split("\n\n")[1].splitlines()[2:]
    table = [cells(line, "|") for line in shown]
    printed = [cells(line, "│") for line in done.stdout.splitlines() if "│" in line]
    assert len(table) >= 12 and all(row in printed for row in table), done.stdout


@pytest.mark.slow
def test_real_samples_take_seconds(shared_data, tmp_path) -> None:
    report = run(shared_data / "math_gpt35_dev.jsonl.gz", tmp_path, VoteSettings(compare=True), progress=False)
    found = {(point.name, point.setting): point for point in report.compared}
    assert found["majority", 8].samples == 8 and found["majority", 8].interval[0] < found["majority", 8].accuracy
    assert all(p.samples < 8 for p in report.compared if p.name == "ESC")
    assert found["Adaptive-Consistency", 0.7].samples < found["Adaptive-Consistency", 0.99].samples
    # samples without an answer are drawn too here, so one sample is pass@1
    assert found["majority", 1].accuracy == pytest.approx(report.results["pass@1"])
