"""A run whose MLflow server is away, slow or refuses: nothing is lost, nothing comes twice, no round waits long."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from servers import Between, Server, mlflow_server, serving, standing_before
from small_data import assert_same_result

from posttrain.errors import TrackingError
from posttrain.runs.steps import CleaningRun
from posttrain.store import outbox as outboxes
from posttrain.store.folder import RunFolder
from posttrain.store.outbox import Outbox, waiting
from posttrain.store.tracking import Tracking

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(mlflow_server(tmp_path_factory.mktemp("server"))) as server:
        yield server


@pytest.fixture
def between(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Between]:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    with standing_before(server.port) as between:
        yield between


class Told:
    """What MLflow has of a run."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.client = MlflowClient(uri)
        self.parent = self.client.get_run(run_id)
        beneath = f"tags.`mlflow.parentRunId` = '{run_id}'"
        self.nested = self.client.search_runs([self.parent.info.experiment_id], beneath, order_by=["start_time"])

    def curve(self, metric: str) -> list[tuple[int, float]]:
        return [(m.step, m.value) for m in self.client.get_metric_history(self.parent.info.run_id, metric)]

    def files(self, run_id: str) -> set[str]:
        return {file.path for file in self.client.list_artifacts(run_id)}


def opened(uri: str, folder: RunFolder, said: list[str], **known: Any) -> Outbox:
    tracking = Tracking.open(
        uri, run_folder=folder.local, experiment="outbox", run_name="run", params={}, tags={}, **known
    )
    return Outbox.of(tracking, folder, said.append)


def tell(outbox: Outbox, folder: RunFolder, rounds: range) -> None:
    for number in rounds:
        folder.write_bytes(folder.round(number, "round.json"), b"{}")
        outbox.log_round(
            number,
            params={"budget": 0.1},
            metrics={"live": 100.0 - number},
            figures={"scores.png": b"png"},
            artifacts=[folder.local / "rounds" / f"{number:04d}" / "round.json"],
        )


def assert_whole(told: Told, rounds: range) -> None:
    assert [run.data.tags["posttrain.round"] for run in told.nested] == [str(number) for number in rounds]
    assert [run.info.status for run in told.nested] == ["FINISHED"] * len(rounds)
    assert told.curve("live") == [(number, 100.0 - number) for number in rounds]
    for run in told.nested:
        assert told.files(run.info.run_id) == {"round.json", "figures"}
        assert len(told.client.get_metric_history(run.info.run_id, "live")) == 1


def test_what_is_not_taken_is_kept_in_order_and_told_once(
    between: Between, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outboxes, "_PAUSE", 0)
    folder, said = RunFolder(str(tmp_path / "run")), []
    outbox = opened(between.uri, folder, said)
    with outbox:
        tell(outbox, folder, range(0, 1))
        between.mood = lambda method, path: "503"
        tell(outbox, folder, range(1, 3))
        assert len(waiting(folder)) == 2 and len(said) == 1
        # every fifth request comes to grief, each time in another way
        moods = itertools.cycle(["pass"] * 4 + ["403"] + ["pass"] * 4 + ["lose"])
        between.mood = lambda method, path: next(moods)
        tell(outbox, folder, range(3, 5))
        outbox.log_metrics({"rounds": 4}, step=4)
        between.mood = lambda method, path: "pass"
    assert outbox.undelivered() is None and waiting(folder) == []
    told = Told(server.uri, outbox._queue.tracking.run_id)
    assert_whole(told, range(5))
    assert told.curve("rounds") == [(4, 4.0)]
    assert told.parent.info.status == "FINISHED"
    assert "kept for later" in said[0] and "has accepted the messages kept" in said[-1]


def test_a_request_that_was_given_up_and_arrives_late_makes_no_second_run(
    between: Between, server: Server, tmp_path: Path
) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    outbox = opened(between.uri, folder, [])
    direct = MlflowClient(server.uri)
    tracking = outbox._queue.tracking
    with outbox:
        tell(outbox, folder, range(0, 2))
        tags = {"mlflow.parentRunId": tracking.run_id, "posttrain.round": "1"}
        direct.create_run(tracking.experiment_id, run_name="round 0001", tags=tags)
    assert_whole(Told(server.uri, tracking.run_id), range(2))


def test_a_run_whose_id_never_arrived_is_found_again(between: Between, server: Server, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    between.mood = lambda method, path: "lose" if path.endswith("runs/create") else "pass"
    with pytest.raises(TrackingError):
        opened(between.uri, folder, [], key="k1")
    between.mood = lambda method, path: "pass"
    with opened(between.uri, folder, [], key="k1") as outbox:
        found = outbox._queue.tracking
    runs = MlflowClient(server.uri).search_runs([found.experiment_id], "tags.`posttrain.key` = 'k1'")
    assert [run.info.run_id for run in runs] == [found.run_id]


def test_a_server_that_never_answers_costs_a_tenth_of_the_time_at_most(
    between: Between, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outboxes, "_ANSWER_S", 1)
    monkeypatch.setattr(outboxes, "_LAST_ANSWER_S", 1)
    folder = RunFolder(str(tmp_path / "run"))
    with opened(between.uri, folder, []) as outbox:
        between.mood = lambda method, path: "hang"
        began = time.monotonic()
        tell(outbox, folder, range(0, 20))
        # one attempt for all twenty: the next is not due for ten seconds
        assert time.monotonic() - began < 6
    left = outbox.undelivered()
    assert left is not None and left["messages"] == 21 and left["server"] == between.uri
    assert time.monotonic() - began < 12


def test_a_message_of_another_kind_is_refused(between: Between, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    outbox = opened(between.uri, folder, [])
    with pytest.raises(ValueError, match="not in tuple"):
        outbox._add("open", uri="x")


@contextmanager
def killed_in_round(server: Server, number: int) -> Iterator[None]:
    """The server dies while a run in here is in this round."""
    score = CleaningRun.score

    def dies(self: CleaningRun, state: Any, *given: Any) -> Any:
        if state.number + 1 == number:
            server.kill()
        return score(self, state, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CleaningRun, "score", dies)
        yield


@pytest.mark.long
def test_a_run_whose_server_is_killed_goes_on_and_delivers_at_its_next_start(
    server: Server,
    run: Callable[..., dict[str, Any]],
    undisturbed: Callable[[], dict[str, Any]],
    mlflow_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    uri = server.uri
    section = {"uri": uri, "log_model": True}
    expected = undisturbed()
    with killed_in_round(server, 2):
        summary = run(tmp_path / "run", tracking=section)
    assert_same_result(tmp_path / "run", expected["run"])
    left = summary["undelivered"]
    assert left["server"] == uri and left["messages"] > 3
    assert len(waiting(RunFolder(str(tmp_path / "run")))) == left["messages"]
    assert "kept for later, and the run goes on" in " ".join(capsys.readouterr().err.split())

    # still away: said again, and nothing is done
    assert run(tmp_path / "run", tracking=section)["undelivered"]["messages"] == left["messages"]
    # a run is not begun without it
    with pytest.raises(TrackingError, match=r"check tracking\.uri"):
        run(tmp_path / "another", tracking=section)
    # the folder may have been moved meanwhile
    shutil.move(tmp_path / "run", tmp_path / "moved")
    server.start()
    again = run(tmp_path / "moved", tracking=section)
    assert again["undelivered"] is None
    assert not list((tmp_path / "moved" / "outbox").iterdir())
    known = [json.loads((Path(path) / "tracking.json").read_text()) for path in (tmp_path / "moved", expected["run"])]
    told, other = Told(uri, known[0]["run_id"]), Told(mlflow_uri, known[1]["run_id"])
    assert told.parent.info.status == "FINISHED"
    assert [run.info.run_name for run in told.nested] == [run.info.run_name for run in other.nested]
    assert {run.info.status for run in told.nested} == {"FINISHED"}
    for metric in ("test_accuracy", "removed", "noise_rate", "rounds"):
        assert told.curve(metric) == other.curve(metric), metric
    for mine, theirs in zip(told.nested, other.nested, strict=True):
        assert told.files(mine.info.run_id) == other.files(theirs.info.run_id)
    assert told.files(known[0]["run_id"]) == other.files(known[1]["run_id"])
    assert len(told.parent.outputs.model_outputs) == 1  # pyright: ignore[reportOptionalMemberAccess]
    assert len(told.client.search_runs([told.parent.info.experiment_id], "tags.`posttrain.run` != ''")) == 1
