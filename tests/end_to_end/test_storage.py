"""Disks and object stores that fail: one clear error, nothing corrupted, and the same command goes on once mended."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from small_data import Digits, assert_same_result, interrupted_after, png, rounds

import posttrain.runs.inputs
from posttrain.errors import DataError, LockedError, PosttrainError, RunFolderError, StepError
from posttrain.runs import select as selecting
from posttrain.store import lock
from posttrain.store.folder import RunFolder

pytestmark = pytest.mark.ray

Run = Callable[..., dict[str, Any]]
Undisturbed = Callable[..., dict[str, Any]]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs a disk of its own, and may not mount one: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


@pytest.mark.long
def test_a_full_disk_ends_a_run_with_its_path_and_with_room_it_goes_on(
    run: Run, undisturbed: Undisturbed, disk: Path
) -> None:
    what = (
        rf"{disk}/run/.* cannot be written \(No space left on device\); fix the cause and start the same command again"
    )
    for size in ("64k", "600k"):
        remount(disk, f"size={size}")
        with pytest.raises(StepError, match=what):
            run(disk / "run")
    remount(disk, "size=64m")
    run(disk / "run")
    assert list((disk / "run").rglob("*.tmp")) == []
    assert_same_result(disk / "run", undisturbed()["run"])


@pytest.mark.long
def test_a_disk_that_becomes_read_only_ends_a_run_and_made_writable_it_goes_on(
    run: Run, undisturbed: Undisturbed, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    select = selecting.select

    def failing(run: Any, state: Any, scored: Any, **options: Any) -> Any:
        if state.number == 1:
            remount(disk, "ro")
        return select(run, state, scored, **options)

    with monkeypatch.context() as patch:
        patch.setattr(selecting, "select", failing)
        with pytest.raises(PosttrainError, match=r"Read-only file system"):
            run(disk / "run")
    with pytest.raises(RunFolderError, match=rf"{disk}/run may not be written to"):
        run(disk / "run")
    remount(disk, "rw")
    assert len(rounds(disk / "run")) == 2
    run(disk / "run")
    assert_same_result(disk / "run", undisturbed()["run"])


@pytest.mark.long
def test_a_folder_that_may_not_be_written_to_is_named(run: Run, undisturbed: Undisturbed, tmp_path: Path) -> None:
    with interrupted_after("commit", call=1):
        run(tmp_path / "run")
    # root may write everywhere but here
    rounds_of = tmp_path / "run" / "rounds"
    done = subprocess.run(["chattr", "+i", rounds_of], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs a file system and rights for chattr: {done.stderr.strip()}")
    try:
        with pytest.raises(StepError, match=rf"{rounds_of}/0002.* cannot be written \(.*not permitted"):
            run(tmp_path / "run")
    finally:
        subprocess.run(["chattr", "-i", rounds_of], check=True)
    run(tmp_path / "run")
    assert_same_result(tmp_path / "run", undisturbed()["run"])


def test_data_that_may_not_be_read_are_named_before_any_work(tmp_path: Path, digits: Digits) -> None:
    if os.getuid():
        pytest.skip("needs root, to become somebody else")
    # beneath pytest's own folders nobody else gets anywhere
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    file = folder / "a.parquet"
    pq.write_table(digits.table("train"), file)
    file.chmod(0o600)
    code = """
import os, sys
from posttrain.data.sources import ParquetSource, list_source
from posttrain.errors import DataError
os.setgid(65534), os.setuid(65534)
try:
    list_source(ParquetSource((sys.argv[1],), "id", "image", "label"))
except DataError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True).stdout
    shutil.rmtree(folder)
    assert str(file) in said and "Permission denied" in said


@pytest.mark.parametrize(
    "how", ["vanishes", *(pytest.param(how, marks=pytest.mark.long) for how in ("cut short", "image vanishes"))]
)
def test_a_file_that_changes_between_listing_and_reading_is_named(
    run: Run, digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    data: dict[str, Any] = {}
    if how == "image vanishes":
        for split, rows in digits.splits.items():
            for i in rows:
                path = tmp_path / split / f"{digits.given[i]}" / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(digits.images[i]))
        data = {"source": "folder", "true_label": None, **{split: str(tmp_path / split) for split in digits.splits}}
        file = next(tmp_path.glob("train/3/*.png"))
    else:
        digits.write(tmp_path)
        data = {split: str(tmp_path / split) for split in digits.splits}
        file = tmp_path / "train" / "b.parquet"
    prepare = posttrain.runs.inputs.prepare

    def then_broken(config: Any) -> Any:
        inputs = prepare(config)
        file.unlink() if "vanishes" in how else os.truncate(file, file.stat().st_size // 2)
        return inputs

    with monkeypatch.context() as patch:
        patch.setattr(posttrain.runs.inputs, "prepare", then_broken)
        with pytest.raises(PosttrainError, match=rf"{file}|{file.parent.parent}") as refused:
            run(tmp_path / "run", data=data)
    assert len(str(refused.value)) < 500
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_file_that_is_cut_short_between_two_starts_is_refused(run: Run, digits: Digits, tmp_path: Path) -> None:
    digits.write(tmp_path)
    data = {split: str(tmp_path / split) for split in digits.splits}
    with interrupted_after("commit", call=1):
        run(tmp_path / "run", data=data)
    file = tmp_path / "train" / "b.parquet"
    whole = file.read_bytes()
    os.truncate(file, len(whole) // 2)
    with pytest.raises(DataError, match=rf"{tmp_path}/train.*not readable as Parquet"):
        run(tmp_path / "run", data=data)
    file.write_bytes(whole)
    assert run(tmp_path / "run", data=data, removal={"max_rounds": 3})["rounds"] == 3


def test_a_second_process_on_a_run_folder_at_work_is_refused_at_once(run: Run, tmp_path: Path) -> None:
    with lock.run_lock(RunFolder(str(tmp_path / "run"))):
        with pytest.raises(
            LockedError, match=rf"{tmp_path}/run: another run is at work there \(process {os.getpid()} on"
        ):
            run(tmp_path / "run")
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_what_a_committed_round_vouches_for_is_on_the_disk_before_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lasting: set[tuple[int, int]] = set()
    kept: list[str] = []
    committed: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded(descriptor: int) -> None:
        fsync(descriptor)
        found = os.fstat(descriptor)
        lasting.add((found.st_ino, found.st_mtime_ns))

    def lasts(path: Path) -> bool:
        found = path.stat()
        return (found.st_ino, found.st_mtime_ns) in lasting

    def renamed(source: str, target: str) -> None:
        if target.endswith(("round.json", "summary.json")):
            beside = [p for p in Path(target).parent.rglob("*") if not p.name.endswith((".tmp", ".db"))]
            # nobody vouches for what is made again where it is gone
            mine = [p for p in beside if not {"features", "scoring"} & set(p.parts)]
            mine = [p for p in mine if p.parent.name not in (".lock", "outbox")]
            assert all(lasts(path) for path in mine if path.is_file()), [p for p in mine if not lasts(p)]
            kept.extend(path.name for path in mine)
            committed.append(Path(target).parent.name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(os, "replace", renamed)
    # what is written in other processes is not recorded here
    run(tmp_path / "run", removal={"max_rounds": 1}, results={"cleaned": "manifest"})
    assert committed == ["0000", "0001", "run"]
    assert {"removed.parquet", "scores.parquet", "model.safetensors", "probes.json", "manifest.parquet"} <= set(kept)
