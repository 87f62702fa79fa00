"""Job files, and the commands that take them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.config import JobFile, Run, load, load_job, schema
from posttrain.errors import ConfigError, DataError, LockedError

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "job.yaml"
        path.write_text(text)
        return path

    return write


def job_complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_job(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path}: ")


def test_a_job_file_is_a_run_file_with_a_name_for_its_model(write: Write) -> None:
    job = load_job(write("job: {name: digits}\nremoval: {budget: 0.1}"))
    assert (job.job.name, job.job.lock_wait_s, job.gate.margin, job.removal.budget) == ("digits", 0, 0.0, 0.1)
    # ids alone: a copy of the data for every run of the job would fill its disk
    assert load(write("removal: {budget: 0.1}\nresults: {cleaned: manifest}")) == job.run_file()
    assert job.run_file(run=Run(path="elsewhere")) == load(
        None, ["run.path=elsewhere", "removal.budget=0.1", "results.cleaned=manifest"]
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", "job.name has to be set"),
        ("job: {}", "job.name has to be set"),
        ("job: {nam: x}", "job.name has to be set; job.nam is not a key of a run file; did you mean job.name?"),
        ("job: {name: a/b}", 'job.name = "a/b": should be a name without / : % quotes and spaces'),
        ("job: x", 'job = "x": should be a mapping with keys beneath it'),
        ("job: {name: x, lock_lease_s: 0}", "job.lock_lease_s = 0: should be greater than or equal to 1"),
        ("job: {name: x, lock_wait_s: -1}", "job.lock_wait_s = -1: should be greater than or equal to 0"),
        ("{job: {name: x}, gate: {margn: 0}}", "gate.margn is not a key of a run file; did you mean gate.margin?"),
        ("{job: {name: x}, gate: {alarm_share: 0}}", "gate.alarm_share = 0: should be greater than 0"),
        ("{job: {name: x}, removal: {budget: 3}}", "removal.budget = 3: should be less than 1"),
    ],
)
def test_what_is_wrong_in_a_job_file_is_said_as_of_a_run_file(write: Write, text: str, expected: str) -> None:
    assert job_complaint(write(text)) == expected


def test_a_run_file_has_no_job() -> None:
    with pytest.raises(ConfigError, match=r"^--set: job is not a key of a run file"):
        load(None, ["job.name=x"])


def test_the_schema_of_a_job_file_holds_for_what_is_valid(write: Write) -> None:
    validator = Draft202012Validator(schema(JobFile))
    validator.validate({"job": {"name": "x"}, "gate": {"margin": 0.01}, "removal": {"budget": 0.1}})
    assert not validator.is_valid({"job": {"name": "x"}, "gate": {"margn": 0.01}})
    assert not validator.is_valid({"job": {}})


# commands


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, write: Write) -> Callable[..., Any]:
    """Installs a function as the pipeline `retrain` or `rollback`, and runs that command on a job file."""

    def run(name: str, function: Callable[..., dict[str, Any]], *arguments: str) -> Any:
        module = ModuleType("posttrain.jobs.retrain")
        setattr(module, name, function)
        monkeypatch.setitem(sys.modules, "posttrain.jobs.retrain", module)
        return CliRunner().invoke(app, [name, str(write("job: {name: x}")), *arguments])

    return run


@pytest.mark.parametrize(
    ("outcome", "code"), [("promoted", 0), ("nothing new", 0), ("not promoted", 10), ("alarm", 11)]
)
def test_the_exit_code_says_what_became_of_the_run(command: Callable[..., Any], outcome: str, code: int) -> None:
    from posttrain.jobs.retrain import EXIT_CODES

    assert EXIT_CODES[outcome] == code
    summary = {"outcome": outcome, "exit_code": code}
    result = command("retrain", lambda config, **_: summary, "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (code, summary)


@pytest.mark.parametrize(("error", "code"), [(DataError("no file"), 2), (LockedError("another is at work"), 1)])
@pytest.mark.parametrize("name", ["retrain", "rollback"])
def test_errors_of_a_job_are_one_line_and_a_code(
    command: Callable[..., Any], name: str, error: Exception, code: int
) -> None:
    def fails(config: JobFile, **_: object) -> dict[str, Any]:
        raise error

    result = command(name, fails)
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", f"error: {error}\n")


def test_a_command_hands_on_the_job_file_with_its_overrides_and_flags(command: Callable[..., Any]) -> None:
    calls: list[Any] = []

    def record(config: JobFile, **flags: Any) -> dict[str, Any]:
        calls.append((config.job.name, config.gate.margin, flags))
        return {}

    assert command("retrain", record, "--accept", "--set", "gate.margin=0.5", "-v").exit_code == 0
    assert command("rollback", record, "--json").exit_code == 0
    assert calls == [
        ("x", 0.5, {"accept": True, "verbose": True, "quiet": False}),
        ("x", 0.0, {"verbose": False, "quiet": True}),
    ]


def test_the_help_of_retrain_names_every_exit_code() -> None:
    said = " ".join(CliRunner().invoke(app, ["retrain", "--help"]).stdout.split())
    for part in ("0 promoted or", "10 not promoted", "11 alarm", "2 the input", "1 failed"):
        assert part in said


def test_without_a_job_file_the_command_asks_for_one() -> None:
    assert CliRunner().invoke(app, ["retrain"]).exit_code == 2


def test_the_schema_of_a_job_file_is_printed_on_request() -> None:
    assert json.loads(CliRunner().invoke(app, ["schema", "--job"]).stdout) == schema(JobFile)


def test_a_rollback_before_the_first_run_is_refused_and_leaves_nothing_behind(write: Write, tmp_path: Path) -> None:
    path = write(f"{{job: {{name: x}}, run: {{path: {tmp_path / 'job'}}}}}")
    result = subprocess.run(
        [sys.executable, "-m", "posttrain.cli", "rollback", str(path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "has not run yet" in result.stderr and result.stdout == ""
    assert not (tmp_path / "job").exists()
