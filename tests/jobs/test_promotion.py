"""Promotion and rollback, killed at every step; the champion that is gone, and the registry that does not answer."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from small_job import SmallJob, aliases, killed_at, no_registry

from posttrain.config import Tracking
from posttrain.errors import InputError, RunFolderError, StepError
from posttrain.jobs.job_folder import JobFolder
from posttrain.jobs.retrain import retrain
from posttrain.jobs.rollback import rollback
from posttrain.store.registry import CHAMPION, PREVIOUS, Registry


@pytest.mark.parametrize("done", [False, True])
def test_a_rollback_killed_half_way_is_ended_by_the_next_start_with_nothing_new(tmp_path: Path, done: bool) -> None:
    job = SmallJob(tmp_path)
    job.write("a.parquet", "a")
    job.seen(champion="2")
    registry = job.registered()
    killed_at(rollback, job, Registry, "point", done=done)
    summary = retrain(job.config, quiet=True)
    assert (summary["outcome"], summary["champion"]) == ("nothing new", "1")
    assert aliases(registry) == {CHAMPION: "1", PREVIOUS: "2"}
    assert job.folder.state().champion == "1"
    assert rollback(job.config, quiet=True)["champion"] == "2"


def test_a_start_killed_at_every_step_of_a_promotion_ends_as_one_that_was_not(tmp_path: Path) -> None:
    job = SmallJob(tmp_path)
    job.write("a.parquet", "a")
    job.seen(champion="2")
    job.write("b.parquet", "b")
    registry = job.registered()
    client = MlflowClient(registry.uri, registry_uri=registry.uri)
    model = client.create_logged_model("0", name="model").model_id
    run_id = client.create_run("0").info.run_id
    job.decided(job.attempt(registry), "promoted", model=f"models:/{model}", mlflow_run=run_id, alarming=[])
    for step in ("register", "point", "promote"):
        for done in (False, True):
            killed_at(retrain, job, Registry, step, done=done)
    killed_at(retrain, job, JobFolder, "write_state", done=False)
    assert aliases(registry) == {CHAMPION: "3", PREVIOUS: "2"}
    assert job.folder.state().champion == "2"
    # whoever rolls it back meanwhile is not overruled by the start that ends the run
    rollback(job.config, quiet=True)
    assert retrain(job.config, quiet=True)["champion"] == "2"
    assert aliases(registry) == {CHAMPION: "2", PREVIOUS: "3"}
    rollback(job.config, quiet=True)
    assert job.folder.state().champion == "3"
    assert len(client.search_model_versions("name = 'm'")) == 3
    assert retrain(job.config, quiet=True)["outcome"] == "nothing new"


def test_a_champion_that_is_gone_is_said_and_no_reason_to_promote_without_a_gate(tmp_path: Path) -> None:
    job = SmallJob(tmp_path)
    job.write("a.parquet", "a")
    job.seen(champion="7")
    registry = Registry.open(None, home=job.folder.folder.local, name="m")
    MlflowClient(registry.uri, registry_uri=registry.uri).create_registered_model("m")
    job.write("b.parquet", "b")
    with pytest.raises(InputError, match=r"champion was version 7, but m in the registry at .* has no version with"):
        retrain(job.config, quiet=True)


@pytest.mark.parametrize("command", [retrain, rollback])
def test_a_registry_that_does_not_answer_is_a_failure_that_a_scheduler_tries_again(
    tmp_path: Path, command: Callable[..., Any]
) -> None:
    job = SmallJob(tmp_path)
    job.write("a.parquet", "a")
    job.seen()
    job.write("b.parquet", "b")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, and nobody listens
        uri = f"http://127.0.0.1:{held.getsockname()[1]}"
        config = job.config.model_copy(update={"tracking": Tracking(uri=uri)})
        with pytest.raises(StepError, match="start the same command again") as found:
            command(config, quiet=True)
    assert found.value.exit_code == 1


def test_another_gate_is_another_run(tmp_path: Path) -> None:
    job = SmallJob(tmp_path)
    job.write("a.parquet", "a")
    wider = job.config.model_copy(update={"gate": job.config.gate.model_copy(update={"alarm_older_share": 0.9})})
    assert len({job.attempt(no_registry(), config).name for config in (job.config, wider, job.config)}) == 2


def test_the_folder_of_a_search_is_no_jobs_folder(tmp_path: Path) -> None:
    job = SmallJob(tmp_path)
    job.folder.folder.write_bytes(job.folder.folder.path("search.yaml"), b"")
    with pytest.raises(RunFolderError, match="holds a run of another command"):
        retrain(job.config, quiet=True)
