"""Runs whose data and run folder lie in an S3-compatible store, also where it is slow, refuses or goes away."""

from __future__ import annotations

import http.client
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import fs
from servers import Between, Server, serving, standing_before
from small_data import assert_same_result

from posttrain.errors import DataError, LockedError, PosttrainError
from posttrain.runs import select as selecting
from posttrain.store import lock
from posttrain.store.folder import RunFolder, resolve

pytestmark = pytest.mark.ray

Run = Callable[..., dict[str, Any]]
Undisturbed = Callable[..., dict[str, Any]]

KEY, SECRET = "a-key", "a-s3cret"


def uri(front: Between, path: str) -> str:
    at = front.uri.removeprefix("http://").replace(":", "%3A")
    return f"s3://{KEY}:{SECRET}@bucket/{path}?scheme=http&endpoint_override={at}&region=us-east-1"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An S3 server (moto's) with one bucket."""
    with serving(Server(tmp_path_factory.mktemp("s3"), "moto.server", path="/")) as server:
        bucket = http.client.HTTPConnection("127.0.0.1", server.port)
        bucket.request("PUT", "/bucket")
        assert bucket.getresponse().status == 200
        bucket.close()
        yield server


@pytest.fixture
def front(store: Server) -> Iterator[Between]:
    with standing_before(store.port) as between:
        yield between


@pytest.fixture(scope="module")
def data(store: Server, digits_parquet: Path) -> str:
    """The digits in the bucket, beneath this name."""
    with standing_before(store.port) as between:
        files, place = resolve(uri(between, "digits"))
        for path in sorted(digits_parquet.rglob("*.parquet")):
            to = f"{place}/{path.relative_to(digits_parquet)}"
            fs.copy_files(str(path), to, destination_filesystem=files)
    return "digits"


@pytest.fixture
def in_store(run: Run, front: Between, data: str) -> Run:
    """As `run`, with the data in the bucket, and the run folder in it beneath a name."""

    def clean(name: str, **sections: dict[str, Any]) -> dict[str, Any]:
        splits = {split: uri(front, f"{data}/{split}") for split in ("train", "validation", "test")}
        sections["data"] = {**splits, **sections.get("data", {})}
        return run(Path("unused"), **{**sections, "run": {"path": uri(front, name)}})

    return clean


def fetched(front: Between, name: str, folder: Path) -> Path:
    """The run folder as a local one."""
    files, place = resolve(uri(front, name))
    for info in files.get_file_info(fs.FileSelector(place, recursive=True)):
        if info.is_file:
            to = folder / os.path.relpath(info.path, place)
            to.parent.mkdir(parents=True, exist_ok=True)
            fs.copy_files(info.path, str(to), source_filesystem=files)
    return folder


@pytest.mark.long
def test_a_run_in_a_store_that_is_slow_and_refuses_now_and_then_has_the_result_of_one_on_a_disk(
    in_store: Run, undisturbed: Undisturbed, front: Between, tmp_path: Path
) -> None:
    draw = random.Random(0)

    def unsteady(method: str, path: str) -> str:
        time.sleep(0.002)
        return "503" if draw.random() < 0.05 else "pass"  # as S3 gives it out for SlowDown

    front.mood = unsteady
    in_store("whole")
    assert front.moods.count("503") > 10
    front.heal()
    local = fetched(front, "whole", tmp_path / "whole")
    assert_same_result(local, undisturbed()["run"])
    assert list(local.rglob("*.tmp")) == []
    # the key and the secret are in no file
    for path in local.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    # again: it is finished, and known as such
    front.moods.clear()
    in_store("whole")
    assert len(front.moods) < 200


@pytest.mark.parametrize(("length", "refusals"), [(0, 1), (100, 3), (100_000, 1)])
def test_a_refusal_of_what_is_shorter_than_the_refusal_is_borne_too(front: Between, length: int, refusals: int) -> None:
    folder = RunFolder(uri(front, "short"))
    content, table = b"a" * length, pa.table({"number": range(length)})
    folder.write_bytes(folder.path("bytes"), content)
    folder.write_row_groups(folder.path("table"), [table, table])

    def read(reading: Callable[[], Any]) -> Any:
        answers = iter(["503"] * refusals)
        front.mood = lambda method, path: next(answers, "pass") if method == "GET" else "pass"
        found = reading()
        assert next(answers, None) is None, "nothing was refused"
        front.heal()
        return found

    if length:
        assert read(lambda: folder.read_bytes(folder.path("bytes"))) == content
    assert read(lambda: folder.read_table(folder.path("table"))) == pa.concat_tables([table, table])
    assert read(lambda: list(folder.row_groups(folder.path("table")))) == [table, table]


@pytest.mark.long
def test_a_store_that_goes_away_in_a_round_ends_the_run_with_one_error_and_it_goes_on_once_it_is_back(
    in_store: Run, undisturbed: Undisturbed, front: Between, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    select = selecting.select

    def failing(run: Any, state: Any, scored: Any, **options: Any) -> Any:
        if state.number == 1:
            front.mood = lambda method, path: "gone"
        return select(run, state, scored, **options)

    with monkeypatch.context() as patch:
        patch.setattr(selecting, "select", failing)
        # the command line prints either in one sentence: tests/test_cli.py
        with pytest.raises((PosttrainError, OSError), match=r"gone/rounds/0002/.*") as caught:
            in_store("gone")
    assert SECRET not in str(caught.value)
    front.heal()
    in_store("gone")
    assert_same_result(fetched(front, "gone", tmp_path / "gone"), undisturbed()["run"])


def test_a_bucket_that_is_not_there_is_named_before_any_work(in_store: Run, front: Between) -> None:
    elsewhere = uri(front, "digits/train").replace("@bucket/", "@no-such-bucket/")
    with pytest.raises(DataError, match=r"s3://.*@no-such-bucket/digits/train.*: no such file or folder"):
        in_store("refused", data={"train": elsewhere})


def test_a_store_that_does_not_answer_is_named_before_any_work(in_store: Run, front: Between) -> None:
    front.mood = lambda method, path: "gone"
    with pytest.raises((PosttrainError, OSError), match=r"refused/run\.yaml.* in bucket 'bucket'") as caught:
        in_store("refused")
    assert SECRET not in str(caught.value)


def test_a_second_run_on_the_folder_is_refused_at_once(in_store: Run, front: Between) -> None:
    with lock.run_lock(RunFolder(uri(front, "held"))), pytest.raises(LockedError, match="another run is at work there"):
        in_store("held")
