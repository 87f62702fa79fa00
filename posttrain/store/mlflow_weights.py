"""Weights out of MLflow: safetensors, a state_dict, or the tensors of a torch.export archive; nothing is unpickled."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config import without_credentials
from posttrain.errors import ModelError, TrackingError
from posttrain.store.mlflow_client import reason, set_defaults, with_short_waits

if TYPE_CHECKING:
    import torch
    from mlflow import MlflowClient


def fetch_weights(uri: str, tracking_uri: str | None, into: Path) -> Path:
    """Path of a downloaded weights file that loads without unpickling: safetensors, or a state_dict by torch.save.

    `uri`: models:/name/version, models:/name@alias, models:/m-id or runs:/id/path. `tracking_uri` None: the
    server that MLFLOW_TRACKING_URI names. The artifacts are downloaded to `into`; from a `model.pt2`
    (torch.export) the tensors are copied to a safetensors file next to it. Raises ModelError where there are
    no such weights, and TrackingError where the server cannot be reached.
    """
    server = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if server:
        set_defaults(server)
    else:
        set_defaults("")
        if not Path("mlflow.db").exists():
            raise ModelError(
                f"{uri} is a model in MLflow, but no MLflow server is named; set tracking.uri or MLFLOW_TRACKING_URI"
            )
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts

    try:
        with with_short_waits(server or "sqlite:///mlflow.db"):
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
    """Location of the artifacts of a models:/ or runs:/ URI; any other URI as it is.

    Asked through our client: MLflow's own look-up uses the server that the process is set to.
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
    """The one weights file in a folder of downloaded artifacts."""
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
    """Raises ModelError where the file needs unpickling, or holds no state_dict."""
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
    """The weights of a torch.export archive, as a safetensors file next to it.

    The archive holds them as raw bytes, with a JSON file of names, shapes and types (torch.export.pt2_archive). They
    are read here because torch.export.load unpickles other parts of the archive, with weights_only=False.
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
