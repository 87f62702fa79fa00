from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from posttrain.errors import ModelError
from posttrain.store.mlflow_weights import fetch_weights
from posttrain.store.tracking import Tracking

# SQLAlchemy's warning about MLflow's own tables
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")


def open_run(run_folder: Path) -> Tracking:
    return Tracking.open(None, run_folder=run_folder, experiment="posttrain", run_name="digits", params={}, tags={})


@pytest.fixture
def network() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)).eval()


def test_weights_come_back_from_a_registered_version_an_alias_a_model_and_a_run(run_folder, tmp_path, log_network):
    with open_run(run_folder) as tracking:
        uri, network = log_network(tracking, tmp_path)
        tracking.log_artifact(tmp_path / "refined.safetensors", "weights")
    client = MlflowClient(tracking.uri)
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
