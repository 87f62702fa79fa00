"""The classes of Parquet files that do not name them: the names, or the largest number, in the label column."""

from __future__ import annotations

import math

from posttrain.arrow_compute import pc
from posttrain.data.parquet_files import is_text, read_column, value_type
from posttrain.data.sources import ParquetSource, parquet_dataset
from posttrain.errors import DataError


def string_labels(source: ParquetSource) -> tuple[str, ...] | None:
    """The distinct names where the label column holds text, sorted; None where it holds numbers."""
    dataset = parquet_dataset(source)
    if not is_text(value_type(dataset.schema.field(source.label).type)):
        return None
    names: set[str] = set()
    for column in read_column(dataset, source.label):
        names.update(name for name in pc.unique(column).to_pylist() if name is not None)
    return tuple(sorted(names))


def highest_label(source: ParquetSource) -> int:
    """The largest label of a numeric label column; -1 where there is none."""
    highest = -1
    for column in read_column(parquet_dataset(source), source.label):
        value = pc.max(column).as_py()
        if value is not None and math.isinf(value):
            raise DataError(
                f"{source.locations[0]}: a label is {value}; is data.label = {source.label!r} the right column?"
            )
        highest = max(highest, -1 if value is None or math.isnan(value) else int(value))
    return highest
