from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

import posttrain
from posttrain.cli import app
from posttrain.config import RunFile, schema
from posttrain.errors import DataError, StepError

REPOSITORY = Path(__file__).parent.parent
MODULES = {"clean": "posttrain.runs.clean", "pretrain": "posttrain.runs.pretrain", "tune": "posttrain.search.tune"}

# A pipeline that prints wherever a library could, then hands back its summary.
NOISY = """
import os, sys, atexit, types
def clean(config, *, verbose, quiet):
    print("from Python"); os.write(1, b"from a native library\\n"); os.system("echo from a child")
    atexit.register(lambda: os.write(1, b"at the end\\n"))
    return {"run": config.run.path, "removal_recall": float("nan"), "quiet": quiet}
sys.modules["posttrain.runs.clean"] = types.SimpleNamespace(clean=clean)
from posttrain.cli import main
main()
"""


def command(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    program = ["-c", code] if code else ["-m", "posttrain.cli"]
    # `python -m` and `-c` find the packages in the current folder, installed or not
    return subprocess.run(
        [sys.executable, *program, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def pipeline(monkeypatch):
    """Installs a function in place of the pipeline of that name, and runs the command line on it."""

    def run(name, function, *arguments):
        module = ModuleType(MODULES[name])
        setattr(module, name, function)
        monkeypatch.setitem(sys.modules, MODULES[name], module)
        return CliRunner().invoke(app, [name, *arguments])

    return run


def raising(error):
    def fail(config, **_):
        raise error

    return fail


def test_help_answers_in_about_a_second():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = command("--help")
        seconds.append(time.perf_counter() - start)
        assert result.returncode == 0 and "clean" in result.stdout and "pretrain" in result.stdout
    assert min(seconds) < 1.5


def test_neither_help_nor_schema_imports_anything_heavy():
    code = "import sys; from posttrain.cli import app; app(['schema'], standalone_mode=False); "
    code += "print(*sys.modules)"
    loaded = set(command(code=code).stdout.splitlines()[-1].split())
    assert not loaded & {"torch", "ray", "mlflow", "numpy", "pandas", "pyarrow", "matplotlib", "sklearn"}


def test_schema_prints_the_schema_and_nothing_else():
    result = command("schema")
    assert json.loads(result.stdout) == schema() and result.stderr == ""


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.stdout == f"posttrain {posttrain.__version__}\n" and result.exit_code == 0


@pytest.mark.parametrize("name", ["clean", "pretrain", "tune"])
def test_a_command_hands_the_run_file_with_its_overrides_to_the_pipeline(pipeline, tmp_path, name):
    (tmp_path / "run.yaml").write_text("removal: {budget: 0.2}\nrun: {seed: 3}")
    calls = []

    def record(config, *, verbose, quiet):
        calls.append((config.removal.budget, config.run.seed, verbose, quiet))
        return {}

    arguments = [str(tmp_path / "run.yaml"), "--set", "run.seed=4", "--set", "removal.budget=0.03", "-v"]
    assert pipeline(name, record, *arguments).exit_code == 0
    assert calls == [(0.03, 4, True, False)]


def test_without_a_run_file_the_embedded_default_runs(pipeline):
    configs = []
    result = pipeline("clean", lambda config, **_: configs.append(config) or {})
    assert result.exit_code == 0 and configs == [RunFile()] and result.stdout == ""


def test_json_is_the_one_thing_on_standard_output():
    result = command("clean", "--json", code=NOISY)
    assert result.returncode == 0
    assert json.loads(result.stdout) == {"run": "runs/digits", "removal_recall": None, "quiet": True}
    assert result.stdout.count("\n") == 1
    for line in ("from Python", "from a native library", "from a child", "at the end"):
        assert line in result.stderr


def test_a_failure_with_json_leaves_standard_output_empty():
    result = command("clean", "--json", "--set", "removal.budget=3", code=NOISY)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: --set: removal.budget = 3: should be less than 1\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [(DataError("a.parquet: has no column\n label"), 2), (StepError("embedding failed"), 1)],
)
def test_an_error_is_one_line_and_an_exit_code(pipeline, error, code):
    result = pipeline("clean", raising(error))
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr == f"error: {' '.join(str(error).split())}\n"


@pytest.mark.parametrize("option", [(), ("-v",)], ids=["quiet", "verbose"])
def test_a_store_that_fails_is_one_line_and_an_exit_code_too(pipeline, option):
    what = OSError("When reading key 'a' in bucket 'b': AWS Error UNKNOWN\n(HTTP status 503) at s3://key:hunter2@b/a")
    result = pipeline("clean", raising(what), *option)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "hunter" not in result.stderr
    assert ("Traceback" in result.stderr) == bool(option)
    assert result.stderr.endswith(
        "error: When reading key 'a' in bucket 'b': AWS Error UNKNOWN (HTTP status 503) at s3://***@b/a; "
        "fix the cause and start the same command again\n"
    )


@pytest.mark.parametrize("option", [(), ("-v",)], ids=["quiet", "verbose"])
def test_an_error_neither_steers_the_terminal_nor_shows_a_password(pipeline, option):
    error = DataError("s3://key:hunter2@bucket/\x1b[2J.parquet?secret_key=hunter3 is not readable")
    result = pipeline("clean", raising(error), *option)
    assert "\x1b" not in result.stderr and "hunter" not in result.stderr
    assert result.stderr.endswith("error: s3://***@bucket/\\x1b[2J.parquet?secret_key=*** is not readable\n")


def test_verbose_shows_where_an_error_came_from(pipeline):
    result = pipeline("clean", raising(StepError("embedding failed")), "-v")
    assert "Traceback" in result.stderr and result.stderr.endswith("\nerror: embedding failed\n")


def test_an_interrupted_command_says_how_to_go_on(pipeline):
    result = pipeline("clean", raising(KeyboardInterrupt()))
    assert result.exit_code == 130
    assert result.stderr == "interrupted; start the same command again to continue\n"


def test_a_command_that_is_told_to_end_says_how_to_go_on_and_leaves_the_callers_handler(pipeline):
    def told_to_end(config, **_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    before = signal.getsignal(signal.SIGTERM)
    result = pipeline("clean", told_to_end)
    assert result.exit_code == 143
    assert result.stderr == "terminated; start the same command again to continue\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_fault_of_our_own_keeps_its_traceback(pipeline):
    result = pipeline("clean", raising(ZeroDivisionError("ours")))
    assert isinstance(result.exception, ZeroDivisionError)


def test_a_missing_run_file_is_exit_code_2(tmp_path):
    result = CliRunner().invoke(app, ["clean", str(tmp_path / "nowhere.yaml")])
    assert result.exit_code == 2 and re.fullmatch(r"error: .*nowhere\.yaml: there is no such .*\n", result.stderr)


def test_an_unknown_option_is_exit_code_2():
    assert CliRunner().invoke(app, ["clean", "--bugdet"]).exit_code == 2


def test_output_into_a_closed_pipe_is_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(
        [sys.executable, "-m", "posttrain.cli", "schema"],
        cwd=REPOSITORY,
        stdout=writing,
        stderr=subprocess.PIPE,
    )
    os.close(writing)
    assert b"Traceback" not in result.stderr
