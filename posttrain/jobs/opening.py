"""What every command of a job begins with: its folder, its registry, and which failures may be tried again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.config import JobFile
from posttrain.errors import ConfigError, StepError, TrackingError
from posttrain.jobs.job_folder import JobFolder
from posttrain.store.folder import RunFolder

if TYPE_CHECKING:
    from posttrain.store.registry import Registry


@contextmanager
def retryable_outages() -> Iterator[None]:
    """Within, an outage of MLflow is a StepError (exit code 1), which schedulers retry; wrong input (2) they do not."""
    try:
        yield
    except TrackingError as error:
        raise StepError(f"{error}; start the same command again") from error


def open_job(config: JobFile) -> JobFolder:
    """The folder of the job. Raises ConfigError or RunFolderError where no job can live there."""
    folder = RunFolder(config.run.path)
    if not folder.is_local and config.tracking.uri is None:
        raise ConfigError(
            f"run.path = {config.run.path} is not on this machine, and SQLite cannot live there: "
            "set tracking.uri to an MLflow server"
        )
    folder.refuse_unwritable()
    job = JobFolder(folder)
    job.refuse_a_run()
    return job


def open_registry(config: JobFile, job: JobFolder) -> Registry:
    """The registry of the job's model; by default in a database in the job's folder."""
    from posttrain.store.registry import Registry, is_unused

    local = job.folder.local if job.folder.is_local else Path(".")
    if config.tracking.uri is None and not job.state().runs and is_unused(local / "mlflow.db"):
        # a job that was killed while MLflow made its tables cannot go on with half of them
        for left in local.glob("mlflow.db*"):
            left.unlink()
    return Registry.open(config.tracking.uri, home=local, name=config.job.name)
