"""What a run found in the samples of some files: the counts that an alarm is decided by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from posttrain.jobs.gate import BatchCounts
from posttrain.live import Rows
from posttrain.schema import PARTITION, ROW

if TYPE_CHECKING:
    from posttrain.cluster.partitioning import Split


def counts_by_batch(
    train: Split,
    files: list[str],
    batches: Sequence[str],
    *,
    scores: Iterable[pa.Table],
    min_log_odds: float,
    acted_on: Rows,
    left_out: Rows,
) -> dict[str, BatchCounts]:
    """By batch: how many samples it has, how many looked wrong in the first round, how many were acted on.

    `files`, `batches`: names of the files, and for each the batch that it belongs to (`inventory.batch_names`).
    `scores`: {partition, row, mislabel_odds} of the first round, a partition per table. `acted_on`: removed or
    relabelled by this run. `left_out`: quarantined, or removed by previous runs; these are not counted.
    """
    from posttrain.cluster import matching

    names = sorted(set(batches))
    numbers = {name: number for number, name in enumerate(names)}
    # the last entry is for rows of other files, whose place is -1
    of_file = np.array([*(numbers[name] for name in batches), len(names)], np.int32)
    of_rows = {partition: of_file[at] for partition, at in matching.files_of_rows(train, files).items()}
    for partition, rows in left_out.by_partition():
        if partition in of_rows:
            of_rows[partition][rows] = len(names)

    def counted(partition: int, rows: np.ndarray) -> np.ndarray:
        found = of_rows[partition][rows] if partition in of_rows else of_file[:0]
        return np.bincount(found, minlength=len(names) + 1)

    counts = np.zeros((3, len(names) + 1), np.int64)
    for partition, of_partition in of_rows.items():
        counts[0] += counted(partition, np.arange(len(of_partition)))
    for table in scores:
        if table.num_rows:
            suspect = table["mislabel_odds"].to_numpy() > min_log_odds
            counts[1] += counted(table[PARTITION][0].as_py(), table[ROW].to_numpy()[suspect])
    for partition, rows in acted_on.by_partition():
        counts[2] += counted(partition, rows)
    return {name: BatchCounts(*map(int, column)) for name, column in zip(names, counts.T[:-1], strict=True)}
