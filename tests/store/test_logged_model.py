from __future__ import annotations

import io
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from posttrain.store.tracking import Tracking

# SQLAlchemy's warning about MLflow's own tables
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")


def open_run(run_folder: Path) -> Tracking:
    return Tracking.open(None, run_folder=run_folder, experiment="posttrain", run_name="digits", params={}, tags={})


def test_the_logged_model_predicts_what_the_network_does_and_holds_no_pickle(
    run_folder, tmp_path, monkeypatch, log_network
):
    with open_run(run_folder) as tracking:
        uri, network = log_network(tracking, tmp_path)
    assert not [p for p in run_folder.rglob("*") if p.suffix in (".pkl", ".pickle", ".pth", ".pt")]
    outputs = MlflowClient(tracking.uri).get_run(tracking.run_id).outputs
    assert outputs is not None
    [output] = outputs.model_outputs
    assert uri == f"models:/{output.model_id}"
    assert MlflowClient(tracking.uri).get_logged_model(output.model_id).status == "READY"

    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.uri)
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    monkeypatch.setattr("sys.path", list(sys.path))
    served = mlflow.pyfunc.load_model(uri)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8)
    encoded = []
    for image in pixels:
        Image.fromarray(image).save(buffer := io.BytesIO(), "png")
        encoded.append(buffer.getvalue())
    with torch.no_grad():
        expected = network((torch.from_numpy(pixels)[:, None] / 255 - 0.5) / 0.5).softmax(dim=1).numpy()
    for given in (encoded, pixels, pd.DataFrame({"id": range(5), "image": encoded})):
        np.testing.assert_allclose(served.predict(given), expected, rtol=1e-4)
    with pytest.raises(ValueError, match="image 1 cannot be read"):
        served.predict([encoded[0], b"no image"])
