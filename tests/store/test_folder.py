from __future__ import annotations

import gc
import pickle
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from pyarrow import fs

from posttrain.errors import RunFolderError
from posttrain.store import folder as folders
from posttrain.store.folder import RunFolder, resolve


class DiedError(Exception):
    """What a writer dies of in these tests."""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunFolder:
    """A run folder that is not on a local disk: fsspec's memory, behind pyarrow."""
    memory = fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem("memory")))
    monkeypatch.setattr(folders, "resolve", lambda location: (memory, str(tmp_path)))
    return RunFolder("memory://run")


@pytest.fixture(params=["folder", "remote"])
def either(request: pytest.FixtureRequest) -> RunFolder:
    return request.getfixturevalue(request.param)


def files_in(folder: RunFolder) -> list[str]:
    selector = fs.FileSelector(folder.path(), recursive=True, allow_not_found=True)
    return [f.path for f in folder.files.get_file_info(selector) if f.type == fs.FileType.File]


def test_a_writer_that_dies_leaves_nothing_behind(either: RunFolder):
    path = either.round(1, "scores.parquet")
    with pytest.raises(DiedError), either.writing(path) as stream:
        stream.write(b"half of it")
        raise DiedError
    del stream
    gc.collect()  # a stream that is collected is closed, and closing publishes an object
    assert files_in(either) == []
    assert not either.exists(path)


def test_a_writer_that_dies_leaves_what_was_there(either: RunFolder):
    path = either.round(1, "round.json")
    either.write_bytes(path, b"whole")
    with pytest.raises(DiedError), either.writing(path) as stream:
        stream.write(b"half")
        raise DiedError
    del stream
    gc.collect()
    assert either.read_bytes(path) == b"whole"
    assert len(files_in(either)) == 1


def test_an_interrupt_from_the_keyboard_leaves_nothing_behind_either(folder: RunFolder):
    with pytest.raises(KeyboardInterrupt), folder.writing(folder.path("run.yaml")) as stream:
        stream.write(b"half")
        raise KeyboardInterrupt
    assert files_in(folder) == []


def test_nothing_is_to_be_seen_at_the_path_before_all_is_written(folder: RunFolder):
    path = folder.path("deep", "er", "file")
    with folder.writing(path) as stream:
        stream.write(b"some")
        stream.flush()
        assert not folder.exists(path)
    assert folder.read_bytes(path) == b"some"


def test_what_is_written_again_replaces_what_was_there(either: RunFolder):
    for content in (b"first, and longer", b"second"):
        either.write_bytes(either.path("file"), content)
    assert either.read_bytes(either.path("file")) == b"second"


def test_json_and_tables_come_back_as_they_were(either: RunFolder):
    content = {"number": 3, "nested": {"é": [1.5, None]}}
    either.write_json(either.path("a", "b.json"), content)
    assert either.read_json(either.path("a", "b.json")) == content
    table = pa.table({"x": [1, 2, 3], "y": ["a", "b", "c"]})
    either.write_table(either.path("t.parquet"), table)
    assert either.read_table(either.path("t.parquet")).equals(table)
    assert either.read_table(either.path("t.parquet"), ["y"]).equals(table.select(["y"]))


def test_row_groups_come_one_at_a_time_and_in_order(folder: RunFolder):
    import pyarrow.parquet as pq

    with folder.writing(folder.path("t.parquet")) as stream:
        pq.write_table(pa.table({"x": range(10), "y": range(10)}), stream, row_group_size=4)
    groups = list(folder.row_groups(folder.path("t.parquet"), ["x"]))
    assert [g.num_rows for g in groups] == [4, 4, 2]
    assert pa.concat_tables(groups)["x"].to_pylist() == list(range(10))


def test_a_run_folder_has_one_place_for_everything(folder: RunFolder, tmp_path: Path):
    root = f"{tmp_path}/run"
    assert folder.features("0a1b", "train", 12) == f"{root}/features/0a1b/train/00012.parquet"
    assert folder.round(7, "scores.parquet") == f"{root}/rounds/0007/scores.parquet"
    assert folder.checkpoint(7) == f"{root}/rounds/0007/checkpoint/model.safetensors"
    assert folder.is_local and folder.local == tmp_path / "run"


def test_a_relative_path_and_the_home_directory_and_a_file_uri_name_local_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for location in ("run", "~/run", f"file://{tmp_path}/run", str(tmp_path / "run") + "/"):
        folder = RunFolder(location)
        assert folder.is_local and folder.path() == f"{tmp_path}/run", location


def test_a_run_folder_can_be_sent_to_workers(folder: RunFolder):
    again = pickle.loads(pickle.dumps(folder))
    again.write_bytes(again.path("file"), b"x")
    assert folder.read_bytes(folder.path("file")) == b"x"


def test_a_scheme_that_is_not_known_is_refused_with_those_that_are():
    with pytest.raises(RunFolderError, match=r"nosuch://bucket/run.*s3://, gs:// or file://"):
        resolve("nosuch://bucket/run")


def test_a_folder_is_empty_until_something_is_in_it(folder: RunFolder):
    assert folder.is_empty()  # not there at all
    folder.local.mkdir()
    assert folder.is_empty()
    folder.write_bytes(folder.path("file"), b"")
    assert not folder.is_empty()


def test_a_file_in_the_place_of_the_run_folder_is_refused(folder: RunFolder):
    folder.local.write_text("")
    with pytest.raises(RunFolderError, match=r"run\.path = .*is a file"):
        folder.is_empty()


def test_a_directory_is_no_file(folder: RunFolder):
    (folder.local / "cleaned").mkdir(parents=True)
    assert not folder.exists(folder.path("cleaned"))
    assert not folder.exists(folder.path("nothing"))


def test_features_of_the_shared_backbone_lie_where_it_says_and_are_never_deleted(either: RunFolder):
    shared = f"{either.path()}-search/features/abcd"
    folder = RunFolder(either.location, shared)
    assert folder.features("abcd", "train", 3) == f"{shared}/train/00003.parquet"
    assert folder.features("ef01", "train", 3) == folder.path("features", "ef01", "train", "00003.parquet")
    for backbone in ("abcd", "ef01"):
        folder.write_bytes(folder.features(backbone, "train", 3), b"x")
    folder.keep_only_features("")
    assert folder.exists(folder.features("abcd", "train", 3))
    assert not folder.exists(folder.features("ef01", "train", 3))
    assert pickle.loads(pickle.dumps(folder)) == folder


def test_what_killed_writers_left_goes_and_nothing_else(folder: RunFolder):
    folder.write_bytes(folder.path("cleaned", "part.parquet"), b"whole")
    for name in ("cleaned/part.parquet.0123abcd.tmp", "rounds/0001/scores.parquet.ffffffff.tmp", "notes.tmp"):
        path = folder.local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    folder.clear_half_written()
    left = sorted(str(path.relative_to(folder.local)) for path in folder.local.rglob("*") if path.is_file())
    assert left == ["cleaned/part.parquet", "notes.tmp"]


def test_a_folder_is_deleted_with_all_that_is_in_it_and_one_that_is_not_there_is_no_error(either: RunFolder):
    either.write_bytes(either.path("training", "attempt", "state.json"), b"{}")
    either.write_bytes(either.path("run.yaml"), b"kept")
    for _ in range(2):
        either.delete_folder(either.path("training"))
        assert files_in(either) == [either.path("run.yaml")]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_a_folder_in_which_nobody_can_make_files_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.access", lambda path, mode: True)  # as it is for root
    with pytest.raises(RunFolderError, match=r"run\.path = /proc/foo cannot be written: /proc takes no files"):
        RunFolder("/proc/foo").refuse_unwritable()


def test_a_folder_that_can_be_written_to_is_left_as_it_is(folder: RunFolder):
    folder.refuse_unwritable()
    assert not folder.local.exists() and not list(folder.local.parent.iterdir())
