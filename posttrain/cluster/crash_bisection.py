"""Which rows of a block end the process that works on them: found by halving, in child processes."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from posttrain.errors import StepError
from posttrain.schema import FILE, ROW, SAMPLE_ID

DEATHS = 3
"""Processes that a row has to end, each of them alone with it."""

AT_MOST = 16
"""Rows of one block that may end processes: where it is more, something else does."""


@dataclass(frozen=True)
class Fatal:
    """A row of a partition whose image ends the process that works on it."""

    row: int
    reason: str


def fatal_rows(block: pa.Table, fatal: Sequence[Fatal]) -> list[dict[str, object]]:
    """The quarantine's rows for images that end their process."""
    found: list[dict[str, object]] = []
    for one in fatal:
        where = {ROW: one.row, SAMPLE_ID: block[SAMPLE_ID][one.row].as_py(), FILE: block[FILE][one.row].as_py()}
        found.append({**where, "reason": one.reason})
    return found


def fatal(
    work: Callable[[np.ndarray], Callable[[], object]], rows: np.ndarray, *, what: str, preload: Sequence[str]
) -> list[Fatal]:
    """Those of the rows that end their process; none where each part of them survives.

    `work` gives for some rows what a child process is to do with them: a picklable function, which may raise what it
    likes. `what` was done to the images: decoded, say. `preload`: modules that all children share. Raises StepError
    where it is more than AT_MOST rows.
    """
    # children of a server, not of this process: it may have a GPU and threads, which no fork survives
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))

    def end(some: np.ndarray) -> str | None:
        child = context.Process(target=_carry_out, args=(work(some),), daemon=True)
        child.start()
        child.join()
        code = child.exitcode or 0
        return None if code >= 0 else signal.Signals(-code).name

    parts = [rows]
    while any(len(part) > 1 for part in parts):
        halves = [half for part in parts for half in np.array_split(part, 2) if len(half)]
        parts = [half for half in halves if end(half) is not None]
        if len(parts) > AT_MOST:
            raise StepError(
                f"more than {AT_MOST} images of one partition end the process where they are {what}: it is not the "
                "images; give the workers more memory, or try the model on one image by itself"
            )
    found = []
    for part in parts:
        ends = [end(part) for _ in range(DEATHS)]
        if None not in ends:
            how = f"each of {DEATHS} processes where it was {what} ended by {ends[-1]}"
            found.append(Fatal(int(part[0]), how))
    return found


def _carry_out(work: Callable[[], object]) -> None:
    work()
