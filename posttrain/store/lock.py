"""A lock with a lease in the folder of a job or run: one process at a time, on a disk and in an object store alike.

An object store has no lock, and pyarrow no conditional write. What both have: a file that was written is seen by
every listing that begins afterwards. So each job **writes a claim of its own first, and lists the claims then**; it
holds the lease only if that listing shows no other living claim, and else withdraws its own or waits.

Two can never hold it: let A and B both have listed after their own writes, and let A's listing be the earlier one.
If B's claim had been written before A's listing, A would have seen it. So it was written after it, hence after A's
claim, and B's own listing, later still, shows A's claim. At most one of them saw none.

Of several that meet while none holds the lease, the one that came first stays and waits for the others to withdraw,
so that one of them gets it.

A claim is renewed by a thread and runs out without it: a holder that died or hangs is succeeded. A holder that was
only slow finds out before it makes anything last (`assert_held`): its claim was cleared away, or has a successor.
Where neither is so (the machine slept, and nobody else came), it takes its claim up again as it made it: by writing
first and listing then. Clocks of different machines may differ by `_SKEW_S`. What remains is the moment between
`assert_held` and the write that follows: no lease can close it without the help of what is written to.
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

from posttrain.errors import HeldError, PosttrainError, StepError
from posttrain.store.folder import RunFolder

_SKEW_S = 5.0
_RENEWALS = 4
"""Renewals within the length of a lease."""
_RUN_LEASE_S = 120.0
_GIVEN_BACK: set[str] = set()
"""Tokens of this process's claims that are over, also where their files could not be deleted."""
PLACE = "lease"
"""Where the claims to a job's folder lie."""
_OF_RUN = ".lease"
"""Where the claims to a run folder lie: hidden, since a folder that holds nothing else is empty."""


@dataclass(frozen=True)
class Process:
    """A process, so that others on its machine can tell whether it still lives."""

    host: str
    space: str
    """Boot and process namespace: within it, process ids mean the same."""
    pid: int
    born: str
    """Tells a process from a later one with the same id."""

    def is_dead(self, me: Process) -> bool:
        """Whether it is known to have ended; False where it cannot be known from here."""
        return (self.host, self.space) == (me.host, me.space) and _born(self.pid) != self.born


def this_process() -> Process:
    """The process that asks."""
    space = ""
    with contextlib.suppress(OSError):
        space = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return Process(socket.gethostname(), space, os.getpid(), _born(os.getpid()))


def _born(pid: int) -> str:
    """When the process started, in ticks since boot; empty where there is none (or no /proc to tell)."""
    try:
        # behind the name, which may hold anything, also brackets
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # a process that has ended stays in the table until its parent asks for it
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
class Claim:
    """One job's claim to the lease, as it stands in its file."""

    token: str
    process: Process
    asked: float
    """Seconds since 1970, as all times here."""
    expires: float
    held_since: float | None
    generation: int
    """Higher than that of every claim that was there when this one was made."""

    def in_words(self) -> str:
        at = datetime.fromtimestamp(self.held_since or self.asked, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"process {self.process.pid} on {self.process.host}, since {at}"


class Lease:
    """The lease while it is held: renewed in the background, given back by `release`."""

    def __init__(self, claims: _Claims, claim: Claim, lease_s: float) -> None:
        self._claims, self._lease_s = claims, lease_s
        self._claim = claim
        self._lost = ""
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def assert_held(self) -> None:
        """Raises StepError where the lease is lost; to be called before each step that makes something last."""
        with self._lock:
            mine = self._claim
            if not self._lost and time.time() >= mine.expires and not self._taken_up_again():
                self._lost = f"it ran out after {self._lease_s:g} s without being renewed"
        if not self._lost:
            others = self._claims.living()
            if mine.token not in {claim.token for claim in others}:
                self._lost = "its claim is gone"
            for other in others:
                if other.held_since and other.generation > mine.generation:
                    self._lost = f"{other.in_words()}, has taken it over"
        if self._lost:
            raise StepError(
                f"this job has lost its lease on {self._claims.folder.location} ({self._lost}), so that another job "
                "may be at work there; nothing further is written: start the same command again"
            )

    def release(self) -> None:
        """Give the lease back."""
        self._ended.set()
        self._thread.join()
        _GIVEN_BACK.add(self._claim.token)
        # where the storage has failed, the claim stays, and counts no longer
        with contextlib.suppress(OSError, pa.ArrowException):
            self._claims.remove(self._claim)

    def _taken_up_again(self) -> bool:
        """Whether a claim that ran out could be renewed, as it has had no successor."""
        try:
            # a successor clears it away before it holds the lease
            if self._claim.token not in {claim.token for claim in self._claims.all()}:
                return False
            renewed = replace(self._claim, expires=time.time() + self._lease_s)
            self._claims.write(renewed)
            # the listing after the write: see the module's text
            if any(claim.token != renewed.token for claim in self._claims.living()):
                self._claims.remove(renewed)
                return False
        except (OSError, pa.ArrowException, PosttrainError):
            return False
        self._claim = renewed
        return True

    def _renew(self) -> None:
        while not self._ended.wait(self._lease_s / _RENEWALS):
            with self._lock:
                now = time.time()
                if self._lost or (now >= self._claim.expires and not self._taken_up_again()):
                    return
                renewed = replace(self._claim, expires=now + self._lease_s)
                # it runs out where the storage stays away for too long
                with contextlib.suppress(OSError, pa.ArrowException, PosttrainError):
                    self._claims.write(renewed)
                    self._claim = renewed


@contextmanager
def held(folder: RunFolder, *, lease_s: float, wait_s: float, skew_s: float = _SKEW_S) -> Iterator[Lease]:
    """The lease on a job's folder, held while the context lasts.

    Waits for at most `wait_s` where another job holds it; then raises HeldError, which says who and since when.
    A claim that was not renewed for `lease_s` (and `skew_s` more), or whose process has ended on this machine, counts
    no longer.
    """
    lease = acquire(folder, lease_s=lease_s, wait_s=wait_s, skew_s=skew_s)
    try:
        yield lease
    finally:
        lease.release()


@contextmanager
def alone(folder: RunFolder) -> Iterator[Lease]:
    """The lease on a run folder; raises HeldError at once where another process is at work there.

    What a killed one left half-written is cleared away. A folder that nothing was written to is gone again afterwards.
    """
    made = [path for path in (folder.local, *folder.local.parents) if not path.exists()] if folder.is_local else []
    way_out = "wait for it to end, or name another run.path"
    lease = acquire(folder, lease_s=_RUN_LEASE_S, wait_s=0, place=_OF_RUN, way_out=way_out)
    try:
        folder.clear_half_written()
        yield lease
    finally:
        lease.release()
        for path in (folder.local / _OF_RUN, *made) if folder.is_local else ():
            with contextlib.suppress(OSError):  # there is something in it
                path.rmdir()


def acquire(
    folder: RunFolder,
    *,
    lease_s: float,
    wait_s: float,
    skew_s: float = _SKEW_S,
    place: str = PLACE,
    way_out: str = "wait for it to end, or set job.wait_s",
) -> Lease:
    """As `held`, for a caller that gives it back by itself; `place`: the folder of the claims."""
    claims = _Claims(folder, skew_s, place)
    process, token, asked = this_process(), uuid.uuid4().hex, time.time()
    deadline = time.monotonic() + wait_s
    pause = 0.02
    mine: Claim | None = None
    try:
        while True:
            now = time.time()
            if mine is None or now >= mine.expires - lease_s / 2:
                if mine is None:
                    generation = 1 + max((claim.generation for claim in claims.all()), default=0)
                    mine = Claim(token, process, asked, now + lease_s, None, generation)
                mine = replace(mine, expires=now + lease_s)
                claims.write(mine)
            # the listing after the write: see the module's text
            others = [claim for claim in claims.living() if claim.token != token]
            if not others:
                if time.time() >= mine.expires:
                    continue  # the listing took longer than the claim lasts: it may have been passed over
                claims.clear_dead()
                taken = replace(mine, held_since=time.time())
                claims.write(taken)
                return Lease(claims, taken, lease_s)
            rival = max(others, key=lambda claim: (claim.held_since is not None, -claim.asked))
            first = rival.held_since is None and all((asked, token) < (c.asked, c.token) for c in others)
            if not first:
                claims.remove(mine)
                mine = None
                if time.monotonic() >= deadline:
                    raise HeldError(
                        f"{folder.location}: another {'job' if place == PLACE else 'run'} is at work there "
                        f"({rival.in_words()}); {way_out}"
                    )
            pause = min(1.0, 1.5 * pause)
            time.sleep(pause * (0.5 + random.random()))
    except BaseException:
        if mine is not None:
            with contextlib.suppress(OSError, pa.ArrowException):
                claims.remove(mine)
        raise


@dataclass(frozen=True)
class _Claims:
    """The claims in a job's folder, one file each."""

    folder: RunFolder
    skew_s: float
    place: str = PLACE

    def write(self, claim: Claim) -> None:
        # not durable: after a power cut nobody is at work
        with self.folder.writing(self._path(claim), durable=False) as stream:
            stream.write(json.dumps(asdict(claim)).encode())

    def remove(self, claim: Claim) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.folder.files.delete_file(self._path(claim))

    def all(self) -> list[Claim]:
        found: list[Claim] = []
        for info in self._listed():
            if not info.path.endswith(".json"):
                continue
            try:
                record = self.folder.read_json(info.path)
                found.append(Claim(**{**record, "process": Process(**record["process"])}))
            except FileNotFoundError:
                continue  # withdrawn between the listing and the reading
            except (ValueError, KeyError, TypeError):
                raise HeldError(
                    f"{info.path} is a claim that this version of posttrain cannot read: make sure that no other job "
                    "is at work there, and delete it"
                ) from None
        return found

    def _listed(self) -> list[fs.FileInfo]:
        selector = fs.FileSelector(self.folder.path(self.place), allow_not_found=True)
        try:
            return self.folder.files.get_file_info(selector)
        except FileNotFoundError:
            # pyarrow looks twice: it found no folder to list, and then one that another process had made meanwhile
            return self.folder.files.get_file_info(selector)

    def living(self) -> list[Claim]:
        return [claim for claim in self.all() if not self._is_dead(claim)]

    def clear_dead(self) -> None:
        for claim in self.all():
            if self._is_dead(claim):
                self.remove(claim)

    def _is_dead(self, claim: Claim) -> bool:
        if claim.token in _GIVEN_BACK or time.time() > claim.expires + self.skew_s:
            return True
        return claim.process.is_dead(this_process())

    def _path(self, claim: Claim) -> str:
        return self.folder.path(self.place, f"{claim.token}.json")
