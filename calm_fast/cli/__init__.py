"""The command line, `calm-fast --help`. Imports happen inside the commands."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from calm_fast.cli.ask import ask
from calm_fast.cli.compose import compose, evaluate, generate
from calm_fast.cli.demo import demo
from calm_fast.cli.measuring import bench, verify
from calm_fast.cli.nat import nat
from calm_fast.cli.plan import plan
from calm_fast.cli.rank import rank
from calm_fast.cli.serve import serve
from calm_fast.cli.vote import answers, vote
from calm_fast.core.broken_pipe import quiet_end

app = typer.Typer(
    name="calm-fast",
    help="Fused building blocks for composing frozen language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help and one-line errors, in terminals and in logs
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(show: bool) -> None:
    if show:
        from calm_fast._version import __version__

        typer.echo(f"calm_fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")]
    = False,
) -> None:  # fmt: skip
    pass


# in the order of `calm-fast --help`
app.command()(demo)
app.command()(compose)
app.command()(generate)
app.command("eval")(evaluate)
app.command()(serve)
app.command()(plan)
app.command()(verify)
app.command()(bench)
app.command()(nat)
app.add_typer(rank, name="rank")
app.command()(ask)
app.command()(vote)
app.command()(answers)


@app.command()
def env(
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print versions, devices, the implementations that run here, and the reasons why others do not."""
    from calm_fast import env_report

    raise typer.Exit(env_report.main(["--json"] if json_output else []))


def main() -> None:
    """Run the console script. Bad input gives one line and exit code 2; an unexpected error keeps its traceback."""
    with quiet_end():
        try:
            app()
        except ImportError as problem:  # a package is missing or broken
            typer.echo(
                f"calm-fast: {type(problem).__name__}: {problem}. `calm-fast env` shows what is installed.", err=True
            )
            sys.exit(1)
