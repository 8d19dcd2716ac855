"""The command line: `calm-fast demo | verify | bench | nat | vote | rank | env`. Imports happen inside the commands."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

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


class Suite(str, Enum):
    """The suites of `bench`."""

    quick = "quick"
    full = "full"


class Memory(str, Enum):
    """The source of memory for CPU tensors in `bench`: kept from earlier calls, or from the system."""

    kept = "kept"
    system = "system"


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


@contextlib.contextmanager
def _folder(out: Path) -> Iterator[None]:
    """Create `out`, and fail with one readable line before minutes of work are lost if that is not possible.

    If the command fails without writing anything, the folders that were created here are removed.
    """
    new = [folder for folder in (out, *out.parents) if not os.path.lexists(folder)]
    try:
        try:
            what = "create the folder"
            out.mkdir(parents=True, exist_ok=True)
            what = "write into"
            with tempfile.TemporaryFile(dir=out):
                pass
        except OSError as problem:
            raise typer.BadParameter(f"cannot {what} {out}: {problem.strerror}", param_hint="--out") from problem
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # stops at the first folder that is not empty
            for folder in new:
                with contextlib.suppress(FileNotFoundError):  # not created yet
                    folder.rmdir()
        raise


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results.json and report.html.")] = Path("demo_out"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of keys, weights and batches.")] = 0,
) -> None:
    """Compose two small language models end to end: key-value arithmetic on keys the composition never saw.

    Trains A (knows keys), B (knows numbers) and their composition, in about 4 minutes on 2 CPU cores. Prints the
    accuracies beside the paper's and writes results.json and report.html.
    """
    with _folder(out):
        from calm_fast.experiments import key_value_arithmetic

        key_value_arithmetic.run(out, seed)


@app.command()
def verify(
    impl: Annotated[list[str] | None, typer.Option(help="An implementation; repeat for several. Default: all.")] = None,
    op: Annotated[list[str] | None, typer.Option(help="An op; repeat for several. Default: all.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Also write every row to this file.")
    ] = None,
    brief: Annotated[bool, typer.Option("--brief", help="Print only failed rows and the summary.")] = False,
) -> None:
    """Check every op with every implementation that can run here against the float64 reference.

    Exit code 1 if any quantity exceeds its bound. Without a GPU, Triton kernels run in Triton's CPU interpreter, in a
    fresh process. From a source checkout with g++, CUDA kernels run in the CPU emulation.
    """
    with contextlib.nullcontext() if json_file is None else _folder(json_file.parent):
        from calm_fast.verify import run

        ops, impls = op or run.ALL_OPS, impl or ()
        try:
            run.plan(ops, impls)
        except ValueError as problem:
            raise typer.BadParameter(str(problem)) from problem
        raise typer.Exit(run.verify(ops, impls, json_file, every_row=not brief))


@app.command()
def bench(
    suite: Annotated[Suite, typer.Option(help="quick: minutes; full: more cases and baselines.")] = Suite.quick,
    op: Annotated[list[str] | None, typer.Option(help="An op; repeat for several. Default: all.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl, report.md and report.html.")] = Path("bench_out"),
    compare: Annotated[str | None, typer.Option(metavar="REV", help="A git revision to time beside this one.")] = None,
    memory: Annotated[
        Memory | None,
        typer.Option(help="CPU: keep released memory for the next call, or give it back. Default: kept with glibc."),
    ] = None,
) -> None:
    """Measure speed and memory against strong baselines on this machine.

    More options: python -m calm_fast.benchmarks.run --help. Exit code 1 if an implementation gives a wrong result; with
    --compare, exit code 3 if this checkout is slower than REV.
    """
    with _folder(out):
        from calm_fast.benchmarks.run import main as run_main

        chosen = [word for name in op or () for word in ("--op", name)]
        chosen += ["--compare", compare] if compare is not None else []
        chosen += ["--memory", memory.value] if memory is not None else []
        raise typer.Exit(run_main(["--suite", suite.value, "--out", str(out), *chosen]))


_Rows = Annotated[Path, typer.Argument(exists=True, dir_okay=False, metavar="DATA", help="JSONL rows, .gz or plain.")]


@app.command()
def nat(
    model: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Folder of a causal language model.")],
    out: Annotated[Path, typer.Option(help="Folder for adapters, checkpoints and results.json.")],
    data: Annotated[
        Path | None, typer.Argument(exists=True, dir_okay=False, metavar="DATA", help="JSONL rows, .gz or plain.")
    ] = None,
    old_data: Annotated[Path | None, typer.Option("--data", exists=True, dir_okay=False, hidden=True)] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each stage.")] = 300,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    warmup: Annotated[
        int | None, typer.Option(min=0, help="Steps until --lr is reached. Default: a tenth of --steps, at most 20.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of both LoRAs.")] = 8,
    variant: Annotated[str, typer.Option(help="Form of the layers: paper or released.")] = "paper",
    nce_masking: Annotated[
        str, typer.Option(help="Tokens that NCE counts: paper (rationales) or released (prompts too).")
    ] = "paper",
    target: Annotated[list[str] | None, typer.Option(help="A layer name; repeat. Default: q_proj, v_proj.")] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="chat, plain, or a text with {question}. Default: chat if the tokenizer has a template."),
    ] = None,
    max_length: Annotated[int, typer.Option(min=8, help="Most tokens of an example.")] = 512,
    limit: Annotated[int | None, typer.Option(min=1, help="Most rows to read.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Learn from wrong rationales: negative LoRA, NAT, then NCE into one LoRA (arXiv 2312.12832).

    Rows have question, answer and generated_answer (a list of rationales). A rationale is right if it reaches the row's
    answer. Writes negative/ and student/ (PEFT adapters), nat/ and results.json; the same call resumes an interrupted
    run.
    """
    data = _data_argument(data, old_data)
    with _folder(out):
        from calm_fast.nat import Settings, run

        try:
            settings = Settings(
                steps=steps, batch_size=batch_size, learning_rate=lr, warmup=warmup, rank=rank, variant=variant,
                nce_masking=nce_masking, target_modules=tuple(target or ("q_proj", "v_proj")), seed=seed,
            )  # fmt: skip
            results = run(data, model, out, settings, limit=limit, max_length=max_length, prompt=prompt)
        except ValueError as problem:
            raise typer.BadParameter(str(problem)) from problem
        for reason, count in results["left_out"].items():
            typer.echo(f"left out {count} rows with {reason}")
        for stage, losses in results["losses"].items():
            typer.echo(f"{stage:10} loss {losses[0]['loss']:.4f} -> {losses[-1]['loss']:.4f}")
        for path, gate in results["gates"].items():
            typer.echo(f"{path:50} negative share {gate['mean']:.3f} +- {gate['std']:.3f}")


def _data_argument(data: Path | None, old_data: Path | None) -> Path:
    """Return DATA, which may still come as --data."""
    if data is not None and old_data is not None:
        raise typer.BadParameter(f"must be given once, got {data} and --data {old_data}", param_hint="DATA")
    if old_data is not None:
        typer.echo(f"calm-fast nat: --data is deprecated; write `calm-fast nat {old_data} ...`", err=True)
    found = data if data is not None else old_data
    if found is None:
        raise typer.BadParameter("must be a file of JSONL rows, got none", param_hint="DATA")
    return found


rank = typer.Typer(help="Train and use a ranking model for self-consistency.", no_args_is_help=True)
app.add_typer(rank, name="rank")


def _check_device(device: str | None) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as problem:  # the latter where torch is built without CUDA
        raise typer.BadParameter(
            f"must be a device that torch can use, got {device!r}: {problem}", param_hint="--device"
        ) from problem


@rank.command("train")
def rank_train(
    data: _Rows,
    model: Annotated[str, typer.Option(help="Folder or name of a transformers encoder or decoder.")],
    out: Annotated[Path, typer.Option(help="Folder for ranker/, results.json and the files that resuming needs.")],
    loss: Annotated[str, typer.Option(help="power, margin or bce.")] = "power",
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions in a step.")] = 32,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the head.")] = 1e-3,
    backbone_lr: Annotated[float, typer.Option(help="Peak learning rate of a trained backbone.")] = 2e-5,
    train_backbone: Annotated[bool, typer.Option("--train-backbone", help="Train the model too.")] = False,
    hidden: Annotated[int, typer.Option(min=1, help="Width of the head.")] = 256,
    max_length: Annotated[int | None, typer.Option(min=16, help="Most tokens of question and rationale.")] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of a frozen model: float32, bfloat16 or float16.")] = "float32",
    holdout: Annotated[float, typer.Option(min=0, max=0.9, help="Share of questions to evaluate on.")] = 0.1,
    limit: Annotated[int | None, typer.Option(min=1, help="Most rows to read.")] = None,
    answer_regex: Annotated[str | None, typer.Option(help="Finds an answer if nothing else does.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that compare answers.")] = None,
    device: Annotated[str | None, typer.Option(help="For example cuda. Default: cpu.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train a ranker to tell right rationales from wrong ones; it is evaluated on held-out questions.

    Rows have question, answer and generated_answer (a list of rationales). The same call resumes an interrupted run.
    """
    import torch

    from calm_fast.consistency.ranking.pipeline import run_training
    from calm_fast.consistency.ranking.training import RankerSettings
    from calm_fast.consistency.voting.samples import read_rows

    if dtype not in ("float32", "bfloat16", "float16") or (train_backbone and dtype != "float32"):
        raise typer.BadParameter(
            f"must be float32, or bfloat16 or float16 for a frozen model, got {dtype}", param_hint="--dtype"
        )
    _check_device(device)
    with _folder(out):
        try:
            settings = RankerSettings(
                loss=loss, epochs=epochs, questions_per_step=batch_size, learning_rate=lr,
                backbone_learning_rate=backbone_lr, seed=seed,
            )  # fmt: skip
            results = run_training(
                read_rows(data, limit), model, out, settings, train_backbone=train_backbone, max_length=max_length,
                dtype=getattr(torch, dtype), hidden=hidden, holdout=holdout, pattern=answer_regex, workers=workers,
                device=device,
            )  # fmt: skip
        except (ValueError, OSError) as problem:
            raise typer.BadParameter(str(problem)) from problem
        typer.echo(f"loss {results['losses'][0]:.4f} -> {results['losses'][-1]:.4f}")
        for side, row in results["pair_accuracy"].items():
            share = "-" if row["accuracy"] is None else f"{row['accuracy']:.4f}"
            typer.echo(f"pair accuracy, {side.replace('_', ' ')}: {share} ({row['pairs']} pairs)")


@rank.command("score")
def rank_score(
    data: _Rows,
    ranker: Annotated[Path, typer.Option(exists=True, file_okay=False, help="--out of `rank train`.")],
    out: Annotated[
        Path, typer.Option(dir_okay=False, help="File for the rows with `scores`; gzipped if it ends in .gz.")
    ],
    backbone: Annotated[str | None, typer.Option(help="Folder of the frozen model, if it was moved.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most rows to read.")] = None,
    device: Annotated[str | None, typer.Option(help="For example cuda. Default: cpu.")] = None,
) -> None:
    """Score every rationale for `calm-fast vote --rule adaptive`. The same call resumes an interrupted run."""
    from calm_fast.consistency.ranking.pipeline import run_scoring
    from calm_fast.consistency.voting.samples import read_rows

    _check_device(device)
    with _folder(out.parent):
        try:
            run_scoring(read_rows(data, limit, need_answer=False), ranker, out, backbone=backbone, device=device)
        except (ValueError, OSError) as problem:
            raise typer.BadParameter(str(problem)) from problem
        typer.echo(f"wrote {out}")


@app.command()
def vote(
    data: _Rows,
    k: Annotated[str | None, typer.Option(help="Sizes, for example 1,2,4,8. Default: powers of two.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.json, votes.jsonl and curve.png.")] = Path("vote_out"),
    rule: Annotated[str, typer.Option(help="count, or by scores weighted or adaptive.")] = "count",
    scores: Annotated[str, typer.Option(help="Field of the rows with one score for each sample.")] = "scores",
    lam: Annotated[float, typer.Option(help="Weight of a score in the adaptive rule.")] = 1.0,
    resamples: Annotated[int, typer.Option(min=1, help="Random subsets of each question, for rules by scores.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the subsets.")] = 0,
    answer_regex: Annotated[str | None, typer.Option(help="Finds an answer if nothing else does.")] = None,
    equality: Annotated[str, typer.Option(help="math, exact or text.")] = "math",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that compare answers. Default: one for each CPU.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="CPU seconds to compare two answers.")] = 5.0,
    cache: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder that keeps comparisons of answers for later calls.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most rows to read.")] = None,
) -> None:
    """Count the votes of sampled rationales: single, majority@k and any@k accuracy, ties, and a plot of the curve.

    Rows have question, answer and generated_answer (a list of rationales). The answer of a rationale is the last
    \\boxed{...}, else the text after "The answer is", else what --answer-regex finds. math-verify decides which answers
    are equal, after cheaper tests.
    """
    try:
        ks = tuple(int(size) for size in k.split(",")) if k is not None else ()
    except ValueError as problem:
        raise typer.BadParameter(f"must be numbers like 1,2,4,8, got {k!r}", param_hint="--k") from problem
    if any(size < 1 for size in ks) or len(set(ks)) < len(ks):
        raise typer.BadParameter(f"must be different sizes of at least 1, got {k!r}", param_hint="--k")
    with _folder(out):
        from rich.console import Console

        from calm_fast.consistency.voting import report as vote_report

        settings = vote_report.VoteSettings(
            ks=ks, rule=rule, lam=lam, scores=scores, resamples=resamples, seed=seed, answer_regex=answer_regex,
            equality=equality, workers=workers, timeout=timeout, cache_dir=cache,
        )  # fmt: skip
        try:
            report = vote_report.run(data, out, settings, limit=limit)
        except ValueError as problem:
            raise typer.BadParameter(str(problem)) from problem
        vote_report.print_report(report, Console())


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


if __name__ == "__main__":
    main()
