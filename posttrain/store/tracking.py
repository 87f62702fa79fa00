"""What MLflow is told of a run: one parent run, one nested run per round, the curves on the parent.

The only module, beside `served_model`, that knows MLflow; called from the driver alone. MLflow's own idea of
a current run and a current server (`mlflow.set_tracking_uri`, `mlflow.start_run`) belongs to the user and is
left as it is.
"""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import re
import socket
import sqlite3
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self
from urllib.parse import urlsplit

from posttrain.config import without_credentials
from posttrain.errors import ModelError, PosttrainError, StepError, TrackingError

if TYPE_CHECKING:
    import torch
    from mlflow import MlflowClient

Status = Literal["FINISHED", "FAILED", "KILLED"]

_KEY = "posttrain.key"
_ROUND = "posttrain.round"
_PARENT = "mlflow.parentRunId"
_SERVED_WITH = ("mlflow", "torch", "torchvision", "safetensors", "numpy", "pandas", "pyarrow", "pillow")
# MLflow's limits per request and per digest
_PARAMS_PER_BATCH, _METRICS_PER_BATCH, _DIGEST_LENGTH = 100, 1000, 36


class Tracking:
    """One run of posttrain in MLflow; leaving it as a context manager ends the run with the right status.

    Once open, calls raise StepError where MLflow does not take what it is told: by then, work has been done. Each may
    be made again, also where MLflow did take it and only its answer was lost: nothing comes to be there twice.
    """

    def __init__(self, client: MlflowClient, uri: str, run: Any, *, resumed: bool) -> None:
        self._client = client
        self.uri = uri
        self.experiment_id: str = run.info.experiment_id
        self.run_id: str = run.info.run_id
        self.resumed = resumed
        """Whether this is the run that was asked for by its id."""
        # MLflow keeps one value per name, step and time: with the same time, none is doubled
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
        """The parent run, running: the one with `run_id` where MLflow still has it, otherwise a new one.

        `key`: a name of the run that is its own, by which one is found again whose id never arrived. `uri` None: a
        database and artifacts in the run folder (`mlflow.db`, `mlartifacts/`). Nested params become dotted names;
        params that the run already has stay. Raises TrackingError within about ten seconds where the server cannot
        be reached, unless MLFLOW_HTTP_REQUEST_TIMEOUT or _MAX_RETRIES say otherwise.
        """
        uri = uri or _local_uri(run_folder)
        artifacts = _beside(uri)
        _prepare(uri)
        try:
            with _first_contact(uri):
                from mlflow import MlflowClient

                client = MlflowClient(uri)
                found = _active_run(client, run_id) if run_id else None
                if found is None:
                    experiment_id = _experiment(client, experiment, artifacts)
                    own = {_KEY: key} if key else {}
                    found = (
                        _only(client, client.search_runs([experiment_id], f"tags.`{_KEY}` = '{key}'")) if own else None
                    )
                    found = found or client.create_run(experiment_id, run_name=run_name, tags=own)
        except PosttrainError:
            raise
        except Exception as error:  # whatever the backend's driver raises
            raise _unusable(uri, error) from error
        tracking = cls(client, uri, found, resumed=found.info.run_id == run_id)
        try:
            with tracking._telling("the run's parameters"):
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
        with self._telling("the end of the run"):
            self._drop_doubles()
            self._client.set_terminated(self.run_id, status)

    def nested(self, name: str, *, params: Mapping[str, object], tags: Mapping[str, str]) -> Tracking:
        """A run of this name beneath this one, which rounds can be logged to: the one that is there, or a new one."""
        with self._telling(f"the run {name}"):
            beneath = f"tags.`{_PARENT}` = '{self.run_id}' and tags.`mlflow.runName` = '{name}'"
            known = _only(self._client, self._client.search_runs([self.experiment_id], beneath))
            parent = {_PARENT: self.run_id}
            found = known or self._client.create_run(self.experiment_id, run_name=name, tags=parent)
            nested = Tracking(self._client, self.uri, found, resumed=known is not None)
            nested._running = found.info.status != "FINISHED"
            nested._log(nested.run_id, params=params, known=found.data.params, tags=tags)
        return nested

    @property
    def is_running(self) -> bool:
        """Whether it has not come to its end yet."""
        return self._running

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Tags on the parent."""
        with self._telling("tags"):
            self._log(self.run_id, tags=tags)

    def log_dataset(self, name: str, digest: str, source: str, profile: Mapping[str, object]) -> None:
        """Makes the data set an input of the run, with our digest (MLflow shows its first 36 characters).

        `source`: a path or URI. `profile`: counts and the like; the whole digest is added to it.
        """
        with self._telling("the data set"):
            from mlflow.entities import Dataset, DatasetInput, InputTag

            dataset = Dataset(
                name=name,
                digest=digest[:_DIGEST_LENGTH],
                source_type=urlsplit(source).scheme or "local",
                source=json.dumps({"uri": source}),
                profile=json.dumps({**profile, "digest": digest}, default=str),
            )
            training = [InputTag("mlflow.data.context", "training")]
            self._client.log_inputs(self.run_id, [DatasetInput(dataset, training)])

    def log_round(
        self,
        round: int,
        *,
        params: Mapping[str, object],
        metrics: Mapping[str, float | None],
        figures: Mapping[str, bytes],
        artifacts: Sequence[Path],
    ) -> None:
        """One nested run for the round, its metrics also on the parent with the round as step.

        `figures`: PNG files by name. `artifacts`: files or folders. None and numbers that are not finite are
        left out. A round that MLflow has whole stays as it is; one that was interrupted is completed, not
        doubled.
        """
        with self._telling(f"round {round}"):
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
        """Metrics on the parent. None and numbers that are not finite are left out."""
        with self._telling("metrics"):
            self._log(self.run_id, metrics=metrics, step=step, at_ms=self._at_ms)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """A file, or a folder with all that is in it, into `folder` of the parent's artifacts."""
        with self._telling(f"the artifact {path}"):
            self._client.log_artifact(self.run_id, str(path), folder)

    def log_model(
        self,
        weights: Path,
        *,
        factory: str,
        arguments: Mapping[str, Any],
        classes: int,
        head: str,
        image: Mapping[str, Any],
        name: str = "model",
    ) -> str:
        """The URI (models:/m-...) of the logged model, for `mlflow.pyfunc.load_model`; it holds no pickle.

        `weights`: a safetensors file. `image`: channels, size (height, width), mean, std, shape (of raw
        cells, or None), background (behind alpha). posttrain's code travels with the model; a factory of the user's
        own must be importable where the model is loaded. A model of this name that the run has already stays.
        """
        recipe = {
            "factory": factory,
            "arguments": arguments,
            "classes": classes,
            "head": head,
            "image": image,
        }
        with self._telling("the model"), tempfile.TemporaryDirectory() as folder:
            import mlflow.pyfunc
            from mlflow.entities import LoggedModelOutput
            from mlflow.models import Model

            if (known := self._model_of_run(name)) is not None:
                return f"models:/{known}"
            logged = self._client.create_logged_model(
                self.experiment_id, name=name, source_run_id=self.run_id, model_type="classifier"
            )
            model_id = logged.model_id
            try:
                with _only_errors("mlflow.pyfunc"):  # it warns that there is no signature: any image will do
                    mlflow.pyfunc.save_model(
                        Path(folder, "model"),
                        python_model=Path(__file__).with_name("served_model.py"),
                        artifacts={"weights": str(weights)},
                        # through JSON: a tuple in the YAML that MLflow writes could not be read safely
                        model_config=json.loads(json.dumps(recipe)),
                        code_paths=[str(Path(__file__).parents[1])],
                        # named, or MLflow loads the model in another process to find them out
                        pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in _SERVED_WITH],
                        mlflow_model=Model(
                            artifact_path=logged.artifact_location,
                            run_id=self.run_id,
                            model_uuid=model_id,
                            model_id=model_id,
                        ),
                    )
                self._client.log_model_artifacts(model_id, str(Path(folder, "model")))
            except BaseException:
                self._client.finalize_logged_model(model_id, "FAILED")
                raise
            self._client.finalize_logged_model(model_id, "READY")
            self._client.log_outputs(self.run_id, [LoggedModelOutput(model_id, step=0)])
        return f"models:/{model_id}"

    def _round_run(self, round: int) -> Any:
        """The nested run of the round; made where there is none."""
        of_round = f"tags.`{_PARENT}` = '{self.run_id}' and tags.`{_ROUND}` = '{round}'"
        known = _only(self._client, self._client.search_runs([self.experiment_id], of_round))
        if known is not None:
            return known
        tags = {_PARENT: self.run_id, _ROUND: str(round)}
        return self._client.create_run(self.experiment_id, run_name=f"round {round:04d}", tags=tags)

    def _drop_doubles(self) -> None:
        """Delete what a request made that was given up, and arrived only after it had been made again."""
        beneath = f"tags.`{_PARENT}` = '{self.run_id}'"
        alike: dict[tuple[str | None, str | None], list[Any]] = {}
        token = None
        while True:
            page = self._client.search_runs([self.experiment_id], beneath, page_token=token)
            for run in page:
                alike.setdefault((run.data.tags.get(_ROUND), run.info.run_name), []).append(run)
            if not (token := page.token):
                break
        for runs in alike.values():
            _only(self._client, runs)

    def _model_of_run(self, name: str) -> str | None:
        outputs = self._client.get_run(self.run_id).outputs
        for output in outputs.model_outputs if outputs else ():
            model = self._client.get_logged_model(output.model_id)
            if model.name == name and model.status == "READY":
                return model.model_id
        return None

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
        """Params (less the known: MLflow never changes one), finite metrics and tags, in MLflow's batches."""
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
    def _telling(self, what: str) -> Iterator[None]:
        try:
            yield
        except PosttrainError:
            raise
        except Exception as error:  # whatever the backend's driver raises
            raise StepError(
                f"the MLflow tracking server at {without_credentials(self.uri)} did not take {what} "
                f"({reason(error)}); "
                "start the same command again to go on"
            ) from error


def fetch_weights(uri: str, tracking_uri: str | None, into: Path) -> Path:
    """A weights file out of MLflow that loads without unpickling: safetensors, or a state_dict by torch.save.

    `uri`: models:/name/version, models:/name@alias, models:/m-id or runs:/id/path. `tracking_uri` None: the
    server that MLFLOW_TRACKING_URI names. The artifacts are downloaded to `into`; from a `model.pt2`
    (torch.export) the tensors are copied to a safetensors file next to it. Raises ModelError where there are
    no such weights, TrackingError where the server cannot be reached.
    """
    server = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if server:
        _prepare(server)
    else:
        _prepare("")
        if not Path("mlflow.db").exists():
            raise ModelError(
                f"{uri} is a model in MLflow, but no MLflow server is named; set tracking.uri or MLFLOW_TRACKING_URI"
            )
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts

    try:
        with _first_contact(server or "sqlite:///mlflow.db"):
            client = MlflowClient(server, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI", server))
            client.search_experiments(max_results=1)
    except Exception as error:  # whatever the backend's driver raises
        raise TrackingError(
            f"the MLflow tracking server at {without_credentials(server or 'mlflow.db')} cannot be used "
            f"({reason(error)}), so that {uri} cannot be fetched; check tracking.uri"
        ) from error
    try:
        location = _location(client, uri)
        local = download_artifacts(artifact_uri=location, dst_path=str(into), tracking_uri=server)
    except Exception as error:  # whatever the artifact store raises
        raise ModelError(f"{uri} cannot be fetched from MLflow ({reason(error)}); check model.weights") from error
    return _weights_in(Path(local), uri)


def _location(client: MlflowClient, uri: str) -> str:
    """Where the artifacts of a models:/ or runs:/ URI lie; any other URI as it is.

    Asked of our client: MLflow by itself looks models up on the server that the process is set to.
    """
    if of_run := re.fullmatch(r"runs:/([^/]+)/([^/]+)(/.*)?", uri):
        run_id, name, path = of_run.groups()
        run = client.get_run(run_id)
        models = [client.get_logged_model(m.model_id) for m in run.outputs.model_outputs] if run.outputs else []
        roots = [model.artifact_location for model in models if model.name == name]
        root = roots[-1] if roots else f"{run.info.artifact_uri}/{name}"
    elif of_model := re.fullmatch(r"models:/(?:(m-[0-9a-f]{32})|([^/@]+)(?:@([^/]+)|/([^/]+)))(/.*)?", uri):
        model_id, name, alias, number, path = of_model.groups()
        if model_id:
            root = client.get_logged_model(model_id).artifact_location
        else:
            number = client.get_model_version_by_alias(name, alias).version if alias else number
            root = _location(client, client.get_model_version_download_uri(name, number))
    else:
        return uri
    return root.rstrip("/") + (path or "")


def _weights_in(folder: Path, uri: str) -> Path:
    files = sorted(folder.rglob("*")) if folder.is_dir() else [folder]
    for suffixes in ((".safetensors",), (".pt2",), (".pt", ".pth")):
        fitting = [file for file in files if file.suffix in suffixes and file.is_file()]
        fitting = [file for file in fitting if file.name == "model.safetensors"] or fitting
        if len(fitting) > 1:
            names = ", ".join(file.relative_to(folder).as_posix() for file in fitting[:5])
            raise ModelError(f"{uri} holds several weights files ({names}); name one of them as runs:/<run>/<path>")
        if fitting:
            [path] = fitting
            if path.suffix == ".pt2":
                return _from_export(path, uri)
            if path.suffix != ".safetensors":
                _refuse_pickled(path, uri)
            return path
    names = ", ".join(file.name for file in files[:5]) or "nothing"
    raise ModelError(f"{uri} holds no weights file (.safetensors, .pt2, .pt or .pth), only {names}")


def _refuse_pickled(path: Path, uri: str) -> None:
    import torch

    try:
        # meta: the names and shapes alone
        content = torch.load(path, weights_only=True, map_location="meta")
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ModelError(
            f"{uri} is a pickled model ({path.name}), and unpickling runs whatever code it holds; "
            'log it with mlflow.pytorch.log_model(..., serialization_format="pt2"), or save its state_dict'
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{path.name} of {uri} holds a {type(content).__name__}; save the model's state_dict")


def _from_export(path: Path, uri: str) -> Path:
    """The weights of a torch.export archive as a safetensors file next to it.

    They lie in the archive as raw bytes, with a JSON file of names, shapes and types
    (torch.export.pt2_archive). Read here, because torch.export.load unpickles what else lies there, with
    weights_only=False.
    """
    from safetensors.torch import save_file

    try:
        with zipfile.ZipFile(path) as archive:
            [config] = [name for name in archive.namelist() if name.endswith("_weights_config.json")]
            entries = json.loads(archive.read(config))["config"]
            folder = config.rpartition("/")[0]
            state = {
                name: _exported_tensor(archive.read(f"{folder}/{entry['path_name']}"), entry)
                for name, entry in entries.items()
            }
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ModelError(
            f"{path.name} of {uri} cannot be read as an archive of torch.export ({reason(error)}); "
            "save the model's state_dict instead"
        ) from error
    target = path.with_suffix(".safetensors")
    save_file(state, target)
    return target


def _exported_tensor(data: bytes, entry: Mapping[str, Any]) -> torch.Tensor:
    import torch

    if entry["use_pickle"]:
        raise ValueError("a tensor in it is pickled")
    # torch's ScalarType numbers in the archive's schema
    types = {
        1: torch.uint8,
        2: torch.int8,
        3: torch.int16,
        4: torch.int32,
        5: torch.int64,
        6: torch.float16,
        7: torch.float32,
        8: torch.float64,
        12: torch.bool,
        13: torch.bfloat16,
    }
    meta = entry["tensor_meta"]
    size, stride = ([int(n["as_int"]) for n in meta[key]] for key in ("sizes", "strides"))
    dtype = types[meta["dtype"]]
    if not data:
        return torch.zeros(size, dtype=dtype)
    flat = torch.frombuffer(bytearray(data), dtype=dtype)
    return flat.as_strided(size, stride, int(meta["storage_offset"]["as_int"])).clone().contiguous()


def connect(uri: str | None, home: Path) -> tuple[MlflowClient, str]:
    """A client of a tracking server that answers, and its address; `uri` None: the database in the folder `home`.

    Raises TrackingError as `Tracking.open` does.
    """
    uri = uri or _local_uri(home)
    _prepare(uri)
    try:
        with _first_contact(uri):
            from mlflow import MlflowClient

            client = MlflowClient(uri, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI", uri))
            client.search_experiments(max_results=1)
    except Exception as error:  # whatever the backend's driver raises
        raise _unusable(uri, error) from error
    return client, uri


def _unusable(uri: str, error: BaseException) -> TrackingError:
    return TrackingError(
        f"the MLflow tracking server at {without_credentials(uri)} cannot be used ({reason(error)}); "
        "check tracking.uri, or leave it out to track in the run folder"
    )


def _local_uri(run_folder: Path) -> str:
    path = run_folder.absolute() / "mlflow.db"
    if any(sign in str(path) for sign in "%?"):
        raise TrackingError(
            f"the address of an sqlite database cannot hold the % or ? of {path}; choose another run.path"
        )
    return f"sqlite:///{path.as_posix()}"


def _beside(uri: str) -> str | None:
    """Where the artifacts of an SQLite database go: beside it, and not where the command happens to be started.

    None for a server, which knows by itself.
    """
    # three slashes before a relative path, four before an absolute one; `sqlite://` alone lies in memory
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    if path == uri or not path:
        return None
    return (Path(path).absolute().parent / "mlartifacts").as_uri()


def _prepare(uri: str) -> None:
    """Settings that MLflow reads from the environment; what the user has set stays."""
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
def _only_errors(logger_name: str) -> Iterator[None]:
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _first_contact(uri: str) -> Iterator[None]:
    """Gives up soon, where MLflow by itself would try for minutes."""
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
    """MLflow waits for an answer this long, and asks once; what the user has set in the environment stays."""
    brief = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    brief = {key: value for key, value in brief.items() if key not in os.environ}
    os.environ.update(brief)
    try:
        yield
    finally:
        for key in brief:
            os.environ.pop(key, None)


def _only(client: MlflowClient, runs: Sequence[Any]) -> Any | None:
    """Of runs that mean the same thing the one that has been told most; the others are deleted. None where none is."""
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
    """The experiment's id; made where there is none."""
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


def reason(error: BaseException) -> str:
    """The first line of what went wrong; where the network did, of the innermost error."""
    innermost = error
    while innermost.__cause__ or innermost.__context__:
        innermost = innermost.__cause__ or innermost.__context__ or innermost
    if isinstance(innermost, ConnectionError | TimeoutError | socket.gaierror):
        error = innermost
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return without_credentials(lines[0])[:300].rstrip(".")
