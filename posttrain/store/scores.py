"""The scores of a round before it is committed: one Parquet shard per partition.

A run that is killed while it scores continues with the missing partitions. The path of a shard holds a digest of
everything that determines its content, so that shards of another decision boundary are never used.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from posttrain.store.folder import RunFolder


@dataclass(frozen=True)
class ScoreShards:
    """The shards of one round's scores. Picklable: workers write for themselves."""

    folder: RunFolder
    number: int
    """Number of the round."""
    digest: str
    """`content_digest` of everything that determines the scores."""

    def partitions(self) -> set[int]:
        """The partitions whose shards exist."""
        shards = fs.FileSelector(self._place, allow_not_found=True)
        names = (info.base_name for info in self.folder.files.get_file_info(shards))
        return {int(name.removesuffix(".parquet")) for name in names if name.endswith(".parquet")}

    def write(self, partition: int, table: pa.Table) -> None:
        # kept for minutes, and computed again after a power cut; lz4 costs next to nothing
        with self.folder.writing(self._path(partition), durable=False) as stream:
            pq.write_table(table, stream, compression="lz4")

    def read(self, partition: int) -> pa.Table | None:
        """The scores of a partition; None where there is no readable shard."""
        try:
            return self.folder.read_table(self._path(partition))
        except (pa.ArrowInvalid, OSError):
            return None

    def _path(self, partition: int) -> str:
        return f"{self._place}/{partition:05d}.parquet"

    @property
    def _place(self) -> str:
        return self.folder.round(self.number, "scoring", self.digest)


def delete_score_shards(folder: RunFolder, number: int) -> None:
    """Delete the shards of a round, whose `scores.parquet` holds all scores."""
    with contextlib.suppress(FileNotFoundError):
        folder.files.delete_dir(folder.round(number, "scoring"))


def content_digest(*things: object) -> str:
    """16 hexadecimal digits that identify numbers, texts, arrays, tensors, and containers and dataclasses of these."""
    digest = hashlib.sha256()
    for part in _parts(things):
        digest.update(part)
    return digest.hexdigest()[:16]


def _parts(thing: Any) -> Iterator[bytes]:
    yield f"{type(thing).__name__}(".encode()
    if is_dataclass(thing):
        for field in fields(thing):
            yield f"{field.name}=".encode()
            yield from _parts(getattr(thing, field.name))
    elif isinstance(thing, tuple | list):
        for part in thing:
            yield from _parts(part)
    elif isinstance(thing, str | int | float | bool | None):
        yield repr(thing).encode()
    else:
        # a tensor, or an array
        array = np.ascontiguousarray(thing)
        yield f"{array.dtype}{array.shape}".encode()
        yield array.tobytes()
    yield b")"
