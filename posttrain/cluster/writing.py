"""The cleaned data set as Parquet, one file per partition, written where the partitions are."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import ray

from posttrain.cluster.partitioning import Progress, Split
from posttrain.cluster.tasks import results
from posttrain.live import Live
from posttrain.schema import IMAGE, LABEL, SAMPLE_ID
from posttrain.store.folder import RunFolder


@ray.remote
def _write(
    block: pa.Table,
    partition: int,
    live: Live,
    folder: RunFolder,
    path: str,
    columns: tuple[str, str, str],
    classes: tuple[str, ...],
) -> int:
    rows = live.rows(partition, block.num_rows)
    kept = block.take(pa.array(rows)).select([SAMPLE_ID, IMAGE, LABEL])
    labels = live.labels(partition, rows, kept[LABEL].to_numpy())
    kept = kept.set_column(2, LABEL, pa.array(labels, pa.int32()))
    names = pa.array(classes).take(kept[LABEL])
    kept = kept.rename_columns(list(columns))
    if "class_name" not in columns:
        kept = kept.append_column("class_name", names)
    folder.write_table(path, kept)
    return kept.num_rows


def write_cleaned(
    split: Split,
    live: Live,
    folder: RunFolder,
    *,
    columns: tuple[str, str, str],
    classes: Sequence[str],
    progress: Progress,
) -> int:
    """Writes `cleaned/part-*.parquet` with the live samples, under their present labels.

    Returns the number of samples. `columns`: the names of id, image and label, which are those of the input where
    it has names.
    """
    kept = seen = 0
    calls = [
        (
            p.block,
            p.index,
            live.only(p.index),
            folder,
            folder.path("cleaned", f"part-{p.index:05d}.parquet"),
            columns,
            tuple(classes),
        )
        for p in split.partitions
    ]
    for partition, written in zip(split.partitions, results(_write, calls), strict=True):
        kept += written
        seen += partition.rows
        progress(seen, split.rows)
    return kept
