"""Samples found again in the partitions: those that previous runs acted on, and those of some files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from posttrain.arrow_compute import pc
from posttrain.cluster.partitioning import Split
from posttrain.cluster.tasks import results
from posttrain.live import NewLabels, Removal, Rows
from posttrain.schema import (
    DIGEST,
    FILE,
    IMAGE,
    LABEL,
    NO_SELF_CONFIDENCE,
    PARTITION,
    ROW,
    SAMPLE_ID,
    SELF_CONFIDENCE,
)
from posttrain.store.features import image_digests

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
class FoundAgain:
    """Samples that a previous run removed or relabelled and that are still what they were."""

    removal: Removal
    self_confidence: pa.Table
    """{partition, row, self_confidence}: the self-confidence of their labels when they were acted on."""


def describe_acted_on(split: Split, removal: Removal, self_confidence: pa.Table) -> pa.Table:
    """{sample_id, image_digest, label, new_label, self_confidence} of the removed and relabelled samples.

    `label` is the given one, `new_label` empty for the removed. `self_confidence`: {partition, row, self_confidence} of
    all of them. `found_again` takes the table.
    """
    calls: list[tuple[Any, np.ndarray]] = []
    labels: list[dict[str, pa.Array]] = []
    ordered = self_confidence.sort_by([(PARTITION, "ascending"), (ROW, "ascending")])
    confidences, places = ordered[SELF_CONFIDENCE].to_numpy(), Rows.of_table(ordered)
    for partition in split.partitions:
        gone = removal.removed.in_partition(partition.index)
        changed, new = removal.relabelled.in_partition(partition.index)
        if len(gone) + len(changed):
            rows = np.concatenate([gone, changed])
            calls.append((partition.block, rows))
            columns = {
                NEW_LABEL: pa.array([None] * len(gone) + new.tolist(), pa.int32()),
                SELF_CONFIDENCE: pa.array(confidences[places.positions(partition.index, rows)]),
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
                SELF_CONFIDENCE: pa.array([], pa.float32()),
            }
        )
    return pa.concat_tables(tables)


@ray.remote
def _matched(block: pa.Table, acted_on: pa.Table) -> pa.Table:
    return match(block, acted_on)


def match(block: pa.Table, acted_on: pa.Table) -> pa.Table:
    """{row, new_label, self_confidence} of the rows of a partition that a table of `describe_acted_on` has, too.

    With the same image and given label, that is.
    """
    empty = pa.table(
        {ROW: pa.array([], pa.int32()), **{name: acted_on[name][:0] for name in (NEW_LABEL, SELF_CONFIDENCE)}}
    )
    ids = acted_on[SAMPLE_ID].combine_chunks()
    if not acted_on.num_rows or block[SAMPLE_ID].type != ids.type:
        return empty
    at = pc.index_in(block[SAMPLE_ID], value_set=ids).to_pandas().to_numpy(dtype=float, na_value=-1.0).astype(np.int64)
    rows = np.flatnonzero(at >= 0)
    if not len(rows):
        return empty
    before = acted_on.take(pa.array(at[rows]))
    now = describe(block, rows)
    same = np.ones(len(rows), bool)
    for column in (DIGEST, LABEL):
        same &= now[column].to_numpy() == before[column].to_numpy()
    found = pa.table({ROW: now[ROW], NEW_LABEL: before[NEW_LABEL], SELF_CONFIDENCE: before[SELF_CONFIDENCE]})
    return found.filter(pa.array(same))


def found_again(split: Split, acted_on: pa.Table) -> FoundAgain:
    """The rows of the samples in a table of `describe_acted_on` that are still what they were."""
    if not acted_on.num_rows:
        return FoundAgain(Removal(), NO_SELF_CONFIDENCE)
    reference = ray.put(acted_on)
    found = [NO_SELF_CONFIDENCE.append_column(NEW_LABEL, pa.array([], pa.int32()))]
    tables = results(_matched, [(partition.block, reference) for partition in split.partitions])
    for partition, table in zip(split.partitions, tables, strict=True):
        partitions = pa.array(np.full(table.num_rows, partition.index), pa.int32())
        found.append(table.append_column(PARTITION, partitions).select([PARTITION, ROW, SELF_CONFIDENCE, NEW_LABEL]))
    acted_on = pa.concat_tables(found)
    changed = acted_on[NEW_LABEL].is_valid()
    removed, new = acted_on.filter(pc.invert(changed)), acted_on.filter(changed)
    relabelled = NewLabels.of(*(new[name].to_numpy() for name in (PARTITION, ROW, NEW_LABEL)))
    return FoundAgain(Removal(Rows.of_table(removed), relabelled), acted_on.drop_columns([NEW_LABEL]))


@ray.remote
def _of_files(block: pa.Table, files: pa.Array) -> np.ndarray:
    at = pc.index_in(block[FILE], value_set=files)
    return pc.fill_null(at, -1).to_numpy().astype(np.int32)


def files_of_rows(split: Split, files: list[str]) -> dict[int, np.ndarray]:
    """partition -> for each of its rows the place in `files` of the file that it comes from, -1 for any other.

    `files`: names as in the column `file`. Partitions with none of theirs are left out.
    """
    reference = ray.put(pa.array(files, pa.string()))
    found = results(_of_files, [(partition.block, reference) for partition in split.partitions])
    return {partition.index: at for partition, at in zip(split.partitions, found, strict=True) if (at >= 0).any()}
