"""An exclusive lock on the folder of a job or run, for processes on any machine, on a disk or in an object store.

Kept instead of a library: file locks (`filelock`) are not reliable between hosts of a shared file system and do not
exist in object stores. A conditional write (`obstore`) would bring a second object-store client with its own
credentials, and renewal, takeover and `assert_held` would still have to be written around it.

pyarrow has neither locks nor conditional writes. What every store has: a file that was written is in every listing
that begins afterwards. So each process **first writes a lock file of its own, and then lists all lock files**. It holds
the lock only if the listing shows no other valid one; otherwise it withdraws its own, or waits.

Two processes never hold the lock: let A and B both have listed after their own writes, A first. If B's file had been
written before A's listing, A would have seen it. So B wrote after A's listing, hence after A's write, and B's listing,
later still, shows A's file. At most one of them saw no other.

Of several processes that meet while none holds the lock, the one that asked first stays and waits until the others have
withdrawn, so that one of them gets it.

A thread renews the lock file; without renewal it expires, so that the lock of a process that died or hangs is taken
over. A process that was only slow notices before it makes anything permanent (`assert_held`): its file was deleted, or
there is a newer holder. If neither is so (the machine slept, and nobody else came), it renews its file: it writes first
and then lists, as before. Clocks of different machines may differ by `_SKEW_S`. What remains is the moment between
`assert_held` and the write that follows: no expiring lock can protect it without help from the store written to.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from posttrain.errors import LockedError, PosttrainError, StepError
from posttrain.store.folder import RunFolder

_SKEW_S = 5.0
_RENEWALS = 4
"""Renewals before a lock file would expire."""
_RUN_LEASE_S = 120.0
_RELEASED: set[str] = set()
"""Tokens of this process's lock files that are released, even if they could not be deleted."""
_JOB_LOCK = "lock"
"""Folder of the lock files in a job's folder."""
_RUN_LOCK = ".lock"
"""Folder of the lock files in a run folder: hidden, so that a run folder with nothing else in it counts as empty."""


@dataclass(frozen=True)
class Process:
    """Identity of a process, by which others on its machine can tell whether it is still alive."""

    host: str
    namespace: str
    """Boot and process namespace, within which a process id is unique."""
    pid: int
    started: str
    """Start time: tells a process from a later one with the same id."""

    def is_dead(self, me: Process) -> bool:
        """Whether it is known to have ended; False where `me` cannot know."""
        return (self.host, self.namespace) == (me.host, me.namespace) and _start_time(self.pid) != self.started


def this_process() -> Process:
    """The current process."""
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return Process(socket.gethostname(), namespace, os.getpid(), _start_time(os.getpid()))


def _start_time(pid: int) -> str:
    """When the process started, in ticks since boot; "gone" where it has ended, empty where there is no /proc."""
    try:
        # the fields after the name, which may itself hold brackets
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # a process that has ended stays in the table until its parent waits for it
        return "gone" if fields[0] in ("Z", "X") else fields[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except OSError:
        pass
    return ""


@dataclass(frozen=True)
class LockFile:
    """The content of one process's lock file; times are in seconds since 1970."""

    token: str
    process: Process
    requested_at: float
    expires_at: float
    held_since: float | None
    generation: int
    """Higher than that of every lock file that existed when this one was made."""

    def owner(self) -> str:
        """The process that wrote it, in words."""
        at = datetime.fromtimestamp(self.held_since or self.requested_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"process {self.process.pid} on {self.process.host}, since {at}"


class Lock:
    """A lock that is held: renewed by a thread until `release`."""

    def __init__(self, lock_files: _LockFiles, lock_file: LockFile, lease_s: float) -> None:
        self._files, self._lease_s = lock_files, lease_s
        self._mine = lock_file
        self._lost = ""
        self._ended = threading.Event()
        self._mutex = threading.Lock()
        self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)
        self._thread.start()

    def assert_held(self) -> None:
        """Raises StepError where the lock is lost; to be called before every write that is to last."""
        with self._mutex:
            mine = self._mine
            if not self._lost and time.time() >= mine.expires_at and not self._renewed_late():
                self._lost = f"it expired after {self._lease_s:g} s without renewal"
        if not self._lost:
            others = self._files.valid()
            if mine.token not in {other.token for other in others}:
                self._lost = "its lock file is gone"
            for other in others:
                if other.held_since and other.generation > mine.generation:
                    self._lost = f"{other.owner()}, has taken it over"
        if self._lost:
            raise StepError(
                f"this process has lost its lock on {self._files.folder.location} ({self._lost}), so that another one "
                "may be at work there; nothing more is written: start the same command again"
            )

    def release(self) -> None:
        """Give the lock back."""
        self._ended.set()
        self._thread.join()
        _RELEASED.add(self._mine.token)
        # if the store fails, the file stays, but counts no longer
        with contextlib.suppress(OSError, pa.ArrowException):
            self._files.remove(self._mine)

    def _renewed_late(self) -> bool:
        """Renew an expired lock file, if no other process has held the lock since; whether that succeeded."""
        try:
            # a later holder deletes expired files before it holds the lock
            if self._mine.token not in {file.token for file in self._files.all()}:
                return False
            renewed = replace(self._mine, expires_at=time.time() + self._lease_s)
            self._files.write(renewed)
            # list after the write: see the module docstring
            if any(file.token != renewed.token for file in self._files.valid()):
                self._files.remove(renewed)
                return False
        except (OSError, pa.ArrowException, PosttrainError):
            return False
        self._mine = renewed
        return True

    def _renew(self) -> None:
        while not self._ended.wait(self._lease_s / _RENEWALS):
            with self._mutex:
                now = time.time()
                if self._lost or (now >= self._mine.expires_at and not self._renewed_late()):
                    return
                renewed = replace(self._mine, expires_at=now + self._lease_s)
                # if the store stays unreachable for too long, the lock expires
                with contextlib.suppress(OSError, pa.ArrowException, PosttrainError):
                    self._files.write(renewed)
                    self._mine = renewed


@contextmanager
def job_lock(folder: RunFolder, *, lease_s: float, wait_s: float, skew_s: float = _SKEW_S) -> Iterator[Lock]:
    """The lock on a job's folder, held within the context.

    Waits for at most `wait_s` while another process holds it; then raises LockedError, which says who and since when.
    A lock file that was not renewed for `lease_s` (plus `skew_s`), or whose process has ended on this machine, does
    not count.
    """
    lock = acquire(folder, lease_s=lease_s, wait_s=wait_s, skew_s=skew_s)
    try:
        yield lock
    finally:
        lock.release()


@contextmanager
def run_lock(folder: RunFolder) -> Iterator[Lock]:
    """The lock on a run folder, held within the context; raises LockedError at once where another process holds it.

    Deletes what a killed process left half-written. Folders that are still empty afterwards are removed.
    """
    made = [path for path in (folder.local, *folder.local.parents) if not path.exists()] if folder.is_local else []
    way_out = "wait for it to end, or name another run.path"
    lock = acquire(folder, lease_s=_RUN_LEASE_S, wait_s=0, place=_RUN_LOCK, way_out=way_out)
    try:
        folder.clear_half_written()
        yield lock
    finally:
        lock.release()
        for path in (folder.local / _RUN_LOCK, *made) if folder.is_local else ():
            with contextlib.suppress(OSError):  # there is something in it
                path.rmdir()


def acquire(
    folder: RunFolder,
    *,
    lease_s: float,
    wait_s: float,
    skew_s: float = _SKEW_S,
    place: str = _JOB_LOCK,
    way_out: str = "wait for it to end, or set job.lock_wait_s",
) -> Lock:
    """As `job_lock`, for a caller that releases it itself; `place`: the folder of the lock files."""
    lock_files = _LockFiles(folder, skew_s, place)
    process, token, requested_at = this_process(), uuid.uuid4().hex, time.time()
    deadline = time.monotonic() + wait_s
    pause = 0.02
    mine: LockFile | None = None
    try:
        while True:
            now = time.time()
            if mine is None or now >= mine.expires_at - lease_s / 2:
                if mine is None:
                    generation = 1 + max((file.generation for file in lock_files.all()), default=0)
                    mine = LockFile(token, process, requested_at, now + lease_s, None, generation)
                mine = replace(mine, expires_at=now + lease_s)
                lock_files.write(mine)
            # list after the write: see the module docstring
            others = [file for file in lock_files.valid() if file.token != token]
            if not others:
                if time.time() >= mine.expires_at:
                    continue  # the listing took longer than the file is valid: others may have ignored it
                lock_files.delete_invalid()
                held = replace(mine, held_since=time.time())
                lock_files.write(held)
                return Lock(lock_files, held, lease_s)
            holder = max(others, key=lambda file: (file.held_since is not None, -file.requested_at))
            first = holder.held_since is None and all((requested_at, token) < (c.requested_at, c.token) for c in others)
            if not first:
                lock_files.remove(mine)
                mine = None
                if time.monotonic() >= deadline:
                    raise LockedError(
                        f"{folder.location}: another {'job' if place == _JOB_LOCK else 'run'} is at work there "
                        f"({holder.owner()}); {way_out}"
                    )
            pause = min(1.0, 1.5 * pause)
            time.sleep(pause * (0.5 + random.random()))
    except BaseException:
        if mine is not None:
            with contextlib.suppress(OSError, pa.ArrowException):
                lock_files.remove(mine)
        raise


@dataclass(frozen=True)
class _LockFiles:
    """The lock files in a folder."""

    folder: RunFolder
    skew_s: float
    place: str = _JOB_LOCK

    def write(self, lock_file: LockFile) -> None:
        # not durable: after a power cut no process is left to hold it
        with self.folder.writing(self._path(lock_file), durable=False) as stream:
            stream.write(json.dumps(asdict(lock_file)).encode())

    def remove(self, lock_file: LockFile) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.folder.files.delete_file(self._path(lock_file))

    def all(self) -> list[LockFile]:
        found: list[LockFile] = []
        for info in self._listed():
            if not info.path.endswith(".json"):
                continue
            try:
                record = self.folder.read_json(info.path)
                found.append(LockFile(**{**record, "process": Process(**record["process"])}))
            except FileNotFoundError:
                continue  # withdrawn between the listing and the reading
            except (ValueError, KeyError, TypeError):
                raise LockedError(
                    f"{info.path} is a lock file that this version of posttrain cannot read: make sure that no other "
                    "process is at work there, and delete it"
                ) from None
        return found

    def _listed(self) -> list[fs.FileInfo]:
        selector = fs.FileSelector(self.folder.path(self.place), allow_not_found=True)
        try:
            return self.folder.files.get_file_info(selector)
        except FileNotFoundError:
            # pyarrow asks twice: first there was no folder, then another process had made it
            return self.folder.files.get_file_info(selector)

    def valid(self) -> list[LockFile]:
        return [file for file in self.all() if not self._is_invalid(file)]

    def delete_invalid(self) -> None:
        for lock_file in self.all():
            if self._is_invalid(lock_file):
                self.remove(lock_file)

    def _is_invalid(self, lock_file: LockFile) -> bool:
        if lock_file.token in _RELEASED or time.time() > lock_file.expires_at + self.skew_s:
            return True
        return lock_file.process.is_dead(this_process())

    def _path(self, lock_file: LockFile) -> str:
        return self.folder.path(self.place, f"{lock_file.token}.json")
