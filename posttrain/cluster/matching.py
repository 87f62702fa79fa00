"""Which rows of the partitions are meant: samples known from a former run, and those of some files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute
import ray

from posttrain.cluster.partitioning import Split
from posttrain.cluster.tasks import results
from posttrain.schema import (
    DIGEST,
    FILE,
    IMAGE,
    LABEL,
    NO_SUPPORT,
    PARTITION,
    ROW,
    SAMPLE_ID,
    SUPPORT,
    Excluded,
    Relabelled,
    excluded_rows,
    relabelled_rows,
)
from posttrain.store.features import image_digests

# pyarrow makes these functions when it is imported: a type checker sees none of them
pc = cast(Any, pyarrow.compute)

NEW_LABEL = "new_label"
"""Of a relabelled sample; empty for a removed one."""


@ray.remote
def _described(block: pa.Table, rows: np.ndarray) -> pa.Table:
    return describe(block, rows)


def describe(block: pa.Table, rows: np.ndarray) -> pa.Table:
    """{row, sample_id, image_digest, label} of some rows of a partition."""
    taken = block.take(pa.array(rows, pa.int64()))
    return pa.table(
        {
            ROW: pa.array(rows, pa.int32()),
            SAMPLE_ID: taken[SAMPLE_ID],
            DIGEST: pa.array(image_digests(taken[IMAGE]), pa.uint64()),
            LABEL: pa.array(taken[LABEL].to_numpy(), pa.int32()),
        }
    )


@dataclass(frozen=True)
class Known:
    """Samples that a former run removed or relabelled and that are still what they were."""

    removed: Excluded
    relabelled: Relabelled
    support: pa.Table
    """{partition, row, self_confidence}: what their labels had for them when they were taken."""


def taken_out(split: Split, removed: Excluded, relabelled: Relabelled, support: pa.Table) -> pa.Table:
    """{sample_id, image_digest, label, new_label, self_confidence} of the removed and relabelled samples.

    `label` is the given one, `new_label` empty for the removed. `support`: {partition, row, self_confidence} of all of
    them. `found_again` takes the table.
    """
    nothing = np.empty(0, np.int32)
    calls: list[tuple[Any, np.ndarray]] = []
    labels: list[dict[str, pa.Array]] = []
    for partition in split.partitions:
        gone = removed.get(partition.index, nothing)
        changed, new = relabelled.get(partition.index, (nothing, nothing))
        if len(gone) + len(changed):
            calls.append((partition.block, np.concatenate([gone, changed])))
            of_partition = support.filter(pc.equal(support[PARTITION], partition.index))
            at = pc.index_in(pa.array(calls[-1][1], pa.int32()), value_set=of_partition[ROW].combine_chunks())
            columns = {
                NEW_LABEL: pa.array([None] * len(gone) + new.tolist(), pa.int32()),
                SUPPORT: of_partition[SUPPORT].combine_chunks().take(at),
            }
            labels.append(columns)
    tables = []
    for table, columns in zip(results(_described, calls), labels, strict=True):
        table = table.drop_columns([ROW])
        for name, column in columns.items():
            table = table.append_column(name, column)
        tables.append(table)
    if not tables:
        return pa.table(
            {
                SAMPLE_ID: pa.array([], pa.int64()),
                DIGEST: pa.array([], pa.uint64()),
                LABEL: pa.array([], pa.int32()),
                NEW_LABEL: pa.array([], pa.int32()),
                SUPPORT: pa.array([], pa.float32()),
            }
        )
    return pa.concat_tables(tables)


@ray.remote
def _matched(block: pa.Table, known: pa.Table) -> pa.Table:
    return match(block, known)


def match(block: pa.Table, known: pa.Table) -> pa.Table:
    """{row, new_label, self_confidence} of the rows of a partition that a table of `taken_out` has, too.

    With the same image and given label, that is.
    """
    empty = pa.table({ROW: pa.array([], pa.int32()), **{name: known[name][:0] for name in (NEW_LABEL, SUPPORT)}})
    ids = known[SAMPLE_ID].combine_chunks()
    if not known.num_rows or block[SAMPLE_ID].type != ids.type:
        return empty
    at = pc.index_in(block[SAMPLE_ID], value_set=ids).to_pandas().to_numpy(dtype=float, na_value=-1.0).astype(np.int64)
    rows = np.flatnonzero(at >= 0)
    if not len(rows):
        return empty
    before = known.take(pa.array(at[rows]))
    now = describe(block, rows)
    same = np.ones(len(rows), bool)
    for column in (DIGEST, LABEL):
        same &= now[column].to_numpy() == before[column].to_numpy()
    found = pa.table({ROW: now[ROW], NEW_LABEL: before[NEW_LABEL], SUPPORT: before[SUPPORT]})
    return found.filter(pa.array(same))


def found_again(split: Split, known: pa.Table) -> Known:
    """The rows of the samples in a table of `taken_out` that are still what they were."""
    if not known.num_rows:
        return Known({}, {}, NO_SUPPORT)
    reference = ray.put(known)
    support = [NO_SUPPORT]
    removed: Excluded = {}
    relabelled: Relabelled = {}
    tables = results(_matched, [(partition.block, reference) for partition in split.partitions])
    for partition, table in zip(split.partitions, tables, strict=True):
        partitions = pa.array(np.full(table.num_rows, partition.index), pa.int32())
        support.append(pa.table({PARTITION: partitions, ROW: table[ROW], SUPPORT: table[SUPPORT]}))
        changed = table[NEW_LABEL].is_valid()
        gone, new = table.filter(pc.invert(changed)), table.filter(changed)
        if gone.num_rows:
            rows = gone[ROW].to_numpy()
            removed = excluded_rows(np.full(len(rows), partition.index), rows, removed)
        if new.num_rows:
            rows = new[ROW].to_numpy()
            labels = new[NEW_LABEL].to_numpy()
            relabelled = relabelled_rows(np.full(len(rows), partition.index), rows, labels, relabelled)
    return Known(removed, relabelled, pa.concat_tables(support))


@ray.remote
def _of_files(block: pa.Table, files: pa.Array) -> np.ndarray:
    at = pc.index_in(block[FILE], value_set=files)
    return pc.fill_null(at, -1).to_numpy().astype(np.int32)


def files_of_rows(split: Split, files: list[str]) -> dict[int, np.ndarray]:
    """partition -> for each of its rows the place in `files` of the file that it comes from, -1 for any other.

    `files`: names as `reading` gives them. Partitions with none of theirs are left out.
    """
    reference = ray.put(pa.array(files, pa.string()))
    found = results(_of_files, [(partition.block, reference) for partition in split.partitions])
    return {partition.index: at for partition, at in zip(split.partitions, found, strict=True) if (at >= 0).any()}
