"""The scores of a round while they are being made."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from posttrain.store.folder import RunFolder
from posttrain.store.scores import ScoreShards, content_digest, delete_score_shards


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path))


def scores(partition: int, *, text: bool = False) -> pa.Table:
    draw = np.random.default_rng(partition)
    ids = pa.array([f"é{i}" for i in range(50)]) if text else pa.array(range(50), pa.int64())
    columns = {"loss": draw.normal(size=50).astype(np.float32), "margin": draw.normal(size=50).astype(np.float32)}
    return pa.table({"sample_id": ids, "label": pa.array([partition] * 50, pa.int32()), **columns})


def as_one_file(tables: list[pa.Table]) -> bytes:
    """As a round writes them to its `scores.parquet`."""
    stream = io.BytesIO()
    with pq.ParquetWriter(stream, tables[0].schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)
    return stream.getvalue()


@pytest.mark.parametrize("text", [False, True])
def test_the_file_of_a_round_is_the_same_to_the_byte_whether_its_tables_were_kept_in_between(
    folder: RunFolder, text: bool
) -> None:
    tables = [scores(partition, text=text) for partition in range(3)]
    kept = ScoreShards(folder, 2, "key")
    for partition, table in enumerate(tables):
        kept.write(partition, table)
    found = [kept.read(partition) for partition in range(3)]
    assert as_one_file([table for table in found if table is not None]) == as_one_file(tables)


def test_shards_of_another_digest_or_round_are_not_used_and_go_with_their_round(folder: RunFolder) -> None:
    kept = ScoreShards(folder, 2, "key")
    kept.write(7, scores(7))
    assert kept.partitions() == {7}
    for other in (replace(kept, digest="other"), replace(kept, number=3)):
        assert other.partitions() == set()
        other.write(1, scores(1))
    delete_score_shards(folder, 2)
    assert kept.partitions() == set()
    assert replace(kept, number=3).partitions() == {1}
    delete_score_shards(folder, 2)  # nothing is there any more


def test_a_shard_that_was_cut_short_counts_as_missing(folder: RunFolder) -> None:
    kept = ScoreShards(folder, 1, "key")
    kept.write(0, scores(0))
    path = next(Path(folder.location).rglob("00000.parquet"))
    path.write_bytes(path.read_bytes()[:-40])
    assert kept.read(0) is None
    # of a writer that was killed: not a partition
    path.with_name("00001.parquet.abc.tmp").write_bytes(b"")
    assert kept.partitions() == {0}


@dataclass(frozen=True)
class Inner:
    weights: torch.Tensor
    l2: float


@dataclass(frozen=True)
class Outer:
    parts: tuple[Inner, ...]
    seed: int
    name: str | None = None


BEFORE = Outer((Inner(torch.arange(6.0).view(2, 3), 0.1), Inner(torch.ones(2).double(), 1.0)), 3)


def test_equal_contents_have_one_digest() -> None:
    again = Outer((Inner(torch.arange(6.0).view(2, 3).clone(), 0.1), Inner(torch.ones(4).double()[:2], 1.0)), 3)
    # a view of another layout in memory, too
    turned = replace(BEFORE, parts=(Inner(torch.arange(6.0).view(2, 3).T.contiguous().T, 0.1), BEFORE.parts[1]))
    assert content_digest(again) == content_digest(BEFORE) == content_digest(turned)


@pytest.mark.parametrize(
    "other",
    [
        replace(BEFORE, seed=4),
        replace(BEFORE, name=""),
        replace(BEFORE, parts=BEFORE.parts[:1]),
        replace(BEFORE, parts=BEFORE.parts[::-1]),
        replace(BEFORE, parts=(replace(BEFORE.parts[0], l2=0.1 + 2**-56), BEFORE.parts[1])),
        replace(BEFORE, parts=(replace(BEFORE.parts[0], weights=torch.arange(6.0).view(3, 2)), BEFORE.parts[1])),
        replace(
            BEFORE, parts=(replace(BEFORE.parts[0], weights=torch.arange(6.0).double().view(2, 3)), BEFORE.parts[1])
        ),
        replace(
            BEFORE,
            parts=(replace(BEFORE.parts[0], weights=torch.arange(6.0).view(2, 3) * (1 + 2**-22)), BEFORE.parts[1]),
        ),
    ],
)
def test_whatever_differs_gives_another_digest(other: Any) -> None:
    assert content_digest(other) != content_digest(BEFORE)


def test_what_lies_in_which_argument_matters() -> None:
    assert content_digest("ab", "c") != content_digest("a", "bc")
    assert content_digest((1, 2), 3) != content_digest(1, (2, 3))
