"""The feature store: one Parquet shard per bucket, float16, written whole or not at all.

A shard holds `row` (position in the bucket), `sample_id`, `label` and one column of features per layer of the samples
that could be read, and in its metadata the rows that could not, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from posttrain.schema import BUCKET, FEATURES, FILE, LABEL, ROW, SAMPLE_ID
from posttrain.store.folder import RunFolder

_QUARANTINED = b"posttrain.quarantined"


@dataclass(frozen=True)
class Shard:
    """What a shard holds; `features` are float16 [rows, dim] of each layer."""

    rows: np.ndarray
    sample_ids: pa.Array
    labels: np.ndarray
    features: dict[str, np.ndarray]


def write_shard(folder: RunFolder, path: str, shard: Shard, quarantined: list[dict[str, object]]) -> None:
    """Write a shard; `quarantined` holds {row, sample_id, file, reason} of what could not be embedded."""
    columns = {
        ROW: pa.array(shard.rows, pa.int32()),
        SAMPLE_ID: shard.sample_ids,
        LABEL: pa.array(shard.labels, pa.int32()),
    }
    for layer, features in shard.features.items():
        count, dim = features.shape
        flat = pa.array(features.reshape(-1), type=pa.float16())
        columns[_column(layer)] = pa.FixedSizeListArray.from_arrays(flat, dim) if count else _no_features(dim)
    table = pa.table(columns)
    table = table.replace_schema_metadata({_QUARANTINED: json.dumps(quarantined).encode()})
    with folder.writing(path) as stream:
        # float16 activations hardly compress: lz4 costs nothing and helps where many are zero
        pq.write_table(table, stream, compression="lz4", use_dictionary=False, write_statistics=False)


def _no_features(dim: int) -> pa.Array:
    return pa.array([], pa.list_(pa.float16(), dim))


def _column(layer: str) -> str:
    return f"{FEATURES}:{layer}"


def read_shard(folder: RunFolder, path: str, layers: Sequence[str]) -> Shard:
    """A shard with the features of these layers; no others are read."""
    columns = [ROW, SAMPLE_ID, LABEL, *(_column(layer) for layer in layers)]
    table = folder.read_table(path, columns).combine_chunks()
    ids = table[SAMPLE_ID]
    return Shard(
        table[ROW].to_numpy(),
        ids.chunk(0) if ids.num_chunks else pa.array([], ids.type),
        table[LABEL].to_numpy(),
        {layer: _matrix(table[_column(layer)], table.num_rows) for layer in layers},
    )


def _matrix(column: pa.ChunkedArray, rows: int) -> np.ndarray:
    if column.num_chunks and column.chunk(0).offset:
        return np.stack(column.to_numpy())
    flat = column.chunk(0).values if column.num_chunks else pa.array([], pa.float16())
    return flat.to_numpy(zero_copy_only=False).reshape(rows, column.type.list_size)


@dataclass(frozen=True)
class ShardSummary:
    """What the driver knows of a shard."""

    bucket: int
    count: int
    quarantined: list[dict[str, object]]


def summarise_shard(folder: RunFolder, path: str, bucket: int) -> ShardSummary | None:
    """The summary of a shard from its footer; None where there is no (whole) shard."""
    if not folder.exists(path):
        return None
    try:
        with folder.files.open_input_file(path) as stream:
            schema = pq.ParquetFile(stream)
            quarantined = json.loads((schema.schema_arrow.metadata or {})[_QUARANTINED])
            return ShardSummary(bucket, schema.metadata.num_rows, quarantined)
    except (pa.ArrowInvalid, KeyError, OSError):
        return None


def quarantine_table(summaries: list[ShardSummary]) -> pa.Table:
    """{bucket, row, sample_id, file, reason} of all that could not be embedded."""
    rows = [{BUCKET: s.bucket, **row} for s in summaries for row in s.quarantined]
    is_text = any(isinstance(row[SAMPLE_ID], str) for row in rows)
    schema = pa.schema(
        [
            (BUCKET, pa.int32()),
            (ROW, pa.int32()),
            (SAMPLE_ID, pa.string() if is_text else pa.int64()),
            (FILE, pa.string()),
            ("reason", pa.string()),
        ]
    )
    return pa.Table.from_pylist(rows, schema=schema)
