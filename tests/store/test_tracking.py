from __future__ import annotations

import io
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load_file, save_file

from posttrain.errors import ModelError, StepError, TrackingError
from posttrain.store.tracking import Tracking, fetch_weights
from posttrain.vision.models import build
from posttrain.vision.weights import save_weights

# SQLAlchemy's warning about MLflow's own tables
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

IMAGE = {"channels": 1, "size": (8, 8), "mean": (0.5,), "std": (0.5,), "shape": None}


def open_run(run_folder: Path, uri: str | None = None, **given) -> Tracking:
    asked = {"experiment": "posttrain", "run_name": "digits", "params": {}, "tags": {}, **given}
    return Tracking.open(uri, run_folder=run_folder, **asked)


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


def client_of(tracking: Tracking) -> MlflowClient:
    return MlflowClient(tracking.uri)


def nested_runs(tracking: Tracking):
    return client_of(tracking).search_runs(
        [tracking.experiment_id], f"tags.`mlflow.parentRunId` = '{tracking.run_id}'", order_by=["start_time"]
    )


def log_round(tracking: Tracking, round: int, **given) -> None:
    told = {"params": {}, "metrics": {"live": 90.0}, "figures": {}, "artifacts": [], **given}
    tracking.log_round(round, **told)


def test_without_a_uri_everything_lies_in_the_run_folder(run_folder, tmp_path):
    with open_run(run_folder, params={"run": {"seed": 0}, "score": "loo_margin"}, tags={"kind": "test"}) as tracking:
        (tmp_path / "note.txt").write_text("hello")
        tracking.log_artifact(tmp_path / "note.txt", "notes")
        tracking.log_metrics({"test_accuracy": 0.5}, step=2)
    assert tracking.uri == f"sqlite:///{run_folder}/mlflow.db"
    assert [p.name for p in (run_folder / "mlartifacts").rglob("notes/*")] == ["note.txt"]
    run = client_of(tracking).get_run(tracking.run_id)
    assert run.data.params == {"run.seed": "0", "score": "loo_margin"}
    assert run.data.tags["kind"] == "test"
    assert run.info.run_name == "digits"
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"test_accuracy": 0.5})


def test_the_users_own_server_and_run_stay_as_they_were(run_folder):
    before = mlflow.get_tracking_uri(), os.environ.get("MLFLOW_TRACKING_URI"), mlflow.active_run()
    with open_run(run_folder) as tracking:
        log_round(tracking, 1)
        log_network(tracking, run_folder)
    assert before == (mlflow.get_tracking_uri(), os.environ.get("MLFLOW_TRACKING_URI"), mlflow.active_run())
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ


def test_a_round_is_a_nested_run_and_a_step_of_the_parents_curves(run_folder, tmp_path):
    (tmp_path / "scores.parquet").write_bytes(b"scores")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "weights").write_bytes(b"weights")
    with open_run(run_folder) as tracking:
        for round in (1, 2):
            log_round(
                tracking,
                round,
                params={"l2": 0.1},
                metrics={
                    "live": 100.0 - round,
                    "precision": None,
                    "recall": float("nan"),
                    "loss": float("inf"),
                },
                figures={"scores": b"png"},
                artifacts=[tmp_path / "scores.parquet", tmp_path / "checkpoint"],
            )
        history = client_of(tracking).get_metric_history(tracking.run_id, "live")
    assert [(m.step, m.value) for m in history] == [(1, 99.0), (2, 98.0)]
    runs = nested_runs(tracking)
    assert [run.info.run_name for run in runs] == ["round 0001", "round 0002"]
    assert [run.data.tags["posttrain.round"] for run in runs] == ["1", "2"]
    assert [run.info.status for run in runs] == ["FINISHED"] * 2
    assert [run.data.metrics for run in runs] == [{"live": 99.0}, {"live": 98.0}]
    assert runs[0].data.params == {"l2": "0.1"}
    names = {file.path for file in client_of(tracking).list_artifacts(runs[0].info.run_id)}
    assert names == {"scores.parquet", "checkpoint", "figures"}


def test_a_run_that_goes_on_is_neither_doubled_nor_are_its_rounds(run_folder):
    with pytest.raises(KeyboardInterrupt), open_run(run_folder, params={"seed": 0}) as first:
        log_round(first, 1)
        raise KeyboardInterrupt
    with open_run(run_folder, run_id=first.run_id, params={"seed": 0, "more": 1}) as second:
        assert second.resumed
        assert second.run_id == first.run_id
        assert client_of(second).get_run(second.run_id).info.status == "RUNNING"
        log_round(second, 1)
        log_round(second, 2)
    assert len(nested_runs(second)) == 2
    history = client_of(second).get_metric_history(second.run_id, "live")
    assert [m.step for m in history] == [1, 2]
    run = client_of(second).get_run(second.run_id)
    assert (run.info.status, run.data.params) == ("FINISHED", {"seed": "0", "more": "1"})


def test_a_round_that_was_interrupted_while_it_was_told_is_completed(run_folder, tmp_path):
    missing = tmp_path / "scores.parquet"
    refusal = pytest.raises(StepError, match=r"did not take round 1 .*start the same command again")
    with refusal, open_run(run_folder) as first:
        log_round(first, 1, params={"a": 1}, artifacts=[missing])
    missing.write_bytes(b"scores")
    with open_run(run_folder, run_id=first.run_id) as second:
        log_round(second, 1, params={"a": 1}, artifacts=[missing])
    [nested] = nested_runs(second)
    assert nested.info.status == "FINISHED"
    assert len(client_of(second).get_metric_history(nested.info.run_id, "live")) == 1
    assert len(client_of(second).get_metric_history(second.run_id, "live")) == 1


def test_a_parent_run_that_is_gone_is_replaced_by_a_new_one(run_folder):
    with open_run(run_folder) as first:
        pass
    client_of(first).delete_run(first.run_id)
    for run_id in (first.run_id, "0" * 32):
        with open_run(run_folder, run_id=run_id) as second:
            assert not second.resumed
            assert second.run_id not in (run_id, first.run_id)


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_run_left_by_an_exception_does_not_stay_running(run_folder, error, status):
    with pytest.raises(error), open_run(run_folder) as tracking:
        raise error
    assert client_of(tracking).get_run(tracking.run_id).info.status == status


def test_more_params_and_metrics_than_one_request_holds_are_all_logged(run_folder):
    params = {f"p{i}": i for i in range(205)}
    with open_run(run_folder, params=params) as tracking:
        tracking.log_metrics({f"m{i}": i for i in range(1005)})
    run = client_of(tracking).get_run(tracking.run_id)
    assert (len(run.data.params), len(run.data.metrics)) == (205, 1005)


def test_the_data_set_is_an_input_of_the_run_once_with_our_digest(run_folder):
    digest = "0123456789abcdef" * 4
    for _ in range(2):
        with open_run(run_folder) as tracking:
            for _ in range(2):
                tracking.log_dataset("train", digest, "s3://bucket/train", {"samples": 100})
        inputs = client_of(tracking).get_run(tracking.run_id).inputs
        assert inputs is not None
        [dataset] = inputs.dataset_inputs
        assert digest.startswith(dataset.dataset.digest)
        assert (dataset.dataset.name, dataset.dataset.source_type) == ("train", "s3")
        assert digest in str(dataset.dataset.profile)


def test_a_server_that_refuses_is_named_within_seconds_and_its_password_is_not(run_folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    start = time.perf_counter()
    with pytest.raises(TrackingError, match=rf"at http://\*\*\*@127.0.0.1:{port} .*check tracking.uri") as refused:
        open_run(run_folder, f"http://me:secret@127.0.0.1:{port}")
    assert time.perf_counter() - start < 10
    assert "secret" not in str(refused.value)
    assert "127.0.0.1" in os.environ["NO_PROXY"]
    with pytest.raises(TrackingError, match=rf"at postgresql://\*\*\*@127.0.0.1:{port}/db"):
        open_run(run_folder, f"postgresql://me:secret@127.0.0.1:{port}/db")


def test_a_database_that_is_none_is_refused_at_once(run_folder, tmp_path):
    (tmp_path / "text.db").write_text("no database at all, only some text" * 50)
    start = time.perf_counter()
    with pytest.raises(TrackingError, match="file is not a database"):
        open_run(run_folder, f"sqlite:///{tmp_path}/text.db")
    with pytest.raises(TrackingError, match=r"cannot be used .*tracking.uri"):
        open_run(run_folder, "nonsense://somewhere")
    assert time.perf_counter() - start < 5


def test_a_run_folder_that_no_sqlite_address_can_hold_is_refused(tmp_path):
    with pytest.raises(TrackingError, match=r"choose another run\.path"):
        open_run(tmp_path / "100%")


def test_a_deleted_experiment_is_named(run_folder):
    with open_run(run_folder) as tracking:
        pass
    client_of(tracking).delete_experiment(tracking.experiment_id)
    with pytest.raises(TrackingError, match="experiment 'posttrain' has been deleted"):
        open_run(run_folder)


def log_network(tracking: Tracking, folder: Path) -> tuple[str, torch.nn.Module]:
    torch.manual_seed(0)
    network = build("posttrain.vision.models:mlp", classes=3, arguments={"width": 16})
    save_weights(network, folder / "refined.safetensors")
    uri = tracking.log_model(
        folder / "refined.safetensors",
        factory="posttrain.vision.models:mlp",
        arguments={"width": 16},
        classes=3,
        head="head",
        image=IMAGE,
    )
    return uri, network


def test_the_logged_model_predicts_what_the_network_does_and_holds_no_pickle(run_folder, tmp_path, monkeypatch):
    with open_run(run_folder) as tracking:
        uri, network = log_network(tracking, tmp_path)
    assert not [p for p in run_folder.rglob("*") if p.suffix in (".pkl", ".pickle", ".pth", ".pt")]
    outputs = client_of(tracking).get_run(tracking.run_id).outputs
    assert outputs is not None
    [output] = outputs.model_outputs
    assert uri == f"models:/{output.model_id}"
    assert client_of(tracking).get_logged_model(output.model_id).status == "READY"

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


@pytest.fixture
def network() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)).eval()


def test_weights_come_back_from_a_registered_version_an_alias_a_model_and_a_run(run_folder, tmp_path):
    with open_run(run_folder) as tracking:
        uri, network = log_network(tracking, tmp_path)
        tracking.log_artifact(tmp_path / "refined.safetensors", "weights")
    client = client_of(tracking)
    client.create_registered_model("digits")
    made = client.create_model_version(
        "digits", client.get_logged_model(uri.removeprefix("models:/")).artifact_location
    )
    client.set_registered_model_alias("digits", "champion", made.version)
    uris = [uri, "models:/digits/1", "models:/digits@champion", f"runs:/{tracking.run_id}/weights"]
    uris += [f"{uri}/artifacts", f"runs:/{tracking.run_id}/model"]
    for i, source in enumerate([*uris, f"runs:/{tracking.run_id}/weights/refined.safetensors"]):
        path = fetch_weights(source, tracking.uri, tmp_path / str(i))
        fetched = load_file(path)
        assert all((fetched[name] == tensor).all() for name, tensor in network.state_dict().items())


def test_weights_come_out_of_an_exported_model_without_unpickling(run_folder, tmp_path, network, monkeypatch):
    exported = torch.export.export(network, (torch.zeros(2, 4),))
    torch.export.save(exported, tmp_path / "model.pt2")
    with open_run(run_folder) as tracking:
        tracking.log_artifact(tmp_path / "model.pt2", "exported")
    monkeypatch.setattr("pickle.loads", None)
    monkeypatch.setattr("torch.load", None)
    fetched = load_file(fetch_weights(f"runs:/{tracking.run_id}/exported", tracking.uri, tmp_path / "into"))
    assert fetched.keys() == network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        assert fetched[name].dtype == tensor.dtype
        assert torch.equal(fetched[name], tensor)


def test_a_state_dict_is_taken_and_a_pickled_model_is_refused(run_folder, tmp_path, network):
    torch.save(network.state_dict(), tmp_path / "state.pt")
    torch.save(network, tmp_path / "model.pth")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "note.txt").write_text("no weights")
    with open_run(run_folder) as tracking:
        for name in ("state.pt", "model.pth", "list.pt", "note.txt"):
            tracking.log_artifact(tmp_path / name, name.partition(".")[0])

    def fetch(folder: str) -> Path:
        return fetch_weights(f"runs:/{tracking.run_id}/{folder}", tracking.uri, tmp_path / "into")

    assert fetch("state").name == "state.pt"
    with pytest.raises(ModelError, match=r'pickled model \(model.pth\).*serialization_format="pt2"'):
        fetch("model")
    with pytest.raises(ModelError, match="holds a list"):
        fetch("list")
    with pytest.raises(ModelError, match=r"holds no weights file .* only note\.txt"):
        fetch("note")
    with pytest.raises(ModelError, match=r"cannot be fetched from MLflow .*check model\.weights"):
        fetch("absent")


def test_several_weights_files_are_named_unless_one_is_the_models(run_folder, tmp_path):
    for name in ("first", "second"):
        save_file({"w": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with open_run(run_folder) as tracking:
        tracking.log_artifact(tmp_path / "first.safetensors", "w")
        tracking.log_artifact(tmp_path / "second.safetensors", "w")
        with pytest.raises(ModelError, match=r"several weights files \(first.safetensors, second.safetensors\)"):
            fetch_weights(f"runs:/{tracking.run_id}/w", tracking.uri, tmp_path / "a")
        (tmp_path / "first.safetensors").rename(tmp_path / "model.safetensors")
        tracking.log_artifact(tmp_path / "model.safetensors", "w")
    assert fetch_weights(f"runs:/{tracking.run_id}/w", tracking.uri, tmp_path / "b").name == "model.safetensors"


def test_weights_in_mlflow_need_a_server_to_be_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ModelError, match=r"set tracking\.uri or MLFLOW_TRACKING_URI"):
        fetch_weights("models:/digits/1", None, tmp_path / "into")


def test_the_artifacts_of_a_database_that_is_named_lie_beside_it(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    uri = f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}"
    (tmp_path / "store").mkdir()
    with Tracking.open(uri, run_folder=tmp_path, experiment="e", run_name="r", params={}, tags={}) as tracking:
        (tmp_path / "note.txt").write_text("text")
        tracking.log_artifact(tmp_path / "note.txt")
    assert list((tmp_path / "store" / "mlartifacts").rglob("note.txt"))
    assert not list((tmp_path / "elsewhere").iterdir())
