"""Which rows of the buckets are meant: samples known from a former run, and those of some files."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute
import ray

from posttrain.cluster.reading import Split
from posttrain.cluster.tasks import results
from posttrain.schema import (
    DIGEST,
    FILE,
    IMAGE,
    LABEL,
    ROW,
    SAMPLE_ID,
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
    """{row, sample_id, image_digest, label} of some rows of a bucket."""
    taken = block.take(pa.array(rows, pa.int64()))
    return pa.table(
        {
            ROW: pa.array(rows, pa.int32()),
            SAMPLE_ID: taken[SAMPLE_ID],
            DIGEST: pa.array(image_digests(taken[IMAGE]), pa.uint64()),
            LABEL: pa.array(taken[LABEL].to_numpy(), pa.int32()),
        }
    )


def taken_out(split: Split, removed: Excluded, relabelled: Relabelled) -> pa.Table:
    """{sample_id, image_digest, label, new_label} of the removed and the relabelled samples, as `found_again` takes it.

    `label` is the given one, `new_label` empty for the removed.
    """
    nothing = np.empty(0, np.int32)
    calls, labels = [], []
    for bucket in split.buckets:
        gone = removed.get(bucket.index, nothing)
        changed, new = relabelled.get(bucket.index, (nothing, nothing))
        if len(gone) + len(changed):
            calls.append((bucket.block, np.concatenate([gone, changed])))
            labels.append(pa.array([None] * len(gone) + new.tolist(), pa.int32()))
    tables = [
        table.drop_columns([ROW]).append_column(NEW_LABEL, new)
        for table, new in zip(results(_described, calls), labels, strict=True)
    ]
    if not tables:
        return pa.table(
            {
                SAMPLE_ID: pa.array([], pa.int64()),
                DIGEST: pa.array([], pa.uint64()),
                LABEL: pa.array([], pa.int32()),
                NEW_LABEL: pa.array([], pa.int32()),
            }
        )
    return pa.concat_tables(tables)


@ray.remote
def _matched(block: pa.Table, known: pa.Table) -> pa.Table:
    return match(block, known)


def match(block: pa.Table, known: pa.Table) -> pa.Table:
    """{row, new_label} of the rows of a bucket that a table of `taken_out` has with the same image and given label."""
    empty = pa.table({ROW: pa.array([], pa.int32()), NEW_LABEL: pa.array([], pa.int32())})
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
    found = pa.table({ROW: now[ROW], NEW_LABEL: before[NEW_LABEL]})
    return found.filter(pa.array(same))


def found_again(split: Split, known: pa.Table) -> tuple[Excluded, Relabelled]:
    """The rows of samples that a former run removed or relabelled and that are still what they were."""
    if not known.num_rows:
        return {}, {}
    reference = ray.put(known)
    removed: Excluded = {}
    relabelled: Relabelled = {}
    tables = results(_matched, [(bucket.block, reference) for bucket in split.buckets])
    for bucket, table in zip(split.buckets, tables, strict=True):
        changed = table[NEW_LABEL].is_valid()
        gone, new = table.filter(pc.invert(changed)), table.filter(changed)
        if gone.num_rows:
            rows = gone[ROW].to_numpy()
            removed = excluded_rows(np.full(len(rows), bucket.index), rows, removed)
        if new.num_rows:
            rows = new[ROW].to_numpy()
            labels = new[NEW_LABEL].to_numpy()
            relabelled = relabelled_rows(np.full(len(rows), bucket.index), rows, labels, relabelled)
    return removed, relabelled


@ray.remote
def _of_files(block: pa.Table, files: pa.Array) -> np.ndarray:
    at = pc.index_in(block[FILE], value_set=files)
    return pc.fill_null(at, -1).to_numpy().astype(np.int32)


def files_of_rows(split: Split, files: list[str]) -> dict[int, np.ndarray]:
    """bucket -> for each of its rows the place in `files` of the file that it comes from, -1 for any other.

    `files`: names as `reading` gives them. Buckets with none of theirs are left out.
    """
    reference = ray.put(pa.array(files, pa.string()))
    found = results(_of_files, [(bucket.block, reference) for bucket in split.buckets])
    return {bucket.index: at for bucket, at in zip(split.buckets, found, strict=True) if (at >= 0).any()}
