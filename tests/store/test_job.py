from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.errors import RunFolderError
from posttrain.store.folder import RunFolder
from posttrain.store.job import Base, JobFolder, State, listing_digest
from posttrain.store.listing import File

FILES = [File("train", "a/b.parquet", 10, 5, "c0"), File("test", "a/b.parquet", 20, 6)]


@pytest.fixture
def job(tmp_path: Path) -> JobFolder:
    return JobFolder(RunFolder(str(tmp_path / "job")))


def test_a_job_that_never_ran_knows_nothing(job: JobFolder) -> None:
    assert job.state() == State()
    assert job.seen(job.state()) == {}


def test_state_and_seen_files_come_back_as_they_were_written(job: JobFolder) -> None:
    state = State(("r1", "r2"), "3", "alarm", None, ("a/b.parquet",), ("c",))
    job.write_state(state, FILES)
    found = job.state()
    assert found == State(state.runs, "3", "alarm", found.files, state.held_back, state.accepted)
    assert job.seen(found) == {("train", "a/b.parquet"): FILES[0], ("test", "a/b.parquet"): FILES[1]}
    job.write_state(State(("r1",), files=found.files))
    assert len(job.seen(job.state())) == 2


def test_a_state_that_another_version_wrote_is_refused(job: JobFolder) -> None:
    for record in ({"format": 99}, {"format": 1, "runs": [], "held_back": [], "accepted": [], "more": 1}, {}, []):
        job.folder.write_json(job.folder.path("state.json"), record)
        with pytest.raises(RunFolderError, match="not one that this version"):
            job.state()


def test_the_folder_of_a_run_is_no_job_folder(job: JobFolder) -> None:
    job.refuse_a_run()
    job.folder.write_bytes(job.folder.path("run.yaml"), b"")
    with pytest.raises(RunFolderError, match="holds a run of another command"):
        job.refuse_a_run()


def test_a_base_network_is_kept_once_and_only_whole(job: JobFolder) -> None:
    base = Base("k", {"factory": "f", "arguments": {"width": 3}, "head": "h"}, ("cat", "dog"), b"weights")
    assert job.base("k") is None
    job.folder.write_bytes(job.folder.path("base", "k.safetensors"), b"of a job that was killed")
    assert job.base("k") is None
    job.keep_base(base)
    assert job.base("k") == base
    job.keep_base(Base("k", {}, None, b"others"))
    assert job.base("k") == base


def test_features_of_old_runs_are_dropped_and_nothing_else(job: JobFolder) -> None:
    for name in ("old", "new"):
        run = job.run(name)
        run.write_bytes(run.features("b", "train", 0), b"x")
        run.write_bytes(run.path("summary.json"), b"{}")
    job.drop_features(["old", "never there"])
    there = {str(path.relative_to(job.folder.local)) for path in job.folder.local.rglob("*") if path.is_file()}
    assert there == {"runs/old/summary.json", "runs/new/summary.json", "runs/new/features/b/train/00000.parquet"}


def test_the_digest_depends_on_every_file_and_not_on_their_order() -> None:
    digest = listing_digest(FILES, "x")
    assert listing_digest(FILES[::-1], "x") == digest
    others = [listing_digest(FILES[:1], "x"), listing_digest(FILES), listing_digest(FILES, "y")]
    others += [listing_digest([FILES[0], File("test", "a/b.parquet", 20, 7)], "x")]
    assert len({digest, *others}) == 5


@pytest.mark.parametrize("name", ["../../elsewhere", "/etc", "a/b", "..", ".", "", "a\0b", "a\nb"])
def test_a_name_from_the_registry_cannot_lead_out_of_the_jobs_folder(tmp_path: Path, name: str) -> None:
    job = JobFolder(RunFolder(str(tmp_path / "job")))
    for use in (job.run, job.base, lambda name: job.drop_features([name])):
        with pytest.raises(RunFolderError, match="is no name of a run or network in"):
            use(name)
