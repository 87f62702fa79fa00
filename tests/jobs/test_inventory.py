"""What a start of a job takes for new, and what an alarm holds back."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from small_job import SmallJob

from posttrain.config import Data
from posttrain.jobs.inventory import batch_names
from posttrain.jobs.retrain import retrain


def test_a_file_is_new_by_its_content_and_not_by_its_time(tmp_path: Path) -> None:
    job = SmallJob(tmp_path)
    for name in ("a.parquet", "b.parquet", "c.parquet"):
        job.write(name, "123")
    assert job.names("new") == job.names("checked") == ["a.parquet", "b.parquet", "c.parquet"]
    job.seen()
    os.utime(job.train / "a.parquet", (1, 1))
    job.write("b.parquet", "124")
    assert job.names("new") == ["b.parquet"]
    assert job.names("files") == ["a.parquet", "b.parquet", "c.parquet"]


def test_a_file_that_is_gone_is_said_and_is_no_reason_to_run(tmp_path: Path) -> None:
    job = SmallJob(tmp_path)
    for name in ("a.parquet", "b.parquet"):
        job.write(name, name)
    job.seen()
    (job.train / "b.parquet").unlink()
    said = retrain(job.config, quiet=True)
    assert (said["outcome"], said["exit_code"]) == ("nothing new", 0)
    assert said["reason"].endswith("since the last run; 1 is gone, and the next run does without")


def test_a_file_held_back_takes_part_again_where_it_changes_or_is_accepted(tmp_path: Path) -> None:
    job = SmallJob(tmp_path)
    job.write("a.parquet", "a")
    held = job.write("bad.parquet", "bad")
    job.seen(held_back=(held,))
    os.utime(held, (1, 1))
    assert (job.names("new"), job.names("files"), job.names("held_back")) == ([], ["a.parquet"], ["bad.parquet"])
    job.folder.write_state(replace(job.folder.state(), held_back=(), accepted=(held,)))
    assert (job.names("new"), job.names("checked")) == (["bad.parquet"], [])  # also written anew as it was
    job.write("bad.parquet", "corrected")
    assert (job.names("new"), job.names("checked")) == (["bad.parquet"], ["bad.parquet"])


def test_after_an_alarm_the_alarming_file_alone_is_held_back_and_the_others_are_new_again(tmp_path: Path) -> None:
    job = SmallJob(tmp_path)
    job.write("old.parquet", "old")
    job.write("changed.parquet", "as it was")
    accepted = job.write("accepted.parquet", "accepted")
    job.seen(accepted=(accepted,))
    job.write("changed.parquet", "corrected")
    job.write("good.parquet", "good")
    bad = job.write("bad.parquet", "bad")
    new = ["accepted.parquet", "changed.parquet", "good.parquet"]
    assert job.names("new") == sorted([*new, "bad.parquet"])
    job.conclude("alarm", alarming=(bad,))
    assert job.folder.state().held_back == (bad,)
    assert (job.names("held_back"), job.names("new")) == (["bad.parquet"], new)
    assert job.names("checked") == ["changed.parquet", "good.parquet"]
    assert job.names("files") == ["accepted.parquet", "changed.parquet", "good.parquet", "old.parquet"]


def test_a_file_held_back_again_is_accepted_no_more(tmp_path: Path) -> None:
    job = SmallJob(tmp_path)
    job.write("a.parquet", "a")
    bad = job.write("bad.parquet", "bad")
    job.seen(held_back=(), accepted=(bad,))
    job.write("bad.parquet", "bad in another way")
    job.conclude("alarm", alarming=(bad,))
    assert (job.folder.state().held_back, job.folder.state().accepted) == ((bad,), ())
    assert (job.names("new"), job.names("files"), job.names("held_back")) == ([], ["a.parquet"], ["bad.parquet"])


def test_samples_that_no_champion_was_trained_on_are_not_counted_as_kept_by_previous_runs(tmp_path: Path) -> None:
    job = SmallJob(tmp_path)
    job.write("old.parquet", "old")
    job.seen()
    job.write("new.parquet", "new")
    job.write("other.parquet", "other")
    job.conclude("not promoted")
    assert (job.names("new"), job.names("checked"), job.names("exempt")) == ([], [], ["new.parquet", "other.parquet"])
    job.write("new.parquet", "corrected")
    assert (job.names("checked"), job.names("exempt")) == (["new.parquet"], ["other.parquet"])
    job.conclude("promoted")
    assert (job.folder.state().unused, job.names("exempt")) == ((), [])


def test_class_folders_are_held_back_as_a_whole_with_what_is_new_in_them(tmp_path: Path) -> None:
    job = SmallJob(tmp_path, "folder")
    job.write("cat/1.png", "old cat")
    job.seen()
    bad = [job.write(f"cat/{name}.png", "no cat") for name in (2, 3)]
    job.write("dog/4.png", "dog")
    job.conclude("alarm", alarming=(f"{job.train}/cat",))
    assert job.folder.state().held_back == tuple(bad)
    assert (job.names("new"), job.names("files")) == (["dog/4.png"], ["cat/1.png", "dog/4.png"])


def test_the_name_of_a_class_folder_tells_no_key_of_its_uri() -> None:
    data = Data.model_validate({"source": "folder", "train": "s3://KEY:SECRET@bucket/train?region=us-east-1"})
    assert batch_names(data, ["cat/1.png", "cat/inner/2.png"]) == ["bucket/train/cat"] * 2
