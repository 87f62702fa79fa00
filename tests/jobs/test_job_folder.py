from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.data.listing import File
from posttrain.errors import RunFolderError
from posttrain.jobs.job_folder import Base, JobFolder, State, listing_digest
from posttrain.store.folder import RunFolder

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
    job.write_state(State())
    known = job.folder.read_json(job.folder.path("state.json"))
    older = "was made by an older version of posttrain, whose run folders this one cannot go on with"
    for record, why in (
        ({**known, "format": 1}, older),
        ({}, older),
        ([], older),
        ({**known, "more": 1}, "not one that this version"),
        ({"format": known["format"]}, "not one that this version"),
    ):
        job.folder.write_json(job.folder.path("state.json"), record)
        with pytest.raises(RunFolderError, match=why):
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


def test_features_of_all_runs_but_those_kept_are_dropped_and_nothing_else(job: JobFolder) -> None:
    for name in ("old", "never ended", "new"):
        run = job.run(name)
        run.write_bytes(run.features("b", "train", 0), b"x")
        run.write_bytes(run.path("summary.json"), b"{}")
    for key in ("used", "unused"):
        job.keep_base(Base(key, {}, None, b"weights"))
    job.drop_features({"new", "never there"})
    job.drop_bases({"used"})
    there = {str(path.relative_to(job.folder.local)) for path in job.folder.local.rglob("*") if path.is_file()}
    assert there == {
        *(f"runs/{name}/summary.json" for name in ("old", "never ended", "new")),
        "runs/new/features/b/train/00000.parquet",
        "base/used.json",
        "base/used.safetensors",
    }


def test_a_run_of_a_job_lies_beneath_it_where_its_uri_has_options() -> None:
    job = JobFolder(RunFolder("s3://bucket/job/?endpoint_override=127.0.0.1%3A1&scheme=http&region=us-east-1"))
    assert job.run("r-v0").path("run.yaml") == "bucket/job/runs/r-v0/run.yaml"
    assert job.run("r-v0").files.region == "us-east-1"
    assert RunFolder("/a/b?c/").beneath("runs").location == "/a/b?c/runs"


def test_the_digest_depends_on_every_file_and_not_on_their_order() -> None:
    digest = listing_digest(FILES, "x")
    assert listing_digest(FILES[::-1], "x") == digest
    others = [listing_digest(FILES[:1], "x"), listing_digest(FILES), listing_digest(FILES, "y")]
    others += [listing_digest([FILES[0], File("test", "a/b.parquet", 20, 7)], "x")]
    assert len({digest, *others}) == 5


@pytest.mark.parametrize("name", ["../../elsewhere", "/etc", "a/b", "..", ".", "", "a\0b", "a\nb"])
def test_a_name_from_the_registry_cannot_lead_out_of_the_jobs_folder(tmp_path: Path, name: str) -> None:
    job = JobFolder(RunFolder(str(tmp_path / "job")))
    for use in (job.run, job.base):
        with pytest.raises(RunFolderError, match="is no name of a run or network in"):
            use(name)
