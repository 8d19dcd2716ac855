"""A run that is killed goes on where it was: no question lost, none repeated, nothing of other settings mixed in."""

from __future__ import annotations

import gzip
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from self_consistency_setup import QUESTIONS, REFERENCES, consistency
from tiny_models import FAMILIES

from calm_fast import SelfConsistency, add_dual_lora, set_dual_lora_mode
from calm_fast.consistency import equivalent, read_rows
from calm_fast.consistency.voting.journal import Journal

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


NAMES = ["run.jsonl", "run.jsonl.gz"]


def indices(file: Path) -> list[int]:
    content = file.read_bytes()
    assert content.startswith(b"\x1f\x8b") is (file.suffix == ".gz")
    return [
        json.loads(line)["index"]
        for line in (gzip.decompress(content) if file.suffix == ".gz" else content).splitlines()
    ]


def whole_part(file: Path) -> bytes:
    """What counts of a file that a kill left behind."""
    content = file.read_bytes()
    if file.suffix != ".gz":
        return content[: content.rfind(b"\n") + 1]
    starts = [i for i in range(len(content)) if content.startswith(b"\x1f\x8b\x08\x00", i)]
    return content[: starts[-1]]  # it was killed in the last member


def agree(results: list[Any], expected: list[Any]) -> bool:
    """Equal but for the rounding of scores in batches of another shape."""
    for a, b in zip(results, expected, strict=True):
        assert a.scores == pytest.approx(b.scores) and (a.weight, a.total) == pytest.approx((b.weight, b.total))
    floats = {"scores": None, "weight": 0.0, "total": 0.0, "margin": 0.0}
    return [replace(r, **floats) for r in results] == [replace(r, **floats) for r in expected]


@pytest.mark.parametrize("name", NAMES)
def test_killed_in_the_middle_of_a_write_and_resumed(tmp_path, name, forked) -> None:
    out = tmp_path / name
    killed = forked.run(HERE / "kill_me.py", out, cwd=tmp_path, path=ROOT)
    assert killed.stdout == "torn\n", killed.stderr  # the third batch was half written
    assert killed.returncode == -signal.SIGKILL
    left, part = whole_part(out), out.stat().st_size
    done = len((gzip.decompress(left) if out.suffix == ".gz" else left).splitlines())
    assert done in (4, 5) and part > len(left)  # two batches of two, and a part of the third

    model, read = FAMILIES["llama"].model(0), []
    run = consistency(model)
    run._prompt_ids = lambda question, plain=run._prompt_ids: read.append(question) or plain(question)
    results = run(QUESTIONS, REFERENCES, out=out)
    assert sorted(indices(out)) == list(range(8))  # every question once
    assert read == QUESTIONS[done:]  # only those that were not written were asked again
    assert out.read_bytes().startswith(left)  # what was there stays
    assert [row["winner"] for row in read_rows(out, need_answer=False)] == [result.answer for result in results]
    assert agree(results, consistency()(QUESTIONS, REFERENCES))  # as if nothing had happened


def test_an_error_leaves_what_is_finished_and_a_second_run_asks_nothing(tmp_path) -> None:
    out, run = tmp_path / "deep" / "run.jsonl", consistency()
    plain, asked = run._prompt_ids, []

    def failing(question: str) -> list[int]:
        asked.append(question)
        if question == QUESTIONS[4]:
            raise KeyboardInterrupt
        return plain(question)

    run._prompt_ids = failing
    with pytest.raises(KeyboardInterrupt):
        run(QUESTIONS, out=out)
    assert indices(out) == [0, 1, 2, 3]
    first = consistency()(QUESTIONS, out=out)
    again = consistency()
    again._prompt_ids = lambda question: 1 / 0
    assert again(QUESTIONS, out=out) == first
    more = consistency()([*QUESTIONS, "8+8?"], out=out)  # questions may be added behind
    assert more[:8] == first and more[8].question == "8+8?"


@pytest.mark.parametrize("name", NAMES)
def test_every_torn_tail_is_repaired(tmp_path, name) -> None:
    out = tmp_path / name
    one = {"batch_size": 6}  # a question a write
    expected = consistency(**one)(QUESTIONS[:2], out=out)
    whole = out.read_bytes()
    end = whole.index(b"\x1f\x8b\x08", 1) if name.endswith(".gz") else whole.index(b"\n") + 1
    for length in (0, 1, 2, end - 1, end, end + 1, end + 12, len(whole) - 1):
        out.write_bytes(whole[:length])
        assert agree(consistency(**one)(QUESTIONS[:2], out=out), expected)
        assert sorted(indices(out)) == [0, 1]


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_in_the_file_when_append_returns(tmp_path, name) -> None:
    with Journal(tmp_path / name, {}) as journal:
        for index in range(3):
            journal.append([{"index": index, "question": "q"}])
            assert indices(tmp_path / name) == list(range(index + 1))


def test_a_gzipped_journal_of_large_and_many_writes(tmp_path) -> None:
    rows = [{"index": i, "question": f"{i} " + "ab" * (60_000 * (i == 3))} for i in range(50)]
    for start in range(0, 50, 2):
        with Journal(tmp_path / "out.jsonl.gz", {}) as journal:
            assert list(journal.rows.values()) == rows[:start]
            journal.append(rows[start : start + 1])
            journal.append([])
            journal.append(rows[start + 1 : start + 2])
    with open(tmp_path / "out.jsonl.gz", "ab") as stream:
        stream.write(b"not gzip")
    with pytest.raises(ValueError, match=r"`out` must be gzip, .* got out.jsonl.gz, which is not after byte \d+"):
        Journal(tmp_path / "out.jsonl.gz", {})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n": 7}, "n: 6 there, 7 now"),
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"temperature": 0.5}, "temperature: 1.2 there, 0.5 now"),
        ({"rule": "count"}, "rule: 'adaptive' there, 'count' now"),
        ({"model": FAMILIES["llama"].model(1)}, "model: 'LlamaForCausalLM"),
        ({"prompt": "Q {question}"}, "prompt: '{question}' there, 'Q {question}' now"),
        ({"batch_size": 3}, None),  # changes nothing
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_are_refused(tmp_path, changes, named) -> None:
    out = tmp_path / "run.jsonl"
    expected = consistency()(QUESTIONS[:2], out=out)
    before = out.read_bytes()
    if named is None:
        assert consistency(**changes)(QUESTIONS[:2], out=out) == expected
        return
    with pytest.raises(ValueError, match=f"was made with other settings .*{named}.*give another file"):
        consistency(**changes)(QUESTIONS[:2], out=out)
    assert out.read_bytes() == before


def test_our_own_equality_keeps_its_recorded_name(tmp_path) -> None:
    """The settings of a run name functions; the name of `equivalent` must not follow the file it lies in."""
    out = tmp_path / "run.jsonl"
    consistency(equality=equivalent)(QUESTIONS[:2], out=out)
    settings = json.loads(out.with_name("run.jsonl.settings.json").read_text())
    assert settings["equality"] == "calm_fast.consistency.answers.equivalent"


def test_other_questions_files_and_processes_are_refused(tmp_path) -> None:
    out = tmp_path / "run.jsonl"
    consistency()(QUESTIONS[:2], REFERENCES[:2], out=out)
    for questions, references in ((QUESTIONS[1:3], None), (QUESTIONS[:1], None), (QUESTIONS[:2], ["4", None])):
        with pytest.raises(ValueError, match="answers another question; give another file"):
            consistency()(questions, references, out=out)
    with pytest.raises(ValueError, match="was made with other settings .*kind"):
        SelfConsistency(rule="count", progress=False).from_samples(out, out=out)
    foreign = tmp_path / "mine.jsonl"
    foreign.write_text('{"question": "precious"}\n')
    with pytest.raises(ValueError, match="got mine.jsonl, which exists while mine.jsonl.settings.json does not"):
        consistency()(QUESTIONS[:2], out=foreign)
    assert foreign.read_text() == '{"question": "precious"}\n'
    with (
        Journal(tmp_path / "held.jsonl", {}),
        pytest.raises(RuntimeError, match="got held.jsonl: another process"),
    ):
        Journal(tmp_path / "held.jsonl", {})
    out.write_bytes(b"{]\n" + out.read_bytes())
    with pytest.raises(ValueError, match="got run.jsonl, whose line 1 is damaged"):
        consistency()(QUESTIONS[:2], REFERENCES[:2], out=out)


def test_ready_samples_resume_too(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("calm_fast.consistency.self_consistency._VOTE_AT_ONCE", 2)
    rows = [
        {"question": q, "answer": a, "generated_answer": ["\\boxed{1}", "2"]}
        for q, a in zip(QUESTIONS, REFERENCES, strict=True)
    ]
    out, run = tmp_path / "votes.jsonl", SelfConsistency(rule="count", progress=False)
    expected = run.from_samples(rows, out=out)
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:4]) + b'{"index": 4, "que')
    assert run.from_samples(rows, out=out) == expected and sorted(indices(out)) == list(range(8))
    with pytest.raises(ValueError, match="got votes.jsonl, whose row 0 answers another question"):
        run.from_samples([{**rows[0], "generated_answer": ["\\boxed{5}"]}, *rows[1:]], out=out)


def test_another_tokenizer_or_mode_is_another_run(tmp_path: Path) -> None:
    model = add_dual_lora(FAMILIES["llama"].model(0), mode="pos")
    consistency(model)(QUESTIONS[:2], out=tmp_path / "run.jsonl")
    consistency(model)(QUESTIONS[:2], out=tmp_path / "run.jsonl")
    set_dual_lora_mode(model, "neg")
    with pytest.raises(ValueError, match="was made with other settings .*dual_lora_modes: .*'pos'"):
        consistency(model)(QUESTIONS[:2], out=tmp_path / "run.jsonl")
    set_dual_lora_mode(model, "pos")
    other = consistency(model)
    other.tokenizer.add_tokens(["zz"])
    with pytest.raises(ValueError, match="was made with other settings .*tokenizer: "):
        other(QUESTIONS[:2], out=tmp_path / "run.jsonl")
