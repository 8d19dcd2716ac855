"""calm-fast nat on a tiny model."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from calm_fast.cli import app


def test_nat_runs_and_says_what_it_did(model_folder, rows_file, tmp_path) -> None:
    arguments = ["nat", str(rows_file), "--model", str(model_folder), "--out", str(tmp_path / "out")]
    arguments += ["--steps", "3", "--rank", "2", "--batch-size", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for word in ("negative", "nat", "student", "negative share"):
        assert word in result.output
    assert (tmp_path / "out" / "student" / "adapter_model.safetensors").is_file()
    for folder in ("negative", "nat", "student"):  # the form of the prompts lies beside every adapter
        assert json.loads((tmp_path / "out" / folder / "prompt.json").read_text())["text"] == "{question}\n"
    changed = CliRunner().invoke(app, [*arguments, "--seed", "1"])
    assert changed.exit_code == 2 and "other settings" in changed.output
    assert CliRunner().invoke(app, [*arguments, "--prompt", "plain"]).exit_code == 0  # the same prompts, the same run
    for prompt, message in (
        ("Q {question}", "other prompt"),
        ("chat", "no chat template"),
        ("Q", "`prompt` must have"),
    ):
        refused = CliRunner().invoke(app, [*arguments, "--prompt", prompt])
        assert refused.exit_code == 2 and message in refused.output


def test_rows_that_are_left_out_are_counted(model_folder, rows_file, tmp_path) -> None:
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    for number, row in enumerate(rows):  # bare answers: only the blank one is of no use
        row["answer"] = number // 4 + number % 4 if number else ""
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["nat", str(rows_file), "--model", str(model_folder), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--steps", "2", "--rank", "1", "--batch-size", "2"])
    assert result.exit_code == 0, result.output
    assert "left out 1 rows with a blank `answer`" in result.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["left_out"] == {"a blank `answer`": 1} and results["examples"] == {"right": 23, "wrong": 23}
    assert (
        CliRunner()
        .invoke(app, [*arguments, "--steps", "2", "--rank", "1", "--batch-size", "2"])
        .output.count("left out")
    )


def test_bad_settings_are_bad_usage(model_folder, rows_file, tmp_path) -> None:
    arguments = ["nat", str(rows_file), "--model", str(model_folder), "--out", str(tmp_path / "out")]
    for wrong, message in (
        (["--variant", "x"], "`variant` must be"),
        (["--lr", "-1"], "`learning_rate` must be"),
        (["--steps", "5", "--warmup", "5"], "`warmup` must be below"),
    ):
        result = CliRunner().invoke(app, [*arguments, *wrong])
        assert result.exit_code == 2 and message in result.output
    arguments[3] = str(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "`model` must be the folder" in result.output


def test_missing_files_are_bad_usage(tmp_path) -> None:
    result = CliRunner().invoke(app, ["nat", str(tmp_path / "no"), "--model", ".", "--out", str(tmp_path)])
    assert result.exit_code == 2


def test_data_as_an_option_still_works_and_warns(model_folder, rows_file, tmp_path) -> None:
    arguments = ["nat", "--model", str(model_folder), "--out", str(tmp_path / "out"), "--limit", "8"]
    arguments += ["--steps", "1", "--rank", "1", "--batch-size", "1"]
    result = CliRunner().invoke(app, [*arguments, "--data", str(rows_file)])
    assert result.exit_code == 0, result.output
    assert f"--data is deprecated; write `calm-fast nat {rows_file} ...`" in result.stderr
    again = CliRunner().invoke(app, [*arguments, str(rows_file)])
    assert again.exit_code == 0 and again.stdout == result.stdout and "deprecated" not in again.stderr
    for given, named in (([str(rows_file), "--data", str(rows_file)], "must be given once"), ([], "got none")):
        refused = CliRunner().invoke(app, [*arguments, *given])
        assert refused.exit_code == 2 and "DATA" in refused.output and named in refused.output
    shown = CliRunner().invoke(app, ["nat", "--help"]).output
    assert "DATA" in shown and "--data" not in shown
