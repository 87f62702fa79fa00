"""What a start of a job takes for new, what it leaves behind, and a rollback that was killed; without Ray."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient
from sklearn.datasets import load_digits

from posttrain.config import Data, JobFile, Tracking
from posttrain.data.listing import with_content
from posttrain.errors import DataError, InputError, RunFolderError, StepError
from posttrain.jobs.job_folder import JobFolder, State
from posttrain.jobs.retrain import (
    _Attempt,
    _attempt,
    _base,
    _concluded,
    _inputs,
    _registry,
    _run_config,
    _shipments,
    _stock,
    retrain,
    rollback,
)
from posttrain.store.folder import RunFolder
from posttrain.store.lock import Lock
from posttrain.store.registry import CHALLENGER, CHAMPION, PREVIOUS, Registry
from posttrain.vision import models


class Job:
    """A job whose training files hold any bytes: nothing here opens them."""

    def __init__(self, root: Path, source: str) -> None:
        self.train = root / "train"
        suffix = ".parquet" if source == "parquet" else ""
        for split in ("validation", "test"):
            self.write(f"../{split}{suffix}" if suffix else f"../{split}/cat/1.png", split)
        self.config = JobFile.model_validate(
            {
                "run": {"path": str(root / "job")},
                "job": {"name": "m"},
                "model": {"factory": "posttrain.vision.models:mlp", "channels": 1, "image_size": 8},
                "data": {
                    "source": source,
                    "train": str(self.train),
                    **{split: str(root / f"{split}{suffix}") for split in ("validation", "test")},
                },
            }
        )
        self.folder = JobFolder(RunFolder(str(root / "job")))

    def write(self, name: str, content: str) -> str:
        path = self.train / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        return str(path)

    def seen(self, **state: Any) -> None:
        """A run has ended that took in all that is there now."""
        files = with_content(_stock(self.config, self.folder).files, local=True)
        self.folder.write_state(replace(State(runs=("r",)), **state), files)

    def names(self, part: str) -> list[str]:
        found = getattr(_stock(self.config, self.folder), part)
        return sorted(str(Path(file.path).relative_to(self.train)) for file in found if file.split == "train")

    def decided(self, attempt: _Attempt, verdict: str, **more: Any) -> None:
        """The attempt has come to this verdict, and nothing of it lasts yet."""
        record: dict[str, Any] = dict.fromkeys(("rounds", "live", "removed", "relabelled", "quarantined"), 0)
        record |= {"verdict": verdict, "reason": "", "champion": None, "challenger": {"samples": [10], "correct": [9]}}
        record |= {"arrivals": {"samples": 0, "candidates": 0, "taken": 0}, "measured_on": "test", "embedded": {}}
        record |= {"removed_earlier": 0, "model": "", "mlflow_run": "", "base": "", "data": {}, "taken": 0}
        record["parent"] = attempt.champion.number if attempt.champion else None
        attempt.folder.write_json(attempt.folder.path("decision.json"), {**record, **more})

    def alarm(self, *alarming: str) -> None:
        """The run that was due has ended with an alarm."""
        self.conclude("alarm", alarming=alarming)

    def conclude(self, verdict: str, **more: Any) -> None:
        """The run that was due has ended with this verdict."""
        attempt = _Attempt("attempt", self.folder.run("attempt"), None)
        self.decided(attempt, verdict, **more)
        stock = _stock(self.config, self.folder)
        _concluded(self.config, self.folder, cast(Registry, _Nothing()), stock, attempt, cast(Lock, _Nothing()))


class _Nothing:
    """A registry without versions, and a lock that is held."""

    name = "m"

    def version(self, alias: str) -> None:
        return None

    def register(self, model: str, **given: Any) -> SimpleNamespace:
        return SimpleNamespace(number="1", tags={})

    def point(self, *given: object) -> None:
        pass

    promote = point

    def assert_held(self) -> None:
        pass


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Job]:
    return lambda source="parquet": Job(tmp_path, source)


def test_a_file_is_new_by_its_content_and_not_by_its_time(make: Callable[..., Job]) -> None:
    job = make()
    for name in ("a.parquet", "b.parquet", "c.parquet"):
        job.write(name, "123")
    assert job.names("new") == job.names("judged") == ["a.parquet", "b.parquet", "c.parquet"]
    job.seen()
    os.utime(job.train / "a.parquet", (1, 1))
    job.write("b.parquet", "124")
    assert job.names("new") == ["b.parquet"]
    assert job.names("files") == ["a.parquet", "b.parquet", "c.parquet"]


def test_a_file_that_is_gone_is_said_and_is_no_reason_to_run(make: Callable[..., Job]) -> None:
    job = make()
    for name in ("a.parquet", "b.parquet"):
        job.write(name, name)
    job.seen()
    (job.train / "b.parquet").unlink()
    said = retrain(job.config, quiet=True)
    assert (said["outcome"], said["exit_code"]) == ("nothing new", 0)
    assert said["reason"].endswith("since the last run; 1 is gone, and the next run does without")


def test_a_file_held_back_takes_part_again_where_it_changes_or_is_let_in(make: Callable[..., Job]) -> None:
    job = make()
    job.write("a.parquet", "a")
    held = job.write("bad.parquet", "bad")
    job.seen(held_back=(held,))
    os.utime(held, (1, 1))
    assert (job.names("new"), job.names("files"), job.names("held_back")) == ([], ["a.parquet"], ["bad.parquet"])
    job.folder.write_state(replace(job.folder.state(), held_back=(), accepted=(held,)))
    assert (job.names("new"), job.names("judged")) == (["bad.parquet"], [])  # also written anew as it was
    job.write("bad.parquet", "corrected")
    assert (job.names("new"), job.names("judged")) == (["bad.parquet"], ["bad.parquet"])


def test_after_an_alarm_the_alarming_file_alone_is_held_back_and_the_others_are_new_again(
    make: Callable[..., Job],
) -> None:
    job = make()
    job.write("old.parquet", "old")
    job.write("changed.parquet", "as it was")
    let_in = job.write("let_in.parquet", "let in")
    job.seen(accepted=(let_in,))
    job.write("changed.parquet", "corrected")
    job.write("good.parquet", "good")
    bad = job.write("bad.parquet", "bad")
    new = ["changed.parquet", "good.parquet", "let_in.parquet"]
    assert job.names("new") == sorted([*new, "bad.parquet"])
    job.alarm(bad)
    assert job.folder.state().held_back == (bad,)
    assert (job.names("held_back"), job.names("new")) == (["bad.parquet"], new)
    assert job.names("judged") == ["changed.parquet", "good.parquet"]
    assert job.names("files") == ["changed.parquet", "good.parquet", "let_in.parquet", "old.parquet"]


def test_a_file_held_back_again_is_let_in_no_more(make: Callable[..., Job]) -> None:
    job = make()
    job.write("a.parquet", "a")
    bad = job.write("bad.parquet", "bad")
    job.seen(held_back=(), accepted=(bad,))
    job.write("bad.parquet", "bad in another way")
    job.alarm(bad)
    assert (job.folder.state().held_back, job.folder.state().accepted) == ((bad,), ())
    assert (job.names("new"), job.names("files"), job.names("held_back")) == ([], ["a.parquet"], ["bad.parquet"])


def test_samples_that_no_champion_was_made_with_are_not_counted_as_let_pass(make: Callable[..., Job]) -> None:
    job = make()
    job.write("old.parquet", "old")
    job.seen()
    job.write("new.parquet", "new")
    job.write("let_in.parquet", "let in")
    job.conclude("not promoted")
    assert (job.names("new"), job.names("judged"), job.names("excused")) == ([], [], ["let_in.parquet", "new.parquet"])
    job.write("new.parquet", "corrected")
    assert (job.names("judged"), job.names("excused")) == (["new.parquet"], ["let_in.parquet"])
    job.conclude("promoted")
    assert (job.folder.state().unused, job.names("excused")) == ((), [])


def test_another_gate_is_another_run(make: Callable[..., Job]) -> None:
    job = make()
    job.write("a.parquet", "a")
    wider = job.config.model_copy(update={"gate": job.config.gate.model_copy(update={"alarm_older_share": 0.9})})
    names = {
        _attempt(config, job.folder, cast(Registry, _Nothing()), _stock(config, job.folder)).name
        for config in (job.config, wider, job.config)
    }
    assert len(names) == 2


def test_what_judges_class_folders_names_no_key_of_their_uri() -> None:
    data = Data.model_validate({"source": "folder", "train": "s3://KEY:SECRET@bucket/train?region=us-east-1"})
    assert _shipments(data, ["cat/1.png", "cat/inner/2.png"]) == ["partition/train/cat"] * 2


def test_class_folders_are_held_back_as_a_whole_with_what_is_new_in_them(make: Callable[..., Job]) -> None:
    job = make("folder")
    job.write("cat/1.png", "old cat")
    job.seen()
    bad = [job.write(f"cat/{name}.png", "no cat") for name in (2, 3)]
    job.write("dog/4.png", "dog")
    job.alarm(f"{job.train}/cat")
    assert job.folder.state().held_back == tuple(bad)
    assert (job.names("new"), job.names("files")) == (["dog/4.png"], ["cat/1.png", "dog/4.png"])


def registered(job: Job, source: Path | None = None) -> Registry:
    """Two versions by somebody else; the second is champion, the first the one before."""
    registry = Registry.open(None, home=job.folder.folder.local, name="m")
    client = MlflowClient(registry.uri, registry_uri=registry.uri)
    client.create_registered_model("m")
    for alias in (PREVIOUS, CHAMPION):
        made = client.create_model_version("m", str(source or job.train))
        registry.point(alias, made.version)
    return registry


def aliases(registry: Registry) -> dict[str, str]:
    found = {alias: registry.version(alias) for alias in (CHAMPION, PREVIOUS, CHALLENGER)}
    return {alias: version.number for alias, version in found.items() if version}


def killed_at(work: Callable[..., Any], job: Job, owner: type, step: str, *, done: bool) -> None:
    """The command is killed at the first call of this step, before it or once it is done."""
    real = getattr(owner, step)

    def killed(*arguments: Any, **keywords: Any) -> None:
        if done:
            real(*arguments, **keywords)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, step, killed)
        work(job.config, quiet=True)


@pytest.mark.parametrize("done", [False, True])
def test_a_rollback_killed_half_way_is_ended_by_the_next_start_with_nothing_new(
    make: Callable[..., Job], done: bool
) -> None:
    job = make()
    job.write("a.parquet", "a")
    job.seen(champion="2")
    registry = registered(job)
    killed_at(rollback, job, Registry, "point", done=done)
    summary = retrain(job.config, quiet=True)
    assert (summary["outcome"], summary["champion"]) == ("nothing new", "1")
    assert aliases(registry) == {CHAMPION: "1", PREVIOUS: "2"}
    assert job.folder.state().champion == "1"
    assert rollback(job.config, quiet=True)["champion"] == "2"


def test_a_start_killed_at_every_step_of_a_promotion_ends_as_one_that_was_not(make: Callable[..., Job]) -> None:
    job = make()
    job.write("a.parquet", "a")
    job.seen(champion="2")
    job.write("b.parquet", "b")
    registry = registered(job)
    client = MlflowClient(registry.uri, registry_uri=registry.uri)
    model = client.create_logged_model("0", name="model").model_id
    attempt = _attempt(job.config, job.folder, registry, _stock(job.config, job.folder))
    run_id = client.create_run("0").info.run_id
    job.decided(attempt, "promoted", model=f"models:/{model}", mlflow_run=run_id, alarming=[])
    steps = [(Registry, "register"), (Registry, "point"), (Registry, "promote"), (JobFolder, "write_state")]
    for owner, step in steps[:-1]:
        for done in (False, True):
            killed_at(retrain, job, owner, step, done=done)
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


def test_a_champion_that_somebody_saved_by_torch_is_what_the_run_starts_from(
    make: Callable[..., Job], tmp_path: Path
) -> None:
    job = make()
    job.write("a.parquet", "a")
    model = models.mlp(10)
    (tmp_path / "theirs").mkdir()
    torch.save(model.state_dict(), tmp_path / "theirs" / "weights.pt")
    registered(job, tmp_path / "theirs")
    registry = _registry(job.config, job.folder)  # the first start leaves alone what is registered in its own database
    champion = registry.version(CHAMPION)
    base = _base(job.config, job.folder, registry, champion)

    def taken_up(**data: Any) -> bytes | None:
        config = JobFile.model_validate(
            {
                "run": {"path": str(tmp_path / "job")},
                "job": {"name": "m"},
                "model": {"factory": "posttrain.vision.models:mlp", "channels": 1, "image_size": 8},
                "data": data,
            }
        )
        run_config = _run_config(config, _Attempt("a", job.folder.run("a"), champion), base)
        return _inputs(run_config, _stock(config, job.folder), base).weights

    digits = inputs_of_digits(tmp_path)
    assert taken_up(**digits) == models.to_bytes(model)
    # a tenth of the training data would be what it was trained on
    del digits["validation"]
    with pytest.raises(DataError, match=r"version 2\) was not made by this job, and the data have no validation set"):
        taken_up(**digits)


def inputs_of_digits(folder: Path) -> dict[str, Any]:
    """The section `data` of a run file on the first digits, in Parquet."""
    digits = load_digits()
    assert not isinstance(digits, tuple)
    pixels = (digits.images[:200] * 15).astype(np.uint8).reshape(200, 64)
    table = pa.table({"id": range(200), "image": [row.tobytes() for row in pixels], "label": digits.target[:200]})
    table = table.replace_schema_metadata({"image_shape": "[8, 8]"})
    for name, part in (("digits_train", table[:150]), ("digits_validation", table[150:])):
        pq.write_table(part, folder / f"{name}.parquet")
    return {
        "source": "parquet",
        "train": str(folder / "digits_train.parquet"),
        "validation": str(folder / "digits_validation.parquet"),
    }


def test_a_champion_that_is_gone_is_said_and_no_reason_to_promote_without_a_gate(make: Callable[..., Job]) -> None:
    job = make()
    job.write("a.parquet", "a")
    job.seen(champion="7")
    registry = Registry.open(None, home=job.folder.folder.local, name="m")
    MlflowClient(registry.uri, registry_uri=registry.uri).create_registered_model("m")
    job.write("b.parquet", "b")
    with pytest.raises(InputError, match=r"champion was version 7, but m in the registry at .* has no version with"):
        retrain(job.config, quiet=True)


@pytest.mark.parametrize("command", [retrain, rollback])
def test_a_registry_that_does_not_answer_is_a_failure_that_a_scheduler_tries_again(
    make: Callable[..., Job], command: Callable[..., Any]
) -> None:
    job = make()
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


def test_the_folder_of_a_search_is_no_jobs_folder(make: Callable[..., Job]) -> None:
    job = make()
    job.folder.folder.write_bytes(job.folder.folder.path("search.yaml"), b"")
    with pytest.raises(RunFolderError, match="holds a run of another command"):
        retrain(job.config, quiet=True)
