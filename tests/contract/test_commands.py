"""The command line starts: every subcommand has its help, and `env` names every package."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

COMMANDS = ([], ["demo"], ["verify"], ["bench"], ["nat"], ["rank"], ["rank", "train"], ["rank", "score"], ["vote"],
            ["answers"], ["env"], ["compose"], ["generate"], ["eval"], ["plan"], ["serve"], ["ask"])  # fmt: skip


def calm_fast(*arguments: str) -> str:
    command = [sys.executable, "-W", "error::FutureWarning", "-m", "calm_fast", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(command: list[str]) -> None:
    assert "Usage" in calm_fast(*command, "--help")


def test_no_command_is_missing_above() -> None:
    from calm_fast import cli

    named = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    named |= {group.name or group.typer_instance.info.name for group in cli.app.registered_groups}
    assert named == {command[0] for command in COMMANDS if command}


def test_env_names_every_package() -> None:
    versions = json.loads(calm_fast("env", "--json"))["versions"]
    for package in ("transformers", "peft", "accelerate", "math-verify", "typer"):
        assert versions[package][0].isdigit()
