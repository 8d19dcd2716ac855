"""The command line: help, errors in one line, exit codes, lazy imports; the environment report on broken machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version
from typer.testing import CliRunner

import calm_fast
from calm_fast import env_report
from calm_fast.cli import app

COMMANDS = ("demo", "compose", "generate", "eval", "serve", "verify", "bench", "ask", "vote", "answers", "env")


def invoke(*args):
    return CliRunner().invoke(app, list(args))


def fresh(*args, **kwargs):
    env = {**os.environ, **kwargs.pop("env", {})}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=120, env=env, **kwargs)


def test_help_lists_every_command():
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(f"\n  {name} " in result.output for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0 and result.output.startswith("Usage: ")


def test_version():
    result = invoke("--version")
    assert (result.exit_code, result.output.strip()) == (0, f"calm_fast {calm_fast.__version__}")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["nonsense"], "nonsense"),
        (["demo", "--seed", "one"], "--seed"),
        (["demo", "--seed", "-1"], "--seed"),
        (["demo", "extra"], "extra"),
        (["demo", "--seeds", "0,1"], "--seeds"),
        (["demo", "--small"], "--small"),
        (["demo", "--ablations", "--seed", "1"], "--seed"),
        (["demo", "--ablations", "--seeds", "0;1"], "0;1"),
        (["bench", "--suite", "huge"], "--suite"),
        (["bench", "--op", "attention"], "attention"),
        (["bench", "--memory", "mine"], "--memory"),
        (["bench", "--lane", "avx1"], "--lane"),
        (["env", "--yaml"], "--yaml"),
    ],
)
def test_bad_usage_is_one_readable_error_and_exit_2(args, named):
    result = invoke(*args)
    assert result.exit_code == 2
    errors = [line for line in result.output.splitlines() if "rror: " in line]
    assert len(errors) == 1 and named in errors[0]
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_out_that_cannot_be_a_folder_is_refused_before_the_work(command, tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke(command, "--out", str(tmp_path / "file" / "out"))
    assert result.exit_code == 2 and "--out: cannot create the folder" in result.output


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_out_that_cannot_be_written_is_refused_before_the_work(command, tmp_path, monkeypatch):
    def refuse(**where):
        raise PermissionError(13, "Permission denied", str(where["dir"]))

    monkeypatch.setattr("calm_fast.cli.common.tempfile.TemporaryFile", refuse)  # root can write everywhere
    result = invoke(command, "--out", str(tmp_path))
    assert (
        result.exit_code == 2 and "--out: cannot write into" in result.output and "Permission denied" in result.output
    )


def test_a_folder_where_a_file_is_wanted_is_refused_before_the_work(tmp_path):
    result = invoke("verify", "--json", str(tmp_path))
    assert result.exit_code == 2 and "is a directory" in result.output


def test_a_failed_command_takes_the_folders_that_it_made_away(monkeypatch, tmp_path):
    from calm_fast.experiments import key_value_arithmetic

    def fail(out, seed):
        if seed:
            (out / "kept.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(key_value_arithmetic, "run", fail)
    made = tmp_path / "a" / "b"
    for out, seed, left in ((made, 0, []), (tmp_path, 0, []), (made, 1, [tmp_path / "a"])):
        invoke("demo", "--out", str(out), "--seed", str(seed))
        assert list(tmp_path.iterdir()) == left
    assert (made / "kept.json").is_file()
    assert invoke("verify", "--op", "nothing", "--json", str(tmp_path / "c" / "x.json")).exit_code == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_no_command_shows_the_help_and_exits_2():
    result = invoke()
    assert result.exit_code == 2 and "Commands:" in result.output


def test_demo_passes_its_options_on(monkeypatch, tmp_path):
    from calm_fast.experiments import key_value_arithmetic

    seen = []
    monkeypatch.setattr(key_value_arithmetic, "run", lambda out, seed: seen.append((out, seed)))
    assert invoke("demo", "--out", str(tmp_path / "a" / "b"), "--seed", "7").exit_code == 0
    assert seen == [(tmp_path / "a" / "b", 7)] and seen[0][0].is_dir()


def test_demo_passes_the_options_of_its_ablations_on(monkeypatch, tmp_path):
    from calm_fast.experiments.key_value_arithmetic import Recipe, ablations

    seen = []
    monkeypatch.setattr(ablations, "run", lambda out, seeds, names, *, recipe: seen.append((out, seeds, names, recipe)))
    args = ["demo", "--ablations", "--out", str(tmp_path / "a")]
    assert invoke(*args).exit_code == 0
    assert invoke(*args, "--seeds", "4,2", "--variants", "standard, lora", "--steps", "7").exit_code == 0
    assert invoke(*args, "--small").exit_code == 0
    plain, chosen, small = seen
    assert plain == (tmp_path / "a" / "ablations", (0, 1, 2), None, Recipe())
    assert chosen[:3] == (tmp_path / "a" / "ablations", (4, 2), ["standard", "lora"])
    assert chosen[3].composition.steps == 7 and chosen[3].a == Recipe().a
    assert small[3] == ablations.SMALL != Recipe()


@pytest.mark.parametrize("code", [0, 1])
def test_bench_passes_its_options_and_exit_code_on(code, monkeypatch, tmp_path):
    from calm_fast.benchmarks import run

    seen = []
    monkeypatch.setattr(run, "main", lambda argv: seen.append(argv) or code)
    ops = ["--op", "cross_attention", "--op", "vote"]
    memory, lane = ["--memory", "system"], ["--lane", "avx2"]
    args = ["--suite", "full", *ops, *memory, *lane, "--out", str(tmp_path)]
    assert invoke("bench", *args).exit_code == code
    assert seen == [["--suite", "full", "--out", str(tmp_path), *lane, *ops, *memory]]
    run.parser().parse_args(seen[0])  # the options exist


def test_python_m_calm_fast_is_the_same_program():
    result = fresh("-m", "calm_fast", "--version")
    assert (result.returncode, result.stdout.strip()) == (0, f"calm_fast {calm_fast.__version__}")


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom calm_fast.cli import app\n"
        "assert CliRunner().invoke(app, ['demo', '--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'triton', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    result = fresh("-c", code)
    assert result.stdout.strip() == "[]", result.stderr


# ---- the environment report -----------------------------------------------------------------------------------------


def test_env_reports_versions_devices_and_implementations():
    import torch

    report = json.loads(invoke("env", "--json").output)
    assert Version(report["versions"]["torch"]).public == Version(torch.__version__).public  # the build may be left out
    assert set(report["implementations"]["cross_attention"]) == {"reference", "torch", "triton", "native"}
    assert report["implementations"]["cross_attention"]["torch"] == "yes"
    native = report["implementations"]["cross_attention"]["native"]
    assert native == "yes, for cpu tensors" or native.startswith("no: the compiled library ")
    assert set(report["compiled library"]) == {"_cpu", "_cuda"}
    text = invoke("env")
    assert text.exit_code == 0
    assert all(word in text.output for word in ("versions", "devices", "implementations that run here", "triton"))
    assert str(Path.home()) + "/" not in text.output


def test_env_says_why_triton_does_not_run_here(monkeypatch):
    import torch

    if torch.cuda.is_available():
        pytest.skip("Triton does run here: there is a GPU")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    report = env_report.collect()["implementations"]
    assert report["cross_attention"]["triton"] == "no: CPU tensors need TRITON_INTERPRET=1 in the environment"
    assert report["vote"]["triton"] == report["maj_at_k"]["triton"] == "no: this op has no Triton kernel"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    report = env_report.collect()["implementations"]
    assert report["cross_attention"]["triton"] == "yes, in Triton's CPU interpreter"
    assert report["vote"]["triton"] == "no: this op has no Triton kernel"


@pytest.fixture
def broken(tmp_path):
    """Return a function that puts packages which fail to import ahead of the real ones on the path."""

    def make(*names):
        for name in names:
            (tmp_path / name).mkdir()
            home = Path.home()
            (tmp_path / name / "__init__.py").write_text(f'raise OSError("{home}/lib/{name}.so: undefined symbol")')
        root = Path(calm_fast.__file__).parents[1]
        return {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}

    return make


def test_env_survives_a_broken_torch(broken):
    result = fresh("-m", "calm_fast.env_report", env=broken("torch"))
    assert result.returncode == 0, result.stderr
    assert "torch cannot be imported (OSError: " in result.stdout
    assert "undefined symbol" in result.stdout and "Traceback" not in result.stderr
    if str(Path.home()) != "/":
        assert str(Path.home()) + "/lib" not in result.stdout and "~/lib/torch.so" in result.stdout


def test_env_survives_a_broken_triton(broken):
    env = {**broken("triton"), "TRITON_INTERPRET": "1"}
    result = fresh("-m", "calm_fast.env_report", "--json", env=env)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert "undefined symbol" in report["broken imports"]["triton"]
    impls = report["implementations"]["cross_attention"]
    assert impls["torch"] == "yes"
    assert impls["triton"].startswith("no: its kernels cannot be imported (OSError")


@pytest.mark.parametrize("unbuffered", ["", "1"])  # the write fails at the program's end, or at the print itself
@pytest.mark.parametrize(
    "args",
    [
        ["calm_fast", "env"],
        ["calm_fast.env_report"],
        ["calm_fast", "verify", "--op", "vote", "--impl", "torch"],
    ],
    ids=" ".join,
)
def test_output_without_a_reader_ends_the_program_quietly(args, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    try:
        command = [sys.executable, "-m", *args]
        result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, env=env)
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


def test_closed_output_is_no_error():
    result = fresh(
        "-c", "import sys; sys.stdout = None; sys.argv[1:] = ['env']; from calm_fast.cli import main; main()"
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_env_module_refuses_unknown_arguments(capsys):
    assert env_report.main(["--yaml"]) == 2
    assert "usage: python -m calm_fast.env_report [--json]" in capsys.readouterr().err
