"""The refined model as a logged model of MLflow, which `mlflow.pyfunc.load_model` loads and MLflow serves."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

_REQUIREMENTS = ("mlflow", "torch", "torchvision", "safetensors", "numpy", "pandas", "pyarrow", "pillow")


def log_model(
    client: MlflowClient,
    experiment_id: str,
    run_id: str,
    weights: Path,
    *,
    factory: str,
    arguments: Mapping[str, Any],
    classes: int,
    head: str,
    image: Mapping[str, Any],
    name: str = "model",
) -> str:
    """Log the model as an output of the run; its URI (models:/m-...). It holds no pickle.

    `weights`: a safetensors file. `image`: channels, size (height, width), mean, std, and shape (of raw image cells,
    or None). posttrain's code is stored with the model; a factory of the user's own must be importable where the model
    is loaded. If the run has a model of this name already, that one is kept.
    """
    from mlflow.entities import LoggedModelOutput

    if (known := _model_of_run(client, run_id, name)) is not None:
        return f"models:/{known}"
    recipe = {"factory": factory, "arguments": arguments, "classes": classes, "head": head, "image": image}
    logged = client.create_logged_model(experiment_id, name=name, source_run_id=run_id, model_type="classifier")
    model_id = logged.model_id
    try:
        with tempfile.TemporaryDirectory() as folder:
            _save(Path(folder, "model"), weights, recipe, run_id, model_id, logged.artifact_location)
            client.log_model_artifacts(model_id, str(Path(folder, "model")))
    except BaseException:
        client.finalize_logged_model(model_id, "FAILED")
        raise
    client.finalize_logged_model(model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
    return f"models:/{model_id}"


def _save(
    folder: Path, weights: Path, recipe: Mapping[str, Any], run_id: str, model_id: str, artifact_location: str
) -> None:
    """Write the model into a folder, as MLflow stores it."""
    import mlflow.pyfunc
    from mlflow.models import Model

    with _only_errors("mlflow.pyfunc"):  # it warns that there is no signature: any image will do
        mlflow.pyfunc.save_model(
            folder,
            python_model=Path(__file__).with_name("served_model.py"),
            artifacts={"weights": str(weights)},
            # through JSON: a tuple in the YAML that MLflow writes could not be read safely
            model_config=json.loads(json.dumps(recipe)),
            code_paths=[str(Path(__file__).parents[1])],
            # given, or MLflow loads the model in another process to find them
            pip_requirements=[f"{package}=={version(package).partition('+')[0]}" for package in _REQUIREMENTS],
            mlflow_model=Model(artifact_path=artifact_location, run_id=run_id, model_uuid=model_id, model_id=model_id),
        )


def _model_of_run(client: MlflowClient, run_id: str, name: str) -> str | None:
    """The id of the run's complete model of this name; None where there is none."""
    outputs = client.get_run(run_id).outputs
    for output in outputs.model_outputs if outputs else ():
        model = client.get_logged_model(output.model_id)
        if model.name == name and model.status == "READY":
            return model.model_id
    return None


@contextmanager
def _only_errors(logger_name: str) -> Iterator[None]:
    """Within, the logger is silent below the level ERROR."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
