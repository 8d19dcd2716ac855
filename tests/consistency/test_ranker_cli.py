"""calm-fast rank train | score: from a file of rows to rows with scores, stopped and gone on with."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranker_models import rows, saved, truth
from typer.testing import CliRunner

from calm_fast.cli import app
from calm_fast.consistency import Ranker, pair_accuracy
from calm_fast.consistency.ranking import pipeline as ranker_pipeline
from calm_fast.consistency.ranking.pipeline import cached_features, label_rationales


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["rank", *map(str, arguments)])


@pytest.fixture
def model(tmp_path) -> Path:
    return saved(tmp_path / "model", "bert")


def written(file: Path, content: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return file


def read(file: Path) -> list[dict]:
    text = gzip.decompress(file.read_bytes()).decode() if file.suffix == ".gz" else file.read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_labels_are_right_where_the_answer_is():
    content = rows(12)
    expected = truth(content)
    content[3]["generated_answer"].insert(0, "no answer here")
    expected[3] = torch.cat([torch.tensor([False]), expected[3]])
    content.append({**content[0], "answer": " "})
    bare = content[0]["answer"].rpartition("{")[2].rstrip("}.")
    marked = [text.replace("\\boxed {", "@@").replace(" }", "") for text in content[0]["generated_answer"]]
    content += [{**content[0], "answer": bare}, {**content[0], "answer": f"so @@ {bare}", "generated_answer": marked}]
    labels = label_rationales(content, pattern=r"@@ (.*)", workers=1)
    assert len(labels) == 15 and len(labels[12]) == 0  # nobody knows
    assert expected[0].any() and not expected[0].all()
    expected += [labels[12], expected[0], expected[0]]  # the answer alone, and where only the pattern finds it
    assert all(torch.equal(a, b) for a, b in zip(labels, expected, strict=True))
    assert not label_rationales(content[14:], workers=1)[0].any()


def test_train_then_score_then_judge(model, tmp_path):
    data, held = rows(80), rows(30, seed=1)
    file = written(tmp_path / "rows.jsonl", data)
    train = ["train", file, "--model", model, "--out", tmp_path / "run", "--max-length", 48, "--hidden", 32]
    result = invoke(*train, "--workers", 1)
    assert result.exit_code == 0, result.output
    assert "loss" in result.output and "pair accuracy, held out: 0." in result.output
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["questions"] == {"all": 80, "trained_on": 72, "held_out": 8}
    right = torch.cat(truth(data))
    assert results["rationales"] == {"right": int(right.sum()), "wrong": int((~right).sum())}
    assert results["pair_accuracy"]["held_out"]["accuracy"] > 0.8 and len(results["losses"]) == 10
    assert set(results["versions"]) == {"calm_fast", "torch", "transformers", "python"}
    before = (tmp_path / "run" / "ranker" / "head.safetensors").read_bytes()
    assert invoke(*train).exit_code == 0  # nothing left to do, nothing changes
    assert (tmp_path / "run" / "ranker" / "head.safetensors").read_bytes() == before

    extra = [{**row, "subject": "sums"} for row in held]
    out = tmp_path / "deep" / "scored.jsonl.gz"
    arguments = ["score", written(tmp_path / "held.jsonl", extra), "--ranker", tmp_path / "run", "--out", out]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    scored = read(out)
    assert [{k: v for k, v in row.items() if k != "scores"} for row in scored] == extra
    assert all(len(row["scores"]) == 6 and all(0 < s < 1 for s in row["scores"]) for row in scored)
    assert pair_accuracy([torch.tensor(row["scores"]) for row in scored], truth(held)).accuracy > 0.8
    ranker = Ranker.from_pretrained(tmp_path / "run" / "ranker")
    again = ranker.score([r["question"] for r in held], [r["generated_answer"] for r in held])
    for row, s in zip(scored, again, strict=True):
        torch.testing.assert_close(torch.tensor(row["scores"]), s, rtol=0, atol=1e-6)
    once = out.read_bytes()
    assert invoke(*arguments).exit_code == 0 and out.read_bytes() == once  # the same bytes again
    assert list(out.parent.iterdir()) == [out]  # nothing left behind


class Stopped(BaseException):
    pass


def test_scoring_goes_on_where_it_was_stopped(model, tmp_path, monkeypatch):
    monkeypatch.setattr(ranker_pipeline, "_STEP", 4)
    content = rows(10)
    Ranker.from_backbone(model, max_length=48).save_pretrained(tmp_path / "ranker")
    whole = ranker_pipeline.run_scoring(content, tmp_path / "ranker", tmp_path / "whole.jsonl", progress=False)

    score, seen = Ranker.score, []

    def stopping(self, questions, rationales, **options):
        seen.append(len(questions))
        if len(seen) == 2:
            raise Stopped
        return score(self, questions, rationales, **options)

    monkeypatch.setattr(Ranker, "score", stopping)
    arguments = (content, tmp_path / "ranker", tmp_path / "parts.jsonl")
    with pytest.raises(Stopped):
        ranker_pipeline.run_scoring(*arguments, progress=False)
    assert not (tmp_path / "parts.jsonl").exists()
    part = tmp_path / ".parts.jsonl.part"
    part.write_bytes(part.read_bytes()[:-20])  # killed in the middle of a line: that step is done again
    parts = ranker_pipeline.run_scoring(*arguments, progress=False)
    assert seen == [4, 4, 4, 4, 2] and parts.read_bytes() == whole.read_bytes()


def test_features_are_kept_and_refused_for_another_backbone(model, tmp_path, monkeypatch):
    monkeypatch.setattr(ranker_pipeline, "_CHUNK", 4)
    content, ranker = rows(10), Ranker.from_backbone(model, max_length=48)
    expected = ranker.features([r["question"] for r in content], [r["generated_answer"] for r in content])
    cached_features(ranker, content, tmp_path / "kept")
    files = sorted((tmp_path / "kept").glob("*.safetensors"))
    assert len(files) == 3
    files[1].unlink()
    calls, features = [], Ranker.features
    monkeypatch.setattr(Ranker, "features", lambda self, q, r, **o: calls.append(len(q)) or features(self, q, r, **o))
    again = cached_features(ranker, content, tmp_path / "kept")
    assert calls == [4]  # only what was missing
    for a, b in zip(again, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    other = Ranker.from_backbone(model, max_length=40)
    with pytest.raises(ValueError, match="holds features with other max_length"):
        cached_features(other, content, tmp_path / "kept")


def test_trained_backbone_from_the_command_line(model, tmp_path):
    file = written(tmp_path / "rows.jsonl", rows(16))
    train = ["train", file, "--model", model, "--out", tmp_path / "run", "--max-length", 48, "--epochs", 2]
    result = invoke(*train, "--train-backbone", "--loss", "bce", "--workers", 1, "--holdout", 0)
    assert result.exit_code == 0, result.output
    assert "held out: - (0 pairs)" in result.output
    assert (tmp_path / "run" / "ranker" / "backbone" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "run" / "results.json").read_text())["pair_accuracy"]["held_out"]["accuracy"] is None


def test_bad_usage_is_one_line_and_exit_2(model, tmp_path):
    file = written(tmp_path / "rows.jsonl", rows(6))
    base = ["train", file, "--model", model, "--out", tmp_path / "run", "--max-length", 48, "--workers", 1]
    assert invoke(*base, "--epochs", 1).exit_code == 0
    broken = written(tmp_path / "broken.jsonl", [{"question": "a", "answer": "b"}])
    for arguments, named in (
        ((*base, "--epochs", 2), "other settings"),
        ((*base, "--loss", "hinge"), "`loss` must be one of"),
        ((*base, "--train-backbone", "--dtype", "bfloat16"), "--dtype"),
        ((*base, "--device", "nowhere"), "got 'nowhere'"),
        ((*base, "--answer-regex", "("), "`pattern` must be a regular expression"),
        (("train", tmp_path / "no", "--model", model, "--out", tmp_path / "x"), "does not exist"),
        (("train", broken, "--model", model, "--out", tmp_path / "x"), "generated_answer"),
        (("train", file, "--model", tmp_path / "none", "--out", tmp_path / "x"), "none"),
        (("score", file, "--ranker", tmp_path, "--out", tmp_path / "x.jsonl"), "no ranker.json"),
        (("score", file, "--ranker", tmp_path / "run", "--out", tmp_path / "y", "--device", "nowhere"), "--device"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2 and named in " ".join(result.output.split()), result.output
        assert "Traceback" not in result.output


def test_a_failed_training_leaves_no_empty_folder(model, tmp_path):
    file = written(tmp_path / "rows.jsonl", rows(6))
    broken = written(tmp_path / "broken.jsonl", [{"question": "a", "answer": "b"}])
    out = tmp_path / "deep" / "run"
    for arguments in (
        ("train", broken, "--model", model, "--out", out),
        ("train", file, "--model", tmp_path / "none", "--out", out),
        ("train", file, "--model", model, "--out", out, "--loss", "hinge"),
        ("train", file, "--model", model, "--out", out, "--max-length", 4096),
        ("score", file, "--ranker", tmp_path, "--out", out / "x.jsonl"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2 and not out.parent.exists(), result.output
    with pytest.raises(OSError, match="none"):
        ranker_pipeline.run_training(rows(6), tmp_path / "none", out)
    assert not out.parent.exists()
    out.mkdir(parents=True)
    assert invoke("train", broken, "--model", model, "--out", out).exit_code == 2
    assert out.is_dir()  # it was there before


def test_rows_with_nothing_to_rank_do_not_claim_the_folder(model, tmp_path, monkeypatch):
    content = rows(6)
    useless = [{**row, "generated_answer": [row["answer"]] * 2} for row in content]
    arguments = ["--model", model, "--out", tmp_path / "run", "--max-length", 48, "--epochs", 1, "--workers", 1]
    features = Ranker.features
    monkeypatch.delattr(Ranker, "features")  # said before the model reads anything
    result = invoke("train", written(tmp_path / "useless.jsonl", useless), *arguments)
    assert result.exit_code == 2 and "nothing to rank" in " ".join(result.output.split())
    monkeypatch.setattr(Ranker, "features", features, raising=False)
    result = invoke("train", written(tmp_path / "rows.jsonl", content), *arguments)
    assert result.exit_code == 0, result.output
