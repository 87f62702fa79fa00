"""Which rows of a block crash the process that works on them: found by bisection, in child processes."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from posttrain.errors import StepError
from posttrain.schema import FILE, ROW, SAMPLE_ID

CRASHES_OF_A_ROW = 3
"""Processes that a row has to crash, in each of them the only one."""

MAX_CRASHING_ROWS = 16
"""Rows of one block that may crash processes: where it is more, something else does."""


@dataclass(frozen=True)
class CrashingRow:
    """A row of a block whose image crashes the process that works on it."""

    row: int
    reason: str


def quarantine_rows(block: pa.Table, crashing: Sequence[CrashingRow]) -> list[dict[str, object]]:
    """The quarantine's rows {row, sample_id, file, reason} for images that crash a process."""
    return [
        {
            ROW: found.row,
            SAMPLE_ID: block[SAMPLE_ID][found.row].as_py(),
            FILE: block[FILE][found.row].as_py(),
            "reason": found.reason,
        }
        for found in crashing
    ]


def crashing_rows(
    work: Callable[[np.ndarray], Callable[[], object]], rows: np.ndarray, *, what: str, preload: Sequence[str]
) -> list[CrashingRow]:
    """Those of the rows that crash their process; none where each part of them can be worked on.

    `work` gives for some rows what a child process is to do with them: a picklable function, which may raise whatever
    it likes. `what` was done to the images: decoded, say. `preload`: modules that all children share. Raises StepError
    where it is more than MAX_CRASHING_ROWS rows.
    """
    # children of a server, not of this process: it may have a GPU and threads, which no fork survives
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))

    def crash(some: np.ndarray) -> str | None:
        """The signal that ended a process which worked on these rows; None where it came to its end."""
        child = context.Process(target=_call, args=(work(some),), daemon=True)
        child.start()
        child.join()
        code = child.exitcode or 0
        return None if code >= 0 else signal.Signals(-code).name

    parts = [rows]
    while any(len(part) > 1 for part in parts):
        halves = [half for part in parts for half in np.array_split(part, 2) if len(half)]
        parts = [half for half in halves if crash(half) is not None]
        if len(parts) > MAX_CRASHING_ROWS:
            raise StepError(
                f"more than {MAX_CRASHING_ROWS} images of one partition end the process where they are {what}: it is "
                "not the images; give the workers more memory, or try the model on one image by itself"
            )
    found = []
    for part in parts:
        crashes = [crash(part) for _ in range(CRASHES_OF_A_ROW)]
        if None not in crashes:
            reason = f"each of {CRASHES_OF_A_ROW} processes where it was {what} ended by {crashes[-1]}"
            found.append(CrashingRow(int(part[0]), reason))
    return found


def _call(work: Callable[[], object]) -> None:
    work()
