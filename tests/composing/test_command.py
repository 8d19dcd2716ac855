"""The three commands: the page's worked example runs, bad usage is one line, what is loaded is said first."""

from __future__ import annotations

import json
import re
import shlex
import warnings
from pathlib import Path

import pytest
from tiny import completions, write_rows
from transformers import AutoTokenizer
from typer.testing import CliRunner

from calm_fast.cli import app
from calm_fast.hf import ComposedForCausalLM

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "compose_command.md").read_text(encoding="utf-8")


def invoke(*args: object):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_worked_example_runs_as_it_stands(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,), (commands,) = blocks("python"), blocks("sh")
    exec(compile(code, "compose_command.md", "exec"), {})
    outputs = {}
    for line in commands.splitlines():
        program, name, *arguments = shlex.split(line)
        assert program == "calm-fast"
        result = invoke(name, *arguments)
        assert result.exit_code == 0, result.output
        outputs[name] = result
    assert list(outputs) == ["compose", "generate", "eval"]
    assert "compare bits per byte" in outputs["compose"].stdout
    loaded = [
        line for line in outputs["generate"].stderr.splitlines() if line.startswith(("A ", "B ", "A+B ", "memory"))
    ]
    assert len(loaded) == 4 and "LlamaForCausalLM" not in outputs["generate"].stdout
    results = json.loads((tmp_path / "AB" / "results.json").read_text())
    held = results["held_out"]
    assert held["same_tokenizer"] == {"A": False} and results["rows"]["held_out"] == 8
    assert held["models"]["A+B"]["loss_per_token"] < held["models"]["B"]["loss_per_token"] - 0.4
    assert held["differences"]["A+B - A"]["unit"] == "bits per byte"
    scores = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert scores["held_out"] == held, "the saved composition scores as the trained one"
    tokenizer = AutoTokenizer.from_pretrained("AB")
    prompt = tokenizer("key 1 2", return_tensors="pt")
    written = ComposedForCausalLM.from_pretrained("AB").generate(**prompt, max_new_tokens=8, do_sample=False)
    text = AutoTokenizer.from_pretrained("AB").decode(
        written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert outputs["generate"].stdout == text + "\n"


def test_every_option_in_the_page_exists() -> None:
    known = "".join(invoke(name, "--help").output for name in ("compose", "generate", "eval"))
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE))
    assert used and not [option for option in used if option not in known]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--steps", "0"], "--steps"),
        (["--connections", "3-2"], "must be uniform:N, or pairs like 3:2,5:4, got '3-2'"),
        (["--connections", "9:0"], "`connections`"),
        (["--dtype", "int8"], "`dtype` must be one of"),
        (["--device", "nothing"], "--device"),
        (["--warmup", "9", "--steps", "9"], "`warmup` must be below"),
        (["--anchor", "no/such/folder/here"], "compose: `anchor` must be"),
        (["--augmenter", "no/such/folder/here"], "compose: `augmenter` must be"),
    ],
)
def test_bad_usage_of_compose_is_one_readable_error(arguments, named, anchor, sibling, tmp_path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", completions())
    given = ["--anchor", anchor, "--augmenter", sibling, "--out", tmp_path / "out", *arguments]
    result = invoke("compose", rows, *given)
    assert result.exit_code == 2, result.output
    errors = [line for line in result.output.splitlines() if "rror: " in line]
    assert len(errors) == 1 and named in errors[0] and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_a_wrong_row_is_named_with_its_line(anchor, sibling, tmp_path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [*completions()[:2], {"question": "?"}])
    result = invoke("compose", rows, "--anchor", anchor, "--augmenter", sibling, "--out", tmp_path / "out",
                    "--connections", "uniform:2")  # fmt: skip
    assert result.exit_code == 2 and "rows.jsonl, line 3: a row must be" in result.output


def test_prompts_come_from_one_place(anchor, sibling, tmp_path) -> None:
    import calm_fast

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calm_fast.compose(anchor, sibling, connections="uniform:1").save_pretrained(tmp_path / "AB")
    (tmp_path / "prompt.txt").write_text("key 1 2")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    given = ["generate", tmp_path / "AB", "--max-new-tokens", "3"]
    first = invoke(*given, "--prompt", "key 1 2")
    assert first.exit_code == 0 and "W_o of every connection is zero" in first.stderr
    assert invoke(*given, "--prompt-file", tmp_path / "prompt.txt").stdout == first.stdout
    piped = CliRunner().invoke(app, [*map(str, given), "--prompt-file", "-"], input="key 1 2")
    assert piped.stdout == first.stdout
    for wrong, named in (([], "got neither"), (["--prompt", "x", "--prompt-file", tmp_path / "prompt.txt"], "got both"),
                         (["--prompt-file", tmp_path / "latin.txt"], "must be UTF-8")):  # fmt: skip
        result = invoke(*given, *wrong)
        assert result.exit_code == 2 and named in result.output
    assert invoke("generate", tmp_path, "--prompt", "x").exit_code == 2, "a folder without a composition"
