"""The MLflow run of a run of posttrain: nested runs for its rounds, curves, artifacts, the model.

MLflow is called by the driver alone. MLflow's current run and server (`mlflow.start_run`, `mlflow.set_tracking_uri`)
belong to the user and stay as they are.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self
from urllib.parse import urlsplit

from posttrain.config import without_credentials
from posttrain.errors import PosttrainError, StepError, TrackingError
from posttrain.store.logged_model import log_model
from posttrain.store.mlflow_client import (
    artifacts_beside,
    local_uri,
    reason,
    set_defaults,
    unusable_server,
    with_short_waits,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

Status = Literal["FINISHED", "FAILED", "KILLED"]

_KEY = "posttrain.key"
_ROUND = "posttrain.round"
_PARENT = "mlflow.parentRunId"
# MLflow's limits per request and per digest
_PARAMS_PER_BATCH, _METRICS_PER_BATCH, _DIGEST_LENGTH = 100, 1000, 36


class Tracking:
    """The MLflow run of one run of posttrain; leaving it as a context manager ends it with the right status.

    Once it is open, a call that MLflow refuses raises StepError: by then, work has been done. Each call can be
    repeated, also when MLflow had accepted it and only the answer was lost: nothing is logged twice.
    """

    def __init__(self, client: MlflowClient, uri: str, run: Any, *, resumed: bool) -> None:
        self._client = client
        self.uri = uri
        self.experiment_id: str = run.info.experiment_id
        self.run_id: str = run.info.run_id
        self.resumed = resumed
        """Whether this is the run of the given `run_id`."""
        # MLflow keeps one value per name, step and time: with the same time, a repeated metric is logged once
        self._at_ms: int = run.info.start_time
        self._running = True

    @classmethod
    def open(
        cls,
        uri: str | None,
        *,
        run_folder: Path,
        experiment: str,
        run_name: str,
        run_id: str | None = None,
        key: str | None = None,
        params: Mapping[str, object],
        tags: Mapping[str, str],
    ) -> Tracking:
        """The parent run, running: the one with `run_id` if MLflow still has it, else a new one.

        `key`: a unique name, by which a run is found again whose id never arrived. `uri` None: a database and
        artifacts in the run folder (`mlflow.db`, `mlartifacts/`). Nested params get dotted names; params that the run
        already has stay. Raises TrackingError within about ten seconds where the server cannot be reached, unless
        MLFLOW_HTTP_REQUEST_TIMEOUT or _MAX_RETRIES is set.
        """
        uri = uri or local_uri(run_folder)
        artifacts = artifacts_beside(uri)
        set_defaults(uri)
        try:
            with with_short_waits(uri):
                from mlflow import MlflowClient

                client = MlflowClient(uri)
                found = _active_run(client, run_id) if run_id else None
                if found is None:
                    experiment_id = _experiment(client, experiment, artifacts)
                    own = {_KEY: key} if key else {}
                    found = (
                        _keep_one(client, client.search_runs([experiment_id], f"tags.`{_KEY}` = '{key}'"))
                        if own
                        else None
                    )
                    found = found or client.create_run(experiment_id, run_name=run_name, tags=own)
        except PosttrainError:
            raise
        except Exception as error:  # whatever the backend's driver raises
            raise unusable_server(uri, error) from error
        tracking = cls(client, uri, found, resumed=found.info.run_id == run_id)
        try:
            with tracking._step_error("the run's parameters"):
                client.update_run(tracking.run_id, status="RUNNING")
                tracking._log(tracking.run_id, params=params, known=found.data.params, tags=tags)
        except BaseException as error:
            tracking.__exit__(type(error), error, error.__traceback__)
            raise
        return tracking

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._running:
            return
        if error is None:
            self.finish()
            return
        try:
            self.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        except PosttrainError as second:
            error.add_note(f"Besides, {second}.")  # the first error is the one to report

    def finish(self, status: Status = "FINISHED") -> None:
        """Ends the parent run."""
        self._running = False
        with self._step_error("the end of the run"):
            self._delete_duplicates()
            self._client.set_terminated(self.run_id, status)

    def nested(self, name: str, *, params: Mapping[str, object], tags: Mapping[str, str]) -> Tracking:
        """The nested run of this name, to which rounds can be logged; made where there is none."""
        with self._step_error(f"the run {name}"):
            beneath = f"tags.`{_PARENT}` = '{self.run_id}' and tags.`mlflow.runName` = '{name}'"
            known = _keep_one(self._client, self._client.search_runs([self.experiment_id], beneath))
            parent = {_PARENT: self.run_id}
            found = known or self._client.create_run(self.experiment_id, run_name=name, tags=parent)
            nested = Tracking(self._client, self.uri, found, resumed=known is not None)
            nested._running = found.info.status != "FINISHED"
            nested._log(nested.run_id, params=params, known=found.data.params, tags=tags)
        return nested

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._running

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Tags on the parent."""
        with self._step_error("tags"):
            self._log(self.run_id, tags=tags)

    def log_dataset(self, name: str, digest: str, source: str, profile: Mapping[str, object], *, context: str) -> None:
        """Make the data set an input of the run, with our digest (MLflow shows its first 36 characters).

        `context`: what it serves for, such as train. `source`: a path or URI. `profile`: counts and the like; the
        complete digest is added to it.
        """
        with self._step_error("the data set"):
            from mlflow.entities import Dataset, DatasetInput, InputTag

            dataset = Dataset(
                name=name,
                digest=digest[:_DIGEST_LENGTH],
                source_type=urlsplit(source).scheme or "local",
                source=json.dumps({"uri": source}),
                profile=json.dumps({**profile, "digest": digest}, default=str),
            )
            tags = [InputTag("mlflow.data.context", context)]
            self._client.log_inputs(self.run_id, [DatasetInput(dataset, tags)])

    def log_round(
        self,
        round: int,
        *,
        params: Mapping[str, object],
        metrics: Mapping[str, float | None],
        figures: Mapping[str, bytes],
        artifacts: Sequence[Path],
    ) -> None:
        """One nested run for the round; its metrics are also logged on the parent, with the round as step.

        `figures`: PNG files by name. `artifacts`: files or folders. None and non-finite numbers are left out. A round
        that MLflow has completely stays as it is; one that was interrupted is completed.
        """
        with self._step_error(f"round {round}"):
            nested = self._round_run(round)
            if nested.info.status == "FINISHED":
                return
            nested_id, at = nested.info.run_id, nested.info.start_time
            self._log(nested_id, params=params, known=nested.data.params, metrics=metrics, step=round, at_ms=at)
            self._log_figures(nested_id, figures)
            for path in artifacts:
                self._client.log_artifact(nested_id, str(path))
            self._log(self.run_id, metrics=metrics, step=round, at_ms=at)
            self._client.set_terminated(nested_id, "FINISHED")

    def log_metrics(self, metrics: Mapping[str, float | None], step: int = 0) -> None:
        """Metrics on the parent; None and non-finite numbers are left out."""
        with self._step_error("metrics"):
            self._log(self.run_id, metrics=metrics, step=step, at_ms=self._at_ms)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """A file, or a folder with everything in it, into `folder` of the parent's artifacts."""
        with self._step_error(f"the artifact {path}"):
            self._client.log_artifact(self.run_id, str(path), folder)

    def log_model(self, weights: Path, **recipe: Any) -> str:
        """The URI (models:/m-...) of the logged model, as `logged_model.log_model`."""
        with self._step_error("the model"):
            return log_model(self._client, self.experiment_id, self.run_id, weights, **recipe)

    def _round_run(self, round: int) -> Any:
        """The nested MLflow run of the round; made where there is none."""
        of_round = f"tags.`{_PARENT}` = '{self.run_id}' and tags.`{_ROUND}` = '{round}'"
        known = _keep_one(self._client, self._client.search_runs([self.experiment_id], of_round))
        if known is not None:
            return known
        tags = {_PARENT: self.run_id, _ROUND: str(round)}
        return self._client.create_run(self.experiment_id, run_name=f"round {round:04d}", tags=tags)

    def _delete_duplicates(self) -> None:
        """Delete nested runs made twice: by a request that timed out here but reached the server later."""
        beneath = f"tags.`{_PARENT}` = '{self.run_id}'"
        same_name: dict[tuple[str | None, str | None], list[Any]] = {}
        token = None
        while True:
            page = self._client.search_runs([self.experiment_id], beneath, page_token=token)
            for run in page:
                same_name.setdefault((run.data.tags.get(_ROUND), run.info.run_name), []).append(run)
            if not (token := page.token):
                break
        for runs in same_name.values():
            _keep_one(self._client, runs)

    def _log_figures(self, run_id: str, figures: Mapping[str, bytes]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, png in figures.items():
                path = Path(folder, f"{name.removesuffix('.png')}.png")
                path.write_bytes(png)
                self._client.log_artifact(run_id, str(path), "figures")

    def _log(
        self,
        run_id: str,
        *,
        params: Mapping[str, object] | None = None,
        known: Mapping[str, str] | None = None,
        metrics: Mapping[str, float | None] | None = None,
        tags: Mapping[str, str] | None = None,
        step: int = 0,
        at_ms: int | None = None,
    ) -> None:
        """Params (except those in `known`: MLflow never changes one), finite metrics and tags, in batches."""
        from mlflow.entities import Metric, Param, RunTag

        at_ms = at_ms or time.time_ns() // 1_000_000
        flat = _flat(params or {})
        new_params = [Param(key, str(value)) for key, value in flat.items() if key not in (known or {})]
        new_metrics = [
            Metric(key, float(value), at_ms, step)
            for key, value in (metrics or {}).items()
            if value is not None and math.isfinite(value)
        ]
        for start in range(0, len(new_params), _PARAMS_PER_BATCH):
            self._client.log_batch(run_id, params=new_params[start : start + _PARAMS_PER_BATCH])
        for start in range(0, len(new_metrics), _METRICS_PER_BATCH):
            self._client.log_batch(run_id, metrics=new_metrics[start : start + _METRICS_PER_BATCH])
        if tags:
            self._client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

    @contextmanager
    def _step_error(self, what: str) -> Iterator[None]:
        """Within, an error of MLflow becomes a StepError that says what could not be logged."""
        try:
            yield
        except PosttrainError:
            raise
        except Exception as error:  # whatever the backend's driver raises
            raise StepError(
                f"the MLflow tracking server at {without_credentials(self.uri)} did not accept {what} "
                f"({reason(error)}); "
                "start the same command again to continue"
            ) from error


def _keep_one(client: MlflowClient, runs: Sequence[Any]) -> Any | None:
    """The most complete of several runs for the same thing, after the others are deleted; None where there is none."""
    if not runs:
        return None
    kept, *others = sorted(
        runs,
        key=lambda run: (run.info.status != "FINISHED", not run.data.metrics, run.info.start_time, run.info.run_id),
    )
    for other in others:
        client.delete_run(other.info.run_id)
    return kept


def _active_run(client: MlflowClient, run_id: str) -> Any | None:
    """The run, or None where MLflow does not have it (any more)."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    """The id of the experiment, which is made where there is none."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifact_location=artifacts)
        except MlflowException:  # made by another run in the meantime
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"the MLflow experiment {name!r} has been deleted; restore it, or name another as tracking.experiment"
        )
    return experiment.experiment_id


def _flat(params: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
