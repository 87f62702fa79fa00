"""A run folder with an empty MLflow database, and a network logged as a model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from posttrain.store.tracking import Tracking
from posttrain.vision.models import build
from posttrain.vision.weights import to_bytes

IMAGE = {"channels": 1, "size": (8, 8), "mean": (0.5,), "std": (0.5,), "shape": None}


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory) -> Path:
    """A database with MLflow's tables, which take seconds to make."""
    folder = tmp_path_factory.mktemp("tables")
    MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def run_folder(tmp_path, empty_database) -> Path:
    folder = tmp_path / "run #1"
    folder.mkdir()
    shutil.copy(empty_database, folder)
    return folder


LogNetwork = Callable[[Tracking, Path], tuple[str, torch.nn.Module]]


@pytest.fixture
def log_network() -> LogNetwork:
    """Logs a network in a tracked run; returns the model's URI and the network."""

    def log(tracking: Tracking, folder: Path) -> tuple[str, torch.nn.Module]:
        torch.manual_seed(0)
        network = build("posttrain.vision.models:mlp", classes=3, arguments={"width": 16})
        (folder / "refined.safetensors").write_bytes(to_bytes(network))
        uri = tracking.log_model(
            folder / "refined.safetensors",
            factory="posttrain.vision.models:mlp",
            arguments={"width": 16},
            classes=3,
            head="head",
            image=IMAGE,
        )
        return uri, network

    return log
