"""The command line: `posttrain clean`, `posttrain pretrain`, `posttrain schema`.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 failed after work had
begun, 2 the input has to change, 130 interrupted. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain import __version__
from posttrain.errors import PosttrainError

if TYPE_CHECKING:
    from posttrain.config import RunFile

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
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in removal.budget=0.03; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object and nothing else.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show Ray's own messages, and tracebacks of errors.")]


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
    """Find the wrong labels of a data set with the model trained on it, remove them, refine the model."""


@app.command()
def clean(
    runfile: Runfile = None, overrides: Overrides = None, as_json: Json = False, verbose: Verbose = False
) -> None:
    """Clean a data set and refine its model, round by round.

    The same command again goes on after the last finished round.
    """

    def work(config: RunFile) -> dict[str, Any]:
        from pipelines.clean import clean

        return clean(config, verbose=verbose, quiet=as_json)

    _carry_out(work, runfile, overrides or (), as_json=as_json, verbose=verbose)


@app.command()
def pretrain(
    runfile: Runfile = None, overrides: Overrides = None, as_json: Json = False, verbose: Verbose = False
) -> None:
    """Train the run file's model on the given labels and save its weights, for `clean` to start from."""

    def work(config: RunFile) -> dict[str, Any]:
        from pipelines.pretrain import pretrain

        return pretrain(config, verbose=verbose, quiet=as_json)

    _carry_out(work, runfile, overrides or (), as_json=as_json, verbose=verbose)


@app.command()
def schema() -> None:
    """Print the JSON schema of a run file."""
    from posttrain import config

    typer.echo(json.dumps(config.schema(), indent=2))


def main() -> None:
    """Run the command line; does not return."""
    try:
        app(prog_name="posttrain")
    finally:
        # what native libraries still say while the process ends does not belong to the results
        with contextlib.suppress(OSError, AttributeError):  # either may have been closed by the caller
            sys.stdout.flush()
            os.dup2(2, 1)


def _carry_out(
    work: Callable[[RunFile], dict[str, Any]],
    runfile: Path | None,
    overrides: list[str] | tuple[()],
    *,
    as_json: bool,
    verbose: bool,
) -> None:
    """Load the run file, do the work, print its summary if asked to; errors become one line and a code."""
    try:
        from posttrain import config

        with _nothing_on_stdout() if as_json else contextlib.nullcontext():
            summary = work(config.load(runfile, overrides))
    except PosttrainError as error:
        if verbose:
            traceback.print_exc()
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        if verbose:
            traceback.print_exc()
        typer.echo("interrupted; start the same command again to go on", err=True)
        raise typer.Exit(130) from None
    if as_json:
        # JSON has no NaN: a figure that is not known is null
        typer.echo(json.dumps(json.loads(json.dumps(summary), parse_constant=lambda _: None)))


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
