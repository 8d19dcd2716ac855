"""The example trains all three stages: on additions it makes itself, and on real rows where they are."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("--steps", "8", "--limit", "24", "--max-length", "96")


@pytest.fixture
def example():
    """The example as a module: another process would import torch once more, for seconds."""
    spec = importlib.util.spec_from_file_location("nat_tiny", ROOT / "examples" / "nat_tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small lose with more, and lose much on a busy machine
    yield module
    torch.set_num_threads(threads)


def check_report(text: str, falls: bool) -> None:
    """Every stage has losses, every layer gate statistics, and no log lines of Trainer stand in between."""
    for stage in ("negative", "NAT", "NCE"):
        line = re.search(rf"^{stage} +loss .*$", text, re.MULTILINE)
        assert line, text
        losses = [float(x) for x in re.findall(r"step \d+: ([\d.]+)", line.group())]
        assert len(losses) == 3 and all(0 < loss < 20 for loss in losses), line.group()
        assert losses[-1] < losses[0] or not falls, line.group()
    gates = re.findall(r"^gate +(\S+) +p_neg ([\d.]+) \+- [\d.]+ +over (\d+) tokens", text, re.MULTILINE)
    wanted = {f"model.layers.{i}.self_attn.{name}" for i in range(3) for name in ("q_proj", "v_proj")}
    assert {path for path, _, _ in gates} == wanted
    assert all(0 < float(mean) < 1 and int(tokens) > 0 for _, mean, tokens in gates)
    held_out = re.search(r"held-out loss +base ([\d.]+) +NAT ([\d.]+) +student ([\d.]+)", text)
    assert held_out and all(0 < float(loss) < 20 for loss in held_out.groups())
    assert "{'loss'" not in text


def test_example_trains_all_stages_on_generated_rows_and_keeps_its_adapters(tmp_path, forked) -> None:
    command = (ROOT / "examples" / "nat_tiny.py", "--generated", *SHORT, "--out", tmp_path)
    run = forked.run(*command, cwd=tmp_path.parent, path=ROOT)
    assert run.returncode == 0, run.stderr
    check_report(run.stdout, falls=True)
    for file in ("negative/adapter_model.safetensors", "nat/dual_lora.safetensors", "student/adapter_config.json"):
        assert (tmp_path / file).is_file(), file


def test_example_trains_all_stages_on_real_rows(example, shared_data, capsys) -> None:
    file = shared_data / "math_gpt35_dev.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"real rationales are not here: no {file.name} in ../shared/data")
    example.main(["--data", str(file), *SHORT])
    text = capsys.readouterr().out
    right, wrong = map(int, re.search(r"24 questions: (\d+) right and (\d+) wrong", text).groups())
    assert right > 20 and wrong > 20 and right + wrong <= 24 * 8
    check_report(text, falls=False)  # real rationales differ too much for a trend in eight steps


def test_example_says_what_to_do_where_the_data_is_absent(example, tmp_path) -> None:
    with pytest.raises(SystemExit) as stop:
        example.main(["--data", str(tmp_path / "absent.jsonl")])
    message = str(stop.value)
    assert "absent.jsonl, which is not there" in message and "--data FILE" in message and "--generated" in message
