from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posttrain.data.listing import File, changed, image_files, list_files, with_content
from posttrain.errors import DataError


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for name in ("train/a.parquet", "train/deep/b.pq", "test.parquet", "train/note.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"x": [name]}), path)
    return tmp_path


def listed(folder: Path) -> list[File]:
    return list_files("parquet", {"train": (str(folder / "train"),), "test": (str(folder / "test.parquet"),)})


def known(files: list[File]) -> dict[tuple[str, str], File]:
    return {(file.split, file.path): file for file in with_content(files, local=True)}


def names(files: list[File]) -> list[str]:
    return [f"{file.split}:{Path(file.path).name}" for file in files]


def test_the_files_of_every_split_are_found_with_size_and_time(shards: Path) -> None:
    found = listed(shards)
    assert names(found) == ["train:a.parquet", "train:b.pq", "test:test.parquet"]
    for file in found:
        status = Path(file.path).stat()
        assert (file.size, file.mtime_ns) == (status.st_size, status.st_mtime_ns)


def test_images_are_found_below_their_classes(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/more/2.JPG", "dog/3.webp", "dog/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert names(list_files("folder", {"train": (str(tmp_path),)})) == ["train:1.png", "train:2.JPG", "train:3.webp"]


def test_what_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, where, why in [
        ("parquet", "nowhere", "no such file or folder"),
        ("parquet", "empty", "holds no .parquet file"),
        ("folder", "nowhere", "no such folder"),
        ("folder", "empty", "holds no image"),
    ]:
        with pytest.raises(DataError, match=f"{where}: {why}"):
            list_files(source, {"train": (str(tmp_path / where),)})


def test_new_and_rewritten_files_are_news_and_others_are_not(shards: Path) -> None:
    before = known(listed(shards))
    assert changed(listed(shards), before, local=True) == []
    pq.write_table(pa.table({"x": ["new"]}), shards / "train" / "c.parquet")
    pq.write_table(pa.table({"x": ["longer than before"]}), shards / "test.parquet")
    (shards / "train" / "deep" / "b.pq").unlink()
    assert names(changed(listed(shards), before, local=True)) == ["train:c.parquet", "test:test.parquet"]


def test_a_file_that_was_only_copied_anew_is_no_news_but_the_same_number_of_other_bytes_is(shards: Path) -> None:
    before = known(listed(shards))
    path = shards / "train" / "a.parquet"
    os.utime(path, ns=(1, 1))
    assert changed(listed(shards), before, local=True) == []
    # where contents are not read, the time has to do
    assert names(changed(listed(shards), before, local=False)) == ["train:a.parquet"]
    path.write_bytes(path.read_bytes()[::-1])
    assert names(changed(listed(shards), before, local=True)) == ["train:a.parquet"]


def test_a_file_that_is_rewritten_while_a_run_is_at_work_is_news_at_the_next_start(shards: Path) -> None:
    seen = listed(shards)
    path = shards / "train" / "a.parquet"
    path.write_bytes(path.read_bytes()[::-1])  # as long as before
    before = {(file.split, file.path): file for file in with_content(seen, local=True)}
    assert names(changed(listed(shards), before, local=True)) == ["train:a.parquet"]


def test_a_file_whose_content_was_never_read_counts_by_its_time(shards: Path) -> None:
    before = {key: replace(file, content="") for key, file in known(listed(shards)).items()}
    os.utime(shards / "test.parquet", ns=(1, 1))
    assert names(changed(listed(shards), before, local=True)) == ["test:test.parquet"]


def test_the_same_file_in_another_set_is_news(shards: Path) -> None:
    before = known(list_files("parquet", {"train": (str(shards / "train"),)}))
    now = list_files("parquet", {"train": (str(shards / "train"),), "validation": (str(shards / "train"),)})
    assert names(changed(now, before, local=True)) == ["validation:a.parquet", "validation:b.pq"]


def test_links_to_images_and_folders_are_followed_unless_they_lead_back(tmp_path: Path) -> None:
    (tmp_path / "store" / "more").mkdir(parents=True)
    for name in ("a.png", "more/b.png"):
        (tmp_path / "store" / name).write_bytes(b"x")
    cat = tmp_path / "classes" / "cat"
    cat.mkdir(parents=True)
    (cat / "linked.png").symlink_to(tmp_path / "store" / "a.png")
    (cat / "folder").symlink_to(tmp_path / "store" / "more")
    _, found, _ = image_files(str(tmp_path / "classes"))
    assert [Path(info.path).relative_to(cat).as_posix() for info in found] == ["folder/b.png", "linked.png"]
    # behind a link, too
    (tmp_path / "store" / "more" / "again").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "up").symlink_to(tmp_path / "store" / "more")
    with pytest.raises(DataError, match=r"is a link that leads back to .*; take it out"):
        image_files(str(tmp_path / "classes"))


def test_what_is_named_as_an_image_and_is_none_is_not_left_out_in_silence(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_bytes(b"x")
    (tmp_path / "cat" / "b.png").symlink_to("nowhere.png")
    with pytest.raises(DataError, match=r"cat/b\.png: is a link to .*nowhere\.png, which is not there"):
        image_files(str(tmp_path))
    (tmp_path / "cat" / "b.png").unlink()
    os.mkfifo(tmp_path / "cat" / "c.png")
    with pytest.raises(DataError, match=r"cat/c\.png: is named as an image and is no file"):
        image_files(str(tmp_path))


def test_all_formats_count_by_their_names_and_other_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    for name in ("a.PNG", "b.avif", "c.jp2", "d.tga", "notes.txt", ".hidden", "e.heic"):
        (tmp_path / "cat" / name).write_bytes(b"x")
    _, images, others = image_files(str(tmp_path))
    assert [info.base_name for info in images] == ["a.PNG", "b.avif", "c.jp2", "d.tga"]
    assert [Path(path).name for path in others] == ["e.heic", "notes.txt"]
