from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import LockedError, StepError
from posttrain.store import lock
from posttrain.store.folder import RunFolder
from posttrain.store.lock import LockFile, acquire, job_lock, run_lock, this_process


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "job"))


def lock_files(folder: RunFolder) -> list[Path]:
    return sorted(Path(folder.path("lock")).glob("*.json"))


def test_a_lock_is_given_back_also_after_an_error(folder: RunFolder) -> None:
    for error in (None, KeyError("x")):
        try:
            with job_lock(folder, lease_s=60, wait_s=0) as mine:
                mine.assert_held()
                assert len(lock_files(folder)) == 1
                if error:
                    raise error
        except KeyError:
            pass
        assert lock_files(folder) == []


def test_a_second_one_is_refused_at_once_and_told_who_is_there(folder: RunFolder) -> None:
    with job_lock(folder, lease_s=60, wait_s=0) as mine:
        began = time.monotonic()
        with (
            pytest.raises(LockedError, match=rf"process {os.getpid()} on .*, since 20\d\d-.* UTC.*job\.lock_wait_s"),
            job_lock(folder, lease_s=60, wait_s=0),
        ):
            raise AssertionError
        assert time.monotonic() - began < 5
        mine.assert_held()
        assert len(lock_files(folder)) == 1


def test_a_second_one_waits_and_gets_it(folder: RunFolder) -> None:
    first = acquire(folder, lease_s=60, wait_s=0)
    threading.Timer(0.5, first.release).start()
    with job_lock(folder, lease_s=60, wait_s=30) as second:
        second.assert_held()
    with pytest.raises(StepError, match="its lock file is gone"):
        first.assert_held()


def seeds(default: int, count: int) -> list[Any]:
    """Seeds of which all but the first few are for long runs."""
    return [*range(default), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(default, count))]


def in_threads(work: Callable[[], None], count: int) -> None:
    """The work in so many threads at once, until all have ended."""
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("seed", seeds(1, 4))
def test_of_many_threads_one_at_a_time_is_at_work_and_each_gets_its_turn(folder: RunFolder, seed: int) -> None:
    inside, most, done, errors = 0, 0, 0, []
    mutex = threading.Lock()

    def work() -> None:
        nonlocal inside, most, done
        try:
            with job_lock(folder, lease_s=30, wait_s=60) as mine:
                with mutex:
                    inside += 1
                    most = max(most, inside)
                mine.assert_held()
                time.sleep(0.005 * (seed % 3))
                with mutex:
                    inside -= 1
                    done += 1
        except BaseException as error:
            errors.append(error)

    in_threads(work, 5)
    assert (errors, most, done) == ([], 1, 5)
    assert lock_files(folder) == []


def test_of_many_that_start_together_and_do_not_wait_exactly_one_gets_it(tmp_path: Path) -> None:
    """Also where they make the folder together: pyarrow's listing of it then failed in 3 of 100 such starts."""
    together = threading.Barrier(4)
    got: list[lock.Lock] = []
    refused: list[LockedError] = []

    def work() -> None:
        together.wait()
        try:
            got.append(acquire(folder, lease_s=30, wait_s=0))
        except LockedError as error:
            refused.append(error)

    for number in range(100):
        folder = RunFolder(str(tmp_path / f"{number}"))
        got.clear()
        refused.clear()
        in_threads(work, 4)
        assert (len(got), len(refused)) == (1, 3)
        got[0].assert_held()
        got[0].release()


# A process that appends to a file while it holds the lock: a line at its beginning, one at its end.
RACER = """
import sys, time
from posttrain.store.folder import RunFolder
from posttrain.store.lock import job_lock
folder, log, number = sys.argv[1:]
for _ in range(4):
    with job_lock(RunFolder(folder), lease_s=30, wait_s=60) as mine:
        mine.assert_held()
        for what in ("in", "out"):
            with open(log, "a") as stream:
                stream.write(f"{what} {number}\\n")
            time.sleep(0.01)
"""


def test_processes_take_turns(folder: RunFolder, tmp_path: Path) -> None:
    log = tmp_path / "log"
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER, folder.location, str(log), str(number)]) for number in range(3)
    ]
    assert [racer.wait(timeout=120) for racer in racers] == [0, 0, 0]
    lines = log.read_text().split("\n")[:-1]
    assert len(lines) == 3 * 4 * 2
    for came, went in zip(lines[::2], lines[1::2], strict=True):
        assert came.split() == ["in", went.split()[1]] and went.startswith("out")


HOLDER = """
import sys, time
from posttrain.store.folder import RunFolder
from posttrain.store.lock import acquire
acquire(RunFolder(sys.argv[1]), lease_s=3600, wait_s=0)
print("held", flush=True)
time.sleep(600)
"""


def test_the_lock_of_a_process_that_was_killed_is_taken_over_at_once(folder: RunFolder) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, folder.location], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(LockedError, match=f"process {holder.pid}"):
        acquire(folder, lease_s=60, wait_s=0)
    # not waited for: it stays in the table of processes as one that has ended
    os.kill(holder.pid, signal.SIGKILL)
    with job_lock(folder, lease_s=60, wait_s=30) as mine:
        mine.assert_held()
        assert len(lock_files(folder)) == 1
    holder.stdout.close()
    holder.wait()


def elsewhere(file: LockFile) -> LockFile:
    return replace(file, process=replace(file.process, host="another"))


def a_lock_file(**changes: object) -> LockFile:
    now = time.time()
    return replace(LockFile("other", this_process(), now, now + 60, now, 1), **changes)  # pyright: ignore[reportArgumentType]


def put(folder: RunFolder, file: LockFile) -> None:
    folder.write_json(folder.path("lock", f"{file.token}.json"), asdict(file))


def test_a_holder_on_another_machine_is_taken_over_only_once_its_lock_and_the_clocks_allowance_are_over(
    folder: RunFolder,
) -> None:
    now = time.time()
    put(folder, elsewhere(a_lock_file(expires_at=now - 1)))
    with pytest.raises(LockedError, match="on another"):
        acquire(folder, lease_s=60, wait_s=0, skew_s=5)
    put(folder, elsewhere(a_lock_file(expires_at=now - 10)))
    with job_lock(folder, lease_s=60, wait_s=0, skew_s=5) as mine:
        mine.assert_held()
        assert len(lock_files(folder)) == 1


def test_a_later_process_with_the_same_number_is_another(folder: RunFolder) -> None:
    put(folder, a_lock_file(process=replace(this_process(), started="0")))
    with job_lock(folder, lease_s=60, wait_s=0) as mine:
        mine.assert_held()


def test_a_lock_lasts_longer_than_its_length_while_its_holder_lives(folder: RunFolder) -> None:
    with job_lock(folder, lease_s=1, wait_s=0, skew_s=0) as mine:
        time.sleep(2.5)
        mine.assert_held()
        with pytest.raises(LockedError):
            acquire(folder, lease_s=1, wait_s=0, skew_s=0)


def test_a_holder_that_was_too_slow_finds_out_before_it_writes_and_does_not_come_back(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a whole machine that stops: no thread of it renews anything
    monkeypatch.setattr(lock.Lock, "_renew", lambda self: None)
    slow = acquire(folder, lease_s=1, wait_s=0, skew_s=0)
    monkeypatch.undo()
    with job_lock(folder, lease_s=60, wait_s=30, skew_s=0) as successor:
        for _ in range(2):
            with pytest.raises(StepError, match="expired"):
                slow.assert_held()
        # what a write that was under way when the machine stopped would leave behind
        slow._files.write(replace(slow._mine, expires_at=time.time() + 60))
        slow._lost = ""
        slow._mine = replace(slow._mine, expires_at=time.time() + 60)
        with pytest.raises(StepError, match="has taken it over"):
            slow.assert_held()
        successor.assert_held()


def test_a_machine_that_slept_longer_than_the_lock_lasts_goes_on_if_nobody_came_meanwhile(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock.Lock, "_renew", lambda self: None)
    asleep = acquire(folder, lease_s=0.1, wait_s=0, skew_s=0)
    time.sleep(0.2)
    asleep.assert_held()
    with pytest.raises(LockedError):
        acquire(folder, lease_s=60, wait_s=0, skew_s=60)
    time.sleep(0.2)
    with job_lock(folder, lease_s=60, wait_s=0, skew_s=0):
        pass
    # one came and went: what it left behind, the one that slept knows nothing of
    with pytest.raises(StepError, match="expired"):
        asleep.assert_held()


def test_a_run_folder_is_for_one_process_and_looks_as_before_once_it_is_left(folder: RunFolder) -> None:
    nested = RunFolder(folder.path("deep", "run"))
    with run_lock(nested) as mine:
        mine.assert_held()
        assert nested.is_empty()
        began = time.monotonic()
        with (
            pytest.raises(LockedError, match=rf"another run is at work there \(process {os.getpid()} on .*run\.path"),
            run_lock(nested),
        ):
            raise AssertionError
        assert time.monotonic() - began < 5
    assert not folder.local.exists()
    folder.write_bytes(folder.path("run.yaml"), b"begun")
    with pytest.raises(KeyError), run_lock(folder):
        raise KeyError
    assert [path.name for path in folder.local.iterdir()] == ["run.yaml"]


def test_what_a_killed_writer_left_half_written_is_cleared_away_and_nothing_else(folder: RunFolder) -> None:
    half = Path(folder.round(2, "scores.parquet.0123abcd.tmp"))
    others = [Path(folder.path(name)) for name in ("notes.tmp", "a.0123abcd.tmp.txt", "lock/x.json.0123abcd.tmp")]
    for path in (half, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    with run_lock(folder):
        assert not half.exists()
        assert all(path.exists() for path in others)


def test_a_lock_file_that_cannot_be_read_is_not_passed_over(folder: RunFolder) -> None:
    folder.write_json(folder.path("lock", "x.json"), {"token": "x"})
    with pytest.raises(LockedError, match=r"x\.json is a lock file that this version"):
        acquire(folder, lease_s=60, wait_s=0)
    assert len(lock_files(folder)) == 1


@pytest.mark.parametrize("moment", ["before", "after"])
def test_whoever_lists_last_sees_the_other(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """A rival writes its file in the worst moments: just before our listing, and just after it."""
    valid: Callable[[lock._LockFiles], list[LockFile]] = lock._LockFiles.valid
    rival = elsewhere(a_lock_file(token="rival", requested_at=0.0, held_since=0.0))
    wrote = False

    def interrupted(self: lock._LockFiles) -> list[LockFile]:
        nonlocal wrote
        if moment == "before" and not wrote:
            wrote = True
            put(folder, rival)
        found = valid(self)
        if moment == "after" and not wrote:
            wrote = True
            put(folder, replace(rival, held_since=None))
            # what the rival sees, as it lists after its own write
            assert any(file.token != "rival" for file in valid(self))
        return found

    monkeypatch.setattr(lock._LockFiles, "valid", interrupted)
    if moment == "before":
        with pytest.raises(LockedError):
            acquire(folder, lease_s=60, wait_s=0)
    else:
        acquire(folder, lease_s=60, wait_s=0).release()
    assert json.loads(Path(folder.path("lock", "rival.json")).read_text())["token"] == "rival"


class _InMemory:
    """Lock files as an object store holds them: each call takes a while, and all that begin later see its effect."""

    def __init__(self, seed: int) -> None:
        self.folder = RunFolder("memory")
        self.there: dict[str, LockFile] = {}
        self.draw = random.Random(seed)

    def _while(self) -> None:
        time.sleep(self.draw.random() * 0.004)

    def write(self, file: LockFile) -> None:
        self._while()
        self.there[file.token] = file
        self._while()

    def remove(self, file: LockFile) -> None:
        self._while()
        self.there.pop(file.token, None)

    def all(self) -> list[LockFile]:
        self._while()
        found = list(self.there.values())
        self._while()
        return found

    valid = all

    def delete_invalid(self) -> None:
        pass


@pytest.mark.parametrize("seed", seeds(2, 10))
def test_in_a_slow_store_one_at_a_time_holds_the_lock_and_one_of_those_that_do_not_wait_gets_it(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    store = _InMemory(seed)
    monkeypatch.setattr(lock, "_LockFiles", lambda folder, skew_s, place: store)
    holding = threading.Lock()
    got, overlaps, refused = [], 0, 0

    def work(wait_s: float) -> None:
        nonlocal overlaps, refused
        time.sleep(random.random() * 0.01)
        try:
            mine = acquire(store.folder, lease_s=30, wait_s=wait_s)
        except LockedError:
            refused += 1
            return
        alone = holding.acquire(blocking=False)
        overlaps += not alone
        got.append(mine)
        mine.assert_held()
        time.sleep(0.03 if wait_s else 0.3)
        if alone:
            holding.release()
        mine.release()

    for wait_s, expected in ((0.0, 1), (30.0, 4)):
        got.clear()
        threads = [threading.Thread(target=work, args=(wait_s,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (overlaps, len(got)) == (0, expected)
    assert refused == 3 and store.there == {}
