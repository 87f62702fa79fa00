"""An MLflow client that answers soon or fails with a reason, and MLflow's settings in this process."""

from __future__ import annotations

import logging
import os
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from posttrain.config import without_credentials
from posttrain.errors import TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient


def connect(uri: str | None, home: Path) -> tuple[MlflowClient, str]:
    """(client, URI) of a tracking server that has answered; `uri` None: of the SQLite database in the folder `home`.

    Raises TrackingError, within about ten seconds, where the server cannot be used.
    """
    uri = uri or local_uri(home)
    set_defaults(uri)
    try:
        with with_short_waits(uri):
            from mlflow import MlflowClient

            client = MlflowClient(uri, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI", uri))
            client.search_experiments(max_results=1)
    except Exception as error:  # whatever the backend's driver raises
        raise unusable_server(uri, error) from error
    return client, uri


def unusable_server(uri: str, error: BaseException) -> TrackingError:
    """What to raise where the server did not answer."""
    return TrackingError(
        f"the MLflow tracking server at {without_credentials(uri)} cannot be used ({reason(error)}); "
        "check tracking.uri, or leave it out to track in the run folder"
    )


def local_uri(home: Path) -> str:
    """URI of the SQLite database in the folder `home`."""
    path = home.absolute() / "mlflow.db"
    if any(sign in str(path) for sign in "%?"):
        raise TrackingError(
            f"the address of an sqlite database cannot hold the % or ? of {path}; choose another run.path"
        )
    return f"sqlite:///{path.as_posix()}"


def artifacts_beside(uri: str) -> str | None:
    """URI of the folder `mlartifacts` beside an SQLite database: MLflow's default is the current folder.

    None for a server, which has its own place for artifacts.
    """
    # three slashes before a relative path, four before an absolute one; `sqlite://` alone lies in memory
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    if path == uri or not path:
        return None
    return (Path(path).absolute().parent / "mlartifacts").as_uri()


def set_defaults(uri: str) -> None:
    """Set environment variables that MLflow reads, except those that the user has set."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if urlsplit(uri).hostname in ("localhost", "127.0.0.1", "::1"):
        for key in ("NO_PROXY", "no_proxy"):
            hosts = [host for host in os.environ.get(key, "").split(",") if host]
            os.environ[key] = ",".join(dict.fromkeys([*hosts, "localhost", "127.0.0.1", "::1"]))
    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        import mlflow  # noqa: F401  (it sets its logger's level when it is imported)

        logging.getLogger("mlflow").setLevel(logging.WARNING)


@contextmanager
def with_short_waits(uri: str) -> Iterator[None]:
    """Within, a server that does not answer fails in about ten seconds; MLflow alone would try for minutes."""
    parts = urlsplit(uri)
    scheme = parts.scheme.partition("+")[0]
    file = uri.partition("///")[2].partition("?")[0]
    if scheme == "sqlite" and file not in ("", ":memory:"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(file)) as database:
            database.execute("PRAGMA schema_version")
    ports = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
    if scheme in ports and parts.hostname:
        socket.create_connection((parts.hostname, parts.port or ports[scheme]), timeout=8).close()
    with brief_requests(9):
        yield


@contextmanager
def brief_requests(timeout_s: int) -> Iterator[None]:
    """Within, MLflow waits this long for an answer, and asks once; settings of the user's environment win."""
    brief = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    brief = {key: value for key, value in brief.items() if key not in os.environ}
    os.environ.update(brief)
    try:
        yield
    finally:
        for key in brief:
            os.environ.pop(key, None)


def reason(error: BaseException) -> str:
    """The error's first line, without credentials; of a network error, that of its innermost cause."""
    innermost = error
    while innermost.__cause__ or innermost.__context__:
        innermost = innermost.__cause__ or innermost.__context__ or innermost
    if isinstance(innermost, ConnectionError | TimeoutError | socket.gaierror):
        error = innermost
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return without_credentials(lines[0])[:300].rstrip(".")
