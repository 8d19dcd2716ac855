"""calm-fast nat on a tiny model."""

from __future__ import annotations

from typer.testing import CliRunner

from calm_fast.cli import app


def test_nat_runs_and_says_what_it_did(model_folder, rows_file, tmp_path) -> None:
    arguments = ["nat", "--data", str(rows_file), "--model", str(model_folder), "--out", str(tmp_path / "out")]
    arguments += ["--steps", "3", "--rank", "2", "--batch-size", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for word in ("negative", "nat", "student", "negative share"):
        assert word in result.output
    assert (tmp_path / "out" / "student" / "adapter_model.safetensors").is_file()
    changed = CliRunner().invoke(app, [*arguments, "--seed", "1"])
    assert changed.exit_code == 2 and "other settings" in changed.output


def test_missing_files_are_bad_usage(tmp_path) -> None:
    result = CliRunner().invoke(app, ["nat", "--data", str(tmp_path / "no"), "--model", ".", "--out", str(tmp_path)])
    assert result.exit_code == 2
