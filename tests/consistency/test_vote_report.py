"""`calm-fast vote`: counts, files, and errors for bad input."""

from __future__ import annotations

import errno
import json
import math
import random

import pytest
from typer.testing import CliRunner

from calm_fast import SelfConsistency
from calm_fast.cli import app
from calm_fast.consistency import write_rows
from calm_fast.consistency.voting.report import VoteSettings, run

ROWS = [
    {  # right 2 of 4, alone at the top
        "question": "a",
        "answer": r"so \boxed{\frac{1}{2}}",
        "generated_answer": [r"\boxed{0.5}", r"\boxed{3}", r"\boxed{\dfrac12}", r"\boxed{4}"],
        "scores": [0.1, 0.9, 0.1, 0.2],
    },
    {  # tied between 1 (right) and 2; one sample without an answer
        "question": "b",
        "answer": "1",
        "generated_answer": ["no idea", "The answer is 2.", "The answer is 1.", r"\boxed{}"],
        "scores": [0.9, 0.1, 0.8, None],
    },
    {"question": "c", "answer": None, "generated_answer": [r"\boxed{1}"] * 4, "scores": [1, 1, 1, 1]},
    {"question": "d", "answer": r"\boxed{7}", "generated_answer": ["?", "?"], "scores": [0.5, 0.5]},
]


@pytest.fixture
def file(tmp_path):
    write_rows(tmp_path / "rows.jsonl.gz", ROWS)
    return tmp_path / "rows.jsonl.gz"


def invoke(*args):
    return CliRunner().invoke(app, ["vote", *map(str, args)])


def test_counts_of_a_small_file(file, tmp_path) -> None:
    result = invoke(file, "--out", tmp_path / "out", "--k", "1,2,4")
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    # a: of 6 pairs 1 is right, 4 tie with a wrong answer, 1 is a tie of wrong ones; b: both pairs tie; d: never
    majority = {"1": (0.5 + 0.5) / 3, "2": ((1 + 4 / 2) / 6 + 0.5) / 3, "4": (1 + 0.5) / 3}
    anyone = {"1": (0.5 + 0.5) / 3, "2": (5 / 6 + 1) / 3, "4": 2 / 3}
    assert list(results) == ["questions", "single", "majority", "any", "ties", "pass@1", "pass", "ties_by_rule",
                             "samples", "unanswered"]  # fmt: skip
    # a sample without an answer is wrong: a 2 of 4, b 1 of 4, d 0 of 2
    assert results["pass@1"] == results["pass"]["1"] == pytest.approx((1 / 2 + 1 / 4) / 3)
    assert results["pass"]["2"] == pytest.approx((5 / 6 + 1 / 2) / 3) and results["pass"]["4"] == pytest.approx(2 / 3)
    assert results["samples"] == 10 and results["unanswered"] == 4 and results["ties_by_rule"] == {"count": 1}
    assert results["questions"] == 3 and results["ties"] == 1
    assert results["single"] == pytest.approx(1 / 3)
    assert results["majority"] == pytest.approx(majority) and results["any"] == pytest.approx(anyone)
    for text in ("single 0.3333 (pass@1 0.2500)", "majority@4 0.5000", "any@4 0.6667", "pass@4 0.6667",
                 "ties at 4 samples: 1 of 3 questions (33.3 %)", "without an answer: 4 of 10",
                 "left out: 1"):  # fmt: skip
        assert text in result.output
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_votes_say_who_won(file, tmp_path) -> None:
    run(file, tmp_path, progress=False)
    votes = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    names = ("row", "winner", "weight", "total", "margin", "ties", "gold", "right", "credit")
    assert [list(vote) for vote in votes] == [list(names)] * 3
    assert [tuple(vote.values()) for vote in votes] == [
        (0, r"\frac{1}{2}", 2, 4, 1, 1, r"\frac{1}{2}", True, 1),
        (1, "2", 1, 2, 0, 2, "1", False, 0.5),
        (3, None, 0, 0, 0, 0, "7", False, 0),
    ]


@pytest.mark.parametrize("rule", ["count", "weighted", "adaptive"])
def test_the_mean_credit_is_the_accuracy(tmp_path, rule) -> None:
    """`right` follows the tie-break; `credit` shares a tie, as the accuracy in results.json does."""
    rng = random.Random(0)
    rows = []
    for _ in range(120):
        count = rng.randint(0, 6)
        samples = [f"The answer is {rng.randint(1, 3)}" if rng.random() < 0.9 else "?" for _ in range(count)]
        scores = [rng.choice([1.0, 1.0, 2.0, None]) for _ in range(count)]
        rows.append({"question": "q", "answer": "1", "generated_answer": samples, "scores": scores})
    write_rows(tmp_path / "rows.jsonl", rows)
    report = run(tmp_path / "rows.jsonl", tmp_path, VoteSettings(rule=rule, resamples=3, workers=1), progress=False)
    votes = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    accuracy = report.results["majority" if rule == "count" else rule][str(max(report.ks))]
    assert sum(vote["credit"] for vote in votes) / len(votes) == pytest.approx(accuracy, rel=1e-12)
    tied = [vote for vote in votes if vote["ties"] > 1]
    assert len({vote["credit"] for vote in tied}) > 1  # the gold answer is among some of the ties and not among others
    assert any(vote["credit"] and not vote["right"] for vote in tied)
    results = SelfConsistency(rule=rule, progress=False, grouping={"workers": 1}).from_samples(rows)
    assert [result.credit for result in results] == [vote["credit"] for vote in votes]


def test_scores_break_ties(file, tmp_path) -> None:
    report = run(file, tmp_path, VoteSettings(rule="adaptive", ks=(2, 4), resamples=50), progress=False)
    assert list(report.results["adaptive"]) == ["2", "4"]
    # all samples: a 2 x 1.1 against 1.9, b 1.8 against 1.1
    assert report.results["adaptive"]["4"] == pytest.approx(2 / 3)
    assert report.results["majority"]["4"] == pytest.approx(0.5)
    again = run(file, tmp_path, VoteSettings(rule="adaptive", ks=(2, 4), resamples=50), progress=False)
    assert again.results == report.results
    votes = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    assert [vote["right"] for vote in votes] == [True, True, False]
    assert report.results["ties"] == 1 and report.results["ties_by_rule"] == {"count": 1, "adaptive": 0}


def test_default_sizes_are_powers_of_two_and_all(tmp_path) -> None:
    write_rows(tmp_path / "r.jsonl", [{"question": "q", "answer": "1", "generated_answer": ["The answer is 1"] * 6}])
    report = run(tmp_path / "r.jsonl", tmp_path, progress=False)
    assert report.ks == (1, 2, 4, 6)
    assert report.results["majority"] == report.results["any"] == {"1": 1, "2": 1, "4": 1, "6": 1}
    assert math.isnan(report.majority.stderr[0]) and (tmp_path / "curve.png").exists()


def test_ties_are_counted_at_the_largest_size(tmp_path) -> None:
    samples = [f"The answer is {n}." for n in (1, 2, 1)]
    write_rows(tmp_path / "r.jsonl", [{"question": "q", "answer": "1", "generated_answer": ["none", *samples]}])
    assert run(tmp_path / "r.jsonl", tmp_path, VoteSettings(ks=(2, 1)), progress=False).results["ties"] == 1
    assert run(tmp_path / "r.jsonl", tmp_path, VoteSettings(ks=(3,)), progress=False).results["ties"] == 0


def test_a_pattern_and_text_equality(tmp_path) -> None:
    samples = ["#### The Nile", "#### nile.", "#### Amazon"]
    write_rows(
        tmp_path / "r.jsonl", [{"question": "q", "answer": "long story\n#### Nile", "generated_answer": samples}]
    )
    settings = VoteSettings(answer_regex=r"#### (.*)", equality="text")
    assert run(tmp_path / "r.jsonl", tmp_path, settings, progress=False).results["single"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--k", "1,two"], "--k: must be numbers like 1,2,4,8, got '1,two'"),
        (["--k", "0,1"], "--k: must be different sizes of at least 1, got '0,1'"),
        (["--k", "2,2"], "--k: must be different sizes of at least 1, got '2,2'"),
        (["--rule", "loudest"], "`rule` must be 'count', 'weighted' or 'adaptive', got 'loudest'"),
        (["--rule", "weighted", "--scores", "logprob"], "line 1: `logprob` must be a list of 4 numbers"),
        (["--answer-regex", "("], "`pattern` must be a regular expression"),
        (["--equality", "maths"], "`equality` must be one of"),
        (["--timeout", "0"], "`timeout` must be a positive number"),
        (["--lam", "nan", "--rule", "adaptive"], "`lam` must be finite"),
        (["--workers", "0"], "--workers"),
    ],
)
def test_bad_options_are_one_line(file, tmp_path, args, named) -> None:
    result = invoke(file, "--out", tmp_path / "out", *args)
    assert result.exit_code == 2 and named in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output and not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([{"question": "q", "answer": "1", "generated_answer": []}], "a row must have a sample"),
        ([], "the file must have at least one row"),
    ],
)
def test_files_without_anything_to_count(tmp_path, rows, named) -> None:
    write_rows(tmp_path / "r.jsonl", rows)
    result = invoke(tmp_path / "r.jsonl", "--out", tmp_path / "out")
    assert result.exit_code == 2 and named in " ".join(result.output.split())


def test_a_missing_file_is_refused(tmp_path) -> None:
    assert invoke(tmp_path / "none.jsonl").exit_code == 2


@pytest.mark.slow
def test_the_numbers_of_real_samples(shared_data, tmp_path) -> None:
    """Prior measurement: single .340, majority of 8 .429, any of 8 .602; equivalence may differ in a few answers."""
    report = run(shared_data / "math_gpt35_dev.jsonl.gz", tmp_path, progress=False)
    results = report.results
    assert results["questions"] == 500 and set(results["majority"]) == {"1", "2", "4", "8"}
    assert results["single"] == pytest.approx(0.340, abs=0.005)
    assert results["majority"]["8"] == pytest.approx(0.429, abs=0.005)
    assert results["any"]["8"] == pytest.approx(0.602, abs=0.005)
    assert results["single"] == results["majority"]["1"] == pytest.approx(results["any"]["1"])
    assert report.timeouts == 0


def test_a_blank_right_answer_is_none(tmp_path) -> None:
    rows = [{**ROWS[0], "answer": " "}, {"question": "e", "answer": "", "generated_answer": ["?"]}, ROWS[0]]
    write_rows(tmp_path / "rows.jsonl", rows)
    report = run(tmp_path / "rows.jsonl", tmp_path / "out", VoteSettings(workers=1), progress=False)
    assert report.ungraded == 2 and report.results["questions"] == 1
    (vote,) = map(json.loads, (tmp_path / "out" / "votes.jsonl").read_text().splitlines())
    assert (vote["row"], vote["gold"], vote["right"]) == (2, r"\frac{1}{2}", True)
    blank, _, known = SelfConsistency(rule="count", progress=False).from_samples(rows)
    assert blank.credit is None and blank.answer == "0.5" and known.credit == 1.0


def test_one_question_has_no_standard_error(tmp_path) -> None:
    write_rows(
        tmp_path / "r.jsonl", [{"question": "q", "answer": "5", "generated_answer": [r"\boxed{5}", r"\boxed{4}"]}]
    )
    result = invoke(tmp_path / "r.jsonl", "--out", tmp_path / "out", "--k", "1,2")
    assert result.exit_code == 0 and "50.0" in result.output and "nan" not in result.output.lower()


def test_votes_without_gold_answers(tmp_path) -> None:
    samples = [["The answer is 1"] * 3 + ["The answer is 2"], ["The answer is 1", "The answer is 2", "?"]]
    write_rows(tmp_path / "r.jsonl", [{"question": "q", "generated_answer": texts} for texts in samples])
    result = invoke(tmp_path / "r.jsonl", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results == {
        "questions": 2, "agreement": pytest.approx((3 / 4 + 1 / 2) / 2), "margin": pytest.approx((2 / 4 + 0) / 2),
        "ties": 1, "samples": 7, "unanswered": 1,
    }  # fmt: skip
    votes = [json.loads(line) for line in (tmp_path / "out" / "votes.jsonl").read_text().splitlines()]
    assert [(v["winner"], v["margin"], v["ties"], v["gold"], v["right"]) for v in votes] == [
        ("1", 2, 1, None, None), ("1", 0, 2, None, None)
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.json", "votes.jsonl"]
    assert "no gold answers" in result.output and "agreement with the winner 0.6250" in result.output


LOGS = [-0.5, -0.6, -0.4, -0.5, -0.5, -0.9]


@pytest.mark.parametrize(("rule", "factor"), [("weighted", 1), ("adaptive", 4), ("weighted", 1000)])
def test_log_probabilities_are_refused_as_weights_and_counted_as_what_they_are(tmp_path, rule, factor) -> None:
    samples = ["The answer is 0"] * 5 + ["The answer is 1"]
    row = {"question": "q", "answer": "0", "generated_answer": samples, "scores": [factor * log for log in LOGS]}
    write_rows(tmp_path / "r.jsonl", [row])
    options = ("--rule", rule, "--k", "6", "--out", tmp_path / "out")
    refused = invoke(tmp_path / "r.jsonl", *options)
    assert refused.exit_code == 2 and "log-probabilities are counted with --scores-are log" in " ".join(
        refused.output.replace("│", " ").split()
    )
    result = invoke(tmp_path / "r.jsonl", *options, "--scores-are", "log")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "results.json").read_text())[rule] == {"6": 1.0}
    vote = json.loads((tmp_path / "out" / "votes.jsonl").read_text())
    weights = [math.exp(factor * (log + 0.4)) for log in LOGS]
    assert vote["weight"] == pytest.approx(sum(weights[:5]) if rule == "weighted" else sum(weights[:5]) + 5)


@pytest.mark.parametrize("name", ["results.json", "votes.jsonl", "curve.png"])
def test_a_folder_in_the_way_leaves_nothing_half_written(file, tmp_path, name) -> None:
    (tmp_path / "out" / name).mkdir(parents=True)
    result = invoke(file, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "it is a folder" in " ".join(result.output.split()), result.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_a_full_disk_is_one_line_and_leaves_nothing(file, tmp_path, monkeypatch) -> None:
    def full(report, target) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr("calm_fast.consistency.voting.report.draw", full)
    result = invoke(file, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "No space left on device" in " ".join(result.output.split()), result.output
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_answers_are_shown_with_their_place(file) -> None:
    result = CliRunner().invoke(app, ["answers", str(file), "--show", "2"])
    assert result.exit_code == 0, result.output
    plain = " ".join(result.output.split())
    assert "14 samples; found by: box 8, none 4, sentence 2" in plain and "gold" in plain
