"""The command line: `posttrain` with `clean`, `pretrain`, `tune`, `retrain`, `rollback` or `schema`.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 failed after work had
begun, 2 the input has to change, 130 interrupted, 143 terminated; of `retrain` also 10 not promoted and 11 alarm.
Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from posttrain import __version__
from posttrain.errors import PosttrainError

if TYPE_CHECKING:
    from posttrain.config import JobFile, RunFile

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Runfile = Annotated[
    Path | None,
    typer.Argument(metavar="RUNFILE", help="YAML run file; without one, the embedded digits run.", show_default=False),
]
Jobfile = Annotated[
    Path, typer.Argument(metavar="JOBFILE", help="YAML run file with a section `job`.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in removal.budget=0.03; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object and nothing else.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show Ray's messages, and tracebacks of errors.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"posttrain {__version__}")
        raise typer.Exit()


@app.callback()
def posttrain(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Find wrong labels in a data set with the model trained on it, remove them, and refine the model."""


@app.command()
def clean(
    runfile: Runfile = None, overrides: Overrides = None, as_json: Json = False, verbose: Verbose = False
) -> None:
    """Clean a data set and refine its model, round by round.

    The same command again continues after the last finished round.
    """

    def work(config: RunFile) -> dict[str, Any]:
        from posttrain.runs.clean import clean

        return clean(config, verbose=verbose, quiet=as_json)

    _carry_out(work, runfile, overrides or (), as_json=as_json, verbose=verbose)


@app.command()
def pretrain(
    runfile: Runfile = None, overrides: Overrides = None, as_json: Json = False, verbose: Verbose = False
) -> None:
    """Train the run file's model on the given labels and save its weights, from which `clean` starts."""

    def work(config: RunFile) -> dict[str, Any]:
        from posttrain.runs.pretrain import pretrain

        return pretrain(config, verbose=verbose, quiet=as_json)

    _carry_out(work, runfile, overrides or (), as_json=as_json, verbose=verbose)


@app.command()
def tune(runfile: Runfile = None, overrides: Overrides = None, as_json: Json = False, verbose: Verbose = False) -> None:
    """Try several settings of a run file in parallel, and write the best ones as a run file for `clean`.

    The section `search` of the run file says what is tried. The same command again continues with unfinished trials.
    """

    def work(config: RunFile) -> dict[str, Any]:
        from posttrain.search.tune import tune

        return tune(config, verbose=verbose, quiet=as_json)

    _carry_out(work, runfile, overrides or (), as_json=as_json, verbose=verbose)


@app.command()
def retrain(
    jobfile: Jobfile,
    overrides: Overrides = None,
    accept: Annotated[bool, typer.Option("--accept", help="Accept the files that a previous alarm held back.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Update a registered model with the new samples of its data set; to be started by a scheduler.

    Cleans the new samples, refines the champion, and promotes the result if it passes the gate. Exit codes: 0 promoted
    or nothing new, 10 not promoted (gate), 11 alarm (new labels look wrong, and their files are held back), 2 the input
    has to change, 1 failed, or another run of the job is at work. The same command again continues.
    """

    def work(config: JobFile) -> dict[str, Any]:
        from posttrain.jobs.retrain import retrain

        return retrain(config, accept=accept, verbose=verbose, quiet=as_json)

    _carry_out(work, jobfile, overrides or (), as_json=as_json, verbose=verbose, load=_load_job)


@app.command()
def rollback(jobfile: Jobfile, overrides: Overrides = None, as_json: Json = False, verbose: Verbose = False) -> None:
    """Make the previous champion the champion again."""

    def work(config: JobFile) -> dict[str, Any]:
        from posttrain.jobs.rollback import rollback

        return rollback(config, verbose=verbose, quiet=as_json)

    _carry_out(work, jobfile, overrides or (), as_json=as_json, verbose=verbose, load=_load_job)


@app.command()
def schema(
    of_job: Annotated[bool, typer.Option("--job", help="Print that of a job file, for `retrain`.")] = False,
) -> None:
    """Print the JSON schema of the run file: every key with its meaning, bounds and default."""
    from posttrain import config

    typer.echo(json.dumps(config.schema(config.JobFile if of_job else config.RunFile), indent=2))


def main() -> None:
    """Run the command line; does not return."""
    try:
        app(prog_name="posttrain")
    finally:
        # what native libraries print while the process ends does not belong to the results
        with contextlib.suppress(OSError, AttributeError):  # either may have been closed by the caller
            sys.stdout.flush()
            os.dup2(2, 1)


def _load(path: Path | None, overrides: list[str] | tuple[()]) -> RunFile:
    from posttrain import config

    return config.load(path, overrides)


def _load_job(path: Path | None, overrides: list[str] | tuple[()]) -> JobFile:
    from posttrain import config

    assert path is not None, "a command of a job has no default"
    return config.load_job(path, overrides)


File = TypeVar("File", bound="RunFile")


def _carry_out(
    work: Callable[[File], dict[str, Any]],
    runfile: Path | None,
    overrides: list[str] | tuple[()],
    *,
    as_json: bool,
    verbose: bool,
    load: Callable[[Path | None, list[str] | tuple[()]], File] = _load,
) -> None:
    """Load the run file, do the work, print its summary if asked to; an error becomes one line and an exit code."""
    terminated = threading.Event()
    try:
        with _terminable(terminated), _nothing_on_stdout() if as_json else contextlib.nullcontext():
            summary = work(load(runfile, overrides))
    except (PosttrainError, OSError) as error:
        from posttrain.report.visible import visible

        if verbose:
            for line in traceback.format_exc().splitlines():
                typer.echo(visible(line), err=True)
        message, code = visible(f"error: {' '.join(str(error).split())}"), 1
        if isinstance(error, PosttrainError):
            code = error.exit_code
        else:  # of a disk or an object store; others of our errors end with a way out
            message += "; fix the cause and start the same command again"
        typer.echo(message, err=True)
        raise typer.Exit(code) from None
    except KeyboardInterrupt:
        if verbose:
            traceback.print_exc()
        what, code = ("terminated", 143) if terminated.is_set() else ("interrupted", 130)
        typer.echo(f"{what}; start the same command again to continue", err=True)
        raise typer.Exit(code) from None
    if as_json:
        # JSON has no NaN: an unknown figure is null
        typer.echo(json.dumps(json.loads(json.dumps(summary), parse_constant=lambda _: None)))
    if code := summary.get("exit_code", 0):
        raise typer.Exit(code)


@contextlib.contextmanager
def _terminable(terminated: threading.Event) -> Iterator[None]:
    """Within, SIGTERM ends the work as an interrupt does (Ray is shut down, MLflow informed), and sets `terminated`."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        # not an exception of its own: while Ray waits, it makes a KeyboardInterrupt of any
        terminated.set()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _nothing_on_stdout() -> Iterator[None]:
    """Send standard output to standard error, also that of native libraries and of child processes."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


if __name__ == "__main__":
    main()
