from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from posttrain.config import RunFile
from posttrain.errors import StepError, TrackingError
from posttrain.runs.tracking import log_data
from posttrain.store.tracking import Tracking

# SQLAlchemy's warning about MLflow's own tables
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")


def open_run(run_folder: Path, uri: str | None = None, **given) -> Tracking:
    asked = {"experiment": "posttrain", "run_name": "digits", "params": {}, "tags": {}, **given}
    return Tracking.open(uri, run_folder=run_folder, **asked)


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


def test_the_users_own_server_and_run_stay_as_they_were(run_folder, log_network):
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
    refusal = pytest.raises(StepError, match=r"did not accept round 1 .*start the same command again")
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
                tracking.log_dataset("train", digest, "s3://bucket/train", {"samples": 100}, context="train")
        inputs = client_of(tracking).get_run(tracking.run_id).inputs
        assert inputs is not None
        [dataset] = inputs.dataset_inputs
        assert digest.startswith(dataset.dataset.digest)
        assert (dataset.dataset.name, dataset.dataset.source_type) == ("train", "s3")
        assert digest in str(dataset.dataset.profile)


def test_every_set_is_an_input_under_its_own_context(run_folder):
    sources = ("train", "validation", "test")
    inputs: Any = SimpleNamespace(sources=dict.fromkeys(sources), classes=("a", "b"))
    with open_run(run_folder) as tracking:
        log_data(tracking, RunFile(), inputs, {name: name * 4 for name in sources})
    found = client_of(tracking).get_run(tracking.run_id).inputs
    assert found is not None
    contexts = {of.dataset.name: [(tag.key, tag.value) for tag in of.tags] for of in found.dataset_inputs}
    assert contexts == {f"digits/{name}": [("mlflow.data.context", name)] for name in sources}


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
