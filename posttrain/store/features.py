"""The feature store: one Parquet shard per partition, float16, written whole or not at all.

A shard holds, for each sample that could be read, `row` (its position in the partition), `sample_id`, `label`, a digest
of the image and one column of features per layer. Its metadata holds the rows that could not be read, with the reason,
the number of images that went through the backbone for it, and the number of partitions of its split. With these, a
later run finds the features of samples embedded already, although its samples lie in other partitions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from posttrain.arrow_compute import pc
from posttrain.schema import (
    DIGEST,
    FEATURES,
    FILE,
    LABEL,
    PARTITION,
    ROW,
    SAMPLE_ID,
    order_key,
    partition_boundaries,
)
from posttrain.store.folder import RunFolder

_QUARANTINED = b"posttrain.quarantined"
_EMBEDDED = b"posttrain.embedded"
_PARTITIONS = b"posttrain.partitions"


@dataclass(frozen=True)
class Shard:
    """Content of a shard; `features` holds float16 [rows, dim] by layer."""

    rows: np.ndarray
    sample_ids: pa.Array
    labels: np.ndarray
    features: dict[str, np.ndarray]
    digests: np.ndarray | None = None
    """uint64 [rows], of the images (`image_digests`); None: unknown, so that no later run can use the features."""


def write_shard(
    folder: RunFolder,
    path: str,
    shard: Shard,
    quarantined: list[dict[str, object]],
    *,
    embedded: int = 0,
    partitions: int = 0,
) -> None:
    """Write a shard; `quarantined` holds {row, sample_id, file, reason} of samples that could not be embedded.

    `embedded`: number of images that went through the backbone for it; `partitions`: number of those of its split.
    """
    columns = {
        ROW: pa.array(shard.rows, pa.int32()),
        SAMPLE_ID: shard.sample_ids,
        LABEL: pa.array(shard.labels, pa.int32()),
    }
    if shard.digests is not None:
        columns[DIGEST] = pa.array(shard.digests, pa.uint64())
    for layer, features in shard.features.items():
        count, dim = features.shape
        flat = pa.array(features.reshape(-1), type=pa.float16())
        columns[_column(layer)] = pa.FixedSizeListArray.from_arrays(flat, dim) if count else _no_features(dim)
    table = pa.table(columns)
    table = table.replace_schema_metadata(
        {
            _QUARANTINED: json.dumps(quarantined).encode(),
            _EMBEDDED: str(embedded).encode(),
            _PARTITIONS: str(partitions).encode(),
        }
    )
    # not durable: after a power cut it is embedded again
    with folder.writing(path, durable=False) as stream:
        # float16 activations hardly compress: lz4 costs nothing and helps where many are zero
        pq.write_table(table, stream, compression="lz4", use_dictionary=False, write_statistics=False)


def _no_features(dim: int) -> pa.Array:
    return pa.array([], pa.list_(pa.float16(), dim))


def _column(layer: str) -> str:
    return f"{FEATURES}:{layer}"


def read_shard(folder: RunFolder, path: str, layers: Sequence[str]) -> Shard:
    """A shard with the features of these layers only."""
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
    """What the driver keeps of a shard."""

    partition: int
    count: int
    quarantined: list[dict[str, object]]
    embedded: int = 0
    """Images that went through the backbone; the features of the others are those of a previous run."""


def summarise_shard(folder: RunFolder, path: str, partition: int) -> ShardSummary | None:
    """The summary of a shard from its footer; None where there is no (whole) shard."""
    if not folder.exists(path):
        return None
    try:
        with folder.parquet(path) as file:
            metadata = file.schema_arrow.metadata or {}
            quarantined = json.loads(metadata[_QUARANTINED])
            return ShardSummary(partition, file.metadata.num_rows, quarantined, int(metadata.get(_EMBEDDED, 0)))
    except (pa.ArrowInvalid, KeyError, OSError):
        return None


# what a previous run embedded --------------------------------------------------------------------------------


def image_digests(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """uint64 [rows]: eight bytes of the BLAKE2b digest of each image cell as it is stored."""
    cells = (cell.as_py() for cell in column)
    return np.array([int.from_bytes(_digest(cell), "big") for cell in cells], np.uint64)


def _digest(cell: object) -> bytes:
    if isinstance(cell, dict):
        # {bytes, path}, as Hugging Face stores images
        cell = cell.get("bytes")
    if isinstance(cell, np.ndarray):
        # of a tensor column; as text, NumPy leaves out what is in the middle of a large one
        content = f"{cell.dtype.str} {cell.shape} ".encode() + np.ascontiguousarray(cell).tobytes()
    else:
        content = cell if isinstance(cell, bytes) else json.dumps(cell, default=str).encode()
    return hashlib.blake2b(content, digest_size=8).digest()


@dataclass(frozen=True)
class PreviousFeatures:
    """The shards of one split by a previous run with the same backbone. Picklable: workers read for themselves."""

    folder: RunFolder
    backbone: str
    split: str
    partitions: int

    def of(self, ids: pa.Array, digests: np.ndarray, layers: Sequence[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Sorted positions of the samples that have features for the same image, and these features by layer.

        `ids` are those of one partition: their hashes give the shards in which they can lie.
        """
        positions: list[np.ndarray] = []
        parts: dict[str, list[np.ndarray]] = {layer: [] for layer in layers}
        keys = order_key(ids.to_numpy(zero_copy_only=False)) if len(ids) else np.empty(0, np.int64)
        partition_of = np.searchsorted(partition_boundaries(self.partitions), keys, side="right")
        for partition in np.unique(partition_of):
            known = self._read(int(partition), layers)
            mine = np.flatnonzero(partition_of == partition)
            if known is None or known.sample_ids.type != ids.type:
                continue
            assert known.digests is not None
            at = pc.index_in(ids.take(pa.array(mine)), value_set=known.sample_ids)
            there = at.is_valid().to_numpy(zero_copy_only=False)
            found = at.drop_null().to_numpy().astype(np.int64)
            same = known.digests[found] == digests[mine[there]]
            positions.append(mine[there][same])
            for layer in layers:
                parts[layer].append(known.features[layer][found[same]])
        if not any(len(part) for part in positions):
            return np.empty(0, np.int64), {}
        found = np.concatenate(positions)
        order = np.argsort(found, kind="stable")
        return found[order], {layer: np.concatenate(part)[order] for layer, part in parts.items()}

    def _read(self, partition: int, layers: Sequence[str]) -> Shard | None:
        path = self.folder.features(self.backbone, self.split, partition)
        try:
            digests = self.folder.read_table(path, [DIGEST])[DIGEST].to_numpy()
            return replace(read_shard(self.folder, path, layers), digests=digests)
        except (pa.ArrowInvalid, KeyError, OSError):
            # truncated, of another version, or deleted: its samples are embedded again
            return None


def previous_features(folder: RunFolder, backbone: str, split: str) -> PreviousFeatures | None:
    """The features that a run has of a split by this backbone; None where there are none."""
    there = folder.features(backbone, split, 0).rpartition("/")[0]
    for info in folder.files.get_file_info(fs.FileSelector(there, allow_not_found=True)):
        if not info.path.endswith(".parquet"):
            continue
        try:
            with folder.parquet(info.path) as file:
                metadata = file.schema_arrow.metadata or {}
            partitions = int(metadata.get(_PARTITIONS, 0))
        except (pa.ArrowInvalid, OSError, ValueError):
            continue
        if partitions:
            return PreviousFeatures(folder, backbone, split, partitions)
    return None


def quarantine_table(summaries: list[ShardSummary]) -> pa.Table:
    """{partition, row, sample_id, file, reason} of all samples that could not be embedded."""
    return _table_of([{PARTITION: s.partition, **row} for s in summaries for row in s.quarantined])


def quarantined_rows(rows: Sequence[tuple[str, int, dict[str, object]]]) -> pa.Table:
    """The same with a last column `split`, from (split, partition, row with its reason)."""
    table = _table_of([{PARTITION: partition, **row} for _, partition, row in rows])
    return table.append_column("split", pa.array([split for split, _, _ in rows], pa.string()))


def _table_of(rows: list[dict[str, object]]) -> pa.Table:
    is_text = any(isinstance(row[SAMPLE_ID], str) for row in rows)
    schema = pa.schema(
        [
            (PARTITION, pa.int32()),
            (ROW, pa.int32()),
            (SAMPLE_ID, pa.string() if is_text else pa.int64()),
            (FILE, pa.string()),
            ("reason", pa.string()),
        ]
    )
    return pa.Table.from_pylist(rows, schema=schema)
