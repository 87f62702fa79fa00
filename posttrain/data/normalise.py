"""Blocks of any source in the project's own columns, with ids and labels checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa

from posttrain.arrow_compute import pc
from posttrain.data.parquet_files import is_binary, is_text, value_type
from posttrain.data.sources import PATH, FolderSource, ParquetSource, Source, TableSource
from posttrain.errors import DataError, LabelRangeError
from posttrain.schema import (
    FILE,
    IMAGE,
    LABEL,
    ORDER,
    ORDER_BITS,
    SAMPLE_ID,
    SPLITS,
    TRUE_LABEL,
    order_key,
    uniform,
)
from posttrain.store.folder import resolve
from posttrain.vision.noise import LabelNoise, noisy_labels

_VALIDATION_SEED = 1_000_003
"""Added to the seed by which the validation set is split off; any number that no other purpose adds."""


def true_labels_are_known(sources: Mapping[str, Source], noise: LabelNoise | None) -> bool:
    """Whether the removals can be measured against labels known to be right."""
    train = sources["train"]
    return noise is not None or (isinstance(train, ParquetSource) and train.true_label is not None)


def normalise(
    table: pa.Table,
    *,
    split: str,
    source: Source,
    classes: tuple[str, ...],
    validation_share: float | None = None,
    seed: int = 0,
    noise: LabelNoise | None = None,
) -> pa.Table:
    """A block in the project's columns: order, sample_id, image, label (-1: none), file, true_label.

    `table`: as `sources.tables_of` gives it. `validation_share`: this share of the samples, chosen by id and seed, goes
    to the validation set instead of `split`. Raises DataError or LabelRangeError, naming file and value.
    """
    if isinstance(source, FolderSource):
        columns = _folder_columns(table, source, classes)
    else:
        columns = _table_columns(table, source, classes)
    labels, true_labels = columns.labels, columns.true_labels
    keys = columns.ids.to_numpy(zero_copy_only=False)
    if noise is not None:
        labels = noisy_labels(labels, keys, columns.images, noise, len(classes))
    splits = np.full(table.num_rows, SPLITS.index(split), np.int64)
    if validation_share is not None:
        splits[uniform(keys, seed + _VALIDATION_SEED) < validation_share] = SPLITS.index("validation")
    order = order_key(keys) + (splits << ORDER_BITS)
    images = columns.images
    if is_binary(images.type):
        # 32-bit offsets end at 2 GiB, which a partition of large images can pass
        images = pc.cast(images, pa.large_binary())
    return pa.table(
        {
            ORDER: pa.array(order, pa.int64()),
            SAMPLE_ID: columns.ids,
            IMAGE: images,
            LABEL: pa.array(labels, pa.int32()),
            FILE: pc.cast(columns.files, pa.string()),
            TRUE_LABEL: pa.array(true_labels, pa.int32()),
        }
    )


@dataclass(frozen=True)
class _Columns:
    """The columns of a block, checked, before noise is added."""

    ids: pa.Array
    images: pa.ChunkedArray
    labels: np.ndarray
    """int32 class indices, -1 where there is none."""
    true_labels: np.ndarray
    """The labels themselves where no others are known to be right."""
    files: pa.Array | pa.ChunkedArray


def _folder_columns(table: pa.Table, source: FolderSource, classes: tuple[str, ...]) -> _Columns:
    _, root = resolve(source.location)
    relative = [
        str(PurePosixPath("/" + p.lstrip("/")).relative_to("/" + root.lstrip("/"))) for p in table[PATH].to_pylist()
    ]
    ids = pa.array(relative, pa.string())
    position = {name: index for index, name in enumerate(classes)}
    labels = np.array([position.get(path.split("/", 1)[0], -1) for path in relative], np.int32)
    if (labels < 0).any():
        path = relative[int(np.argmax(labels < 0))]
        raise LabelRangeError(
            f"{source.location}/{path}: its class folder is not among the {len(classes)} classes "
            f"of the training data; rename it, or name all classes in data.classes"
        )
    return _Columns(ids, table["bytes"], labels, labels, ids)


def _table_columns(table: pa.Table, source: ParquetSource | TableSource, classes: tuple[str, ...]) -> _Columns:
    if isinstance(source, TableSource):
        ids = checked_ids(table["id"], source.name, "id")
        labels = checked_labels(table[LABEL], classes, source.name, LABEL, ids)
        files = pa.array([source.name] * table.num_rows, pa.string())
        return _Columns(ids, table[IMAGE], labels, labels, files)
    files = table[source.path_column]
    path = files[0].as_py() if table.num_rows else ""
    ids = checked_ids(table[source.id], path, source.id)
    labels = true_labels = checked_labels(table[source.label], classes, path, source.label, ids)
    if source.true_label:
        true_labels = checked_labels(table[source.true_label], classes, path, source.true_label, ids)
    return _Columns(ids, table[source.image], labels, true_labels, files)


def checked_ids(column: pa.ChunkedArray, where: str, name: str) -> pa.Array:
    """The ids as int64 or string. Raises DataError for those that are empty or of another type."""
    kind = value_type(column.type)
    if kind != column.type:
        column = pc.cast(column, kind)
    if column.null_count:
        raise DataError(f"{where}: column {name!r} has {column.null_count} empty ids; every sample needs one")
    if pa.types.is_integer(kind):
        target = pa.int64()
    elif is_text(kind):
        target = pa.string()
    else:
        raise DataError(f"{where}: column {name!r} is {kind}; ids have to be integers or strings (data.id)")
    try:
        ids = pc.cast(column, target)
    except pa.ArrowInvalid:
        raise DataError(
            f"{where}: column {name!r} holds an id above 2^63 - 1; write it as a string (data.id)"
        ) from None
    return ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids


def checked_labels(
    column: pa.ChunkedArray, classes: tuple[str, ...], where: str, name: str, ids: pa.Array
) -> np.ndarray:
    """int32 class indices; -1 where the label is empty.

    Raises DataError for labels of another type, LabelRangeError for one outside the classes.
    """
    kind = value_type(column.type)
    if kind != column.type:
        column = pc.cast(column, kind)
    if is_text(kind):
        return _labels_by_name(column, classes, where, name, ids)
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise DataError(f"{where}: column {name!r} is {kind}; labels have to be integers or class names (data.label)")
    values = column.to_numpy().astype(np.float64)
    absent = np.isnan(values)
    broken = ~absent & (values != np.floor(values))
    if broken.any():
        at = int(np.argmax(broken))
        raise DataError(
            f"{where}: label {values[at]} at sample_id {ids[at].as_py()!r} is not a whole number; is data.label = "
            f"{name!r} the right column?"
        )
    outside = ~absent & ((values < 0) | (values >= len(classes)))
    if outside.any():
        at = int(np.argmax(outside))
        hint = (
            ", or data.classes too small?" if values[at] >= 0 else "? Where a label is not known, leave it empty (null)"
        )
        raise LabelRangeError(
            f"{where}: label {values[at]:.0f} at sample_id {ids[at].as_py()!r}, but there are {len(classes)} classes "
            f"(0..{len(classes) - 1}); is data.label = {name!r} the right column{hint}"
        )
    return np.where(absent, -1, values).astype(np.int32)


def _labels_by_name(
    column: pa.ChunkedArray, classes: tuple[str, ...], where: str, name: str, ids: pa.Array
) -> np.ndarray:
    index = pc.index_in(column, pa.array(classes, column.type))
    unknown = pc.and_(pc.is_null(index), pc.is_valid(column))
    if pc.any(unknown).as_py():
        at = pc.index(unknown, True).as_py()
        raise LabelRangeError(
            f"{where}: label {column[at].as_py()!r} at sample_id {ids[at].as_py()!r} is not among the "
            f"{len(classes)} classes (column {name!r}); set data.classes or correct the label"
        )
    return pc.fill_null(index, -1).to_numpy().astype(np.int32)
