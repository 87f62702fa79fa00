"""Training images that are in a held-out set, too: the same bytes, or near duplicates, also mirrored.

A digest, a perceptual hash and a thumbnail of every held-out image, some 300 bytes, go into the object store; every
training partition is compared with them where its block lies. Of the training set only the pairs that were found
travel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray

from posttrain.cluster import crash_bisection
from posttrain.cluster.failures import PROCESS_LOST, process_lost, raise_cause
from posttrain.cluster.partitioning import Progress, Split
from posttrain.cluster.tasks import results
from posttrain.schema import FILE, IMAGE, LABEL, PARTITION, ROW, SAMPLE_ID
from posttrain.store.features import image_digests
from posttrain.vision import near_duplicates
from posttrain.vision.near_duplicates import PerceptualHashes

SPLIT, OTHER_ID, SAME_LABEL, DIFFERENCE, MIRRORED, IDENTICAL = (
    "split",
    "other_id",
    "same_label",
    "difference",
    "mirrored",
    "identical",
)
OTHER_PARTITION, OTHER_ROW, OTHER_FILE = "other_partition", "other_row", "other_file"


@dataclass(frozen=True)
class HeldOutImages:
    """What training images are compared with: the images of a held-out partition that can be decoded."""

    samples: pa.Table
    """{split, other_partition, other_row, other_id, label, other_file}."""
    digests: np.ndarray
    """uint64, of the images' bytes."""
    hashes: tuple[PerceptualHashes, PerceptualHashes]
    """Of the images as they are, and mirrored."""


_NONE = np.empty(0, np.int32)

CrashingImage = tuple[str, int, dict[str, object]]
"""An image that crashes the process which decodes it: split, partition, and its row of the quarantine {row, sample_id,
file, reason}."""

Search = Callable[[Any, str, int], np.ndarray]
"""(block, split, partition) -> the rows whose images crash the process that decodes them."""


def find(
    splits: Mapping[str, Split],
    shape: tuple[int, ...] | None,
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[pa.Table, list[CrashingImage]]:
    """Pairs of a training image and a held-out one that are the same or nearly, in the order of partitions and rows.

    Of each image's pairs the closest is kept (of a held-out image's, the closest in each training partition): every
    image that leaks is in the table, though not with all its pairs. `shape`: of images that are raw pixels. Second, the
    images that crash the process which decodes them; `say` is called when the search for these begins. Raises StepError
    where processes end without such an image.
    """
    crashing: list[CrashingImage] = []

    def search(block: ray.ObjectRef[pa.Table], split: str, partition: int) -> np.ndarray:
        say(f"  processes ended at the images of partition {partition} of {split}; looking for the one that does it")
        found = ray.get(_crashing_rows.options(num_cpus=0).remote(block, shape))
        crashing.extend((split, partition, row) for row in found)
        return np.array([row[ROW] for row in found], np.int32)

    held_out = _held_out_images(splits, shape, search)
    train = splits["train"]
    calls = [(partition.block, partition.index, shape, held_out, _NONE) for partition in train.partitions]

    def on_crash(call: tuple[Any, ...]) -> tuple[Any, ...]:
        block, partition, *same, _ = call
        return (block, partition, *same, search(block, "train", partition))

    tables = []
    seen = 0
    for partition, found in zip(train.partitions, results(_compared, calls, on_crash=on_crash), strict=True):
        tables.append(found)
        seen += partition.rows
        progress(seen, train.rows)
    return pa.concat_tables(tables), crashing


def _held_out_images(
    splits: Mapping[str, Split], shape: tuple[int, ...] | None, search: Search
) -> list[ray.ObjectRef[HeldOutImages]]:
    """`HeldOutImages` of each partition of the validation and test sets, in the object store."""
    partitions = [
        (partition.block, name, partition.index)
        for name in ("validation", "test")
        if name in splits
        for partition in splits[name].partitions
    ]

    def start(block: Any, split: str, partition: int, skip: np.ndarray = _NONE) -> list[ray.ObjectRef]:
        # the second result says that the task is done; the first stays in the object store
        return cast(Any, _hashed.remote(block, shape, split, partition, skip))

    started = [start(*partition) for partition in partitions]
    # the tasks that compare reserve no CPU: started earlier, they would only wait, each in a process of its own
    ray.wait([done for _, done in started], num_returns=len(started), fetch_local=False)
    images = []
    try:
        for partition, (found, done) in zip(partitions, started, strict=True):
            try:
                ray.get(done)
            except PROCESS_LOST:
                found, done = start(*partition, search(*partition))
                ray.get(done)
            images.append(found)
    except PROCESS_LOST as error:
        raise process_lost(error) from error
    except Exception as error:
        raise_cause(error)
    return images


@ray.remote(num_returns=2)
def _hashed(
    block: pa.Table, shape: tuple[int, ...] | None, split: str, partition: int, skip: np.ndarray
) -> tuple[HeldOutImages, None]:
    return held_out_images(block, shape, split, partition, skip), None


@ray.remote
def _crashing_rows(block: pa.Table, shape: tuple[int, ...] | None) -> list[dict[str, object]]:
    """The quarantine's rows of the images that crash the process which decodes them."""
    found = crash_bisection.crashing_rows(
        lambda rows: functools.partial(_decoded, block.take(pa.array(rows)).select([IMAGE]), shape),
        np.arange(block.num_rows, dtype=np.int32),
        what="decoded",
        preload=[__name__],
    )
    return crash_bisection.quarantine_rows(block, found)


def held_out_images(
    block: pa.Table, shape: tuple[int, ...] | None, split: str, partition: int, skip: np.ndarray = _NONE
) -> HeldOutImages:
    """What training partitions are compared with, of a held-out partition without the rows `skip`."""
    rows, digests, pixels = _decoded(block, shape, skip)
    taken = block.take(pa.array(rows, pa.int64()))
    table = pa.table(
        {
            SPLIT: pa.array([split] * len(rows), pa.string()),
            OTHER_PARTITION: pa.array(np.full(len(rows), partition), pa.int32()),
            OTHER_ROW: pa.array(rows, pa.int32()),
            OTHER_ID: taken[SAMPLE_ID],
            LABEL: taken[LABEL],
            OTHER_FILE: taken[FILE],
        }
    )
    hashes = near_duplicates.perceptual_hashes
    return HeldOutImages(table, digests, (hashes(pixels), hashes(pixels[:, :, ::-1])))


def _decoded(
    block: pa.Table, shape: tuple[int, ...] | None, skip: np.ndarray = _NONE
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows whose images can be decoded, digests of their bytes, and grey pixels."""
    tried = np.setdiff1d(np.arange(block.num_rows), skip)
    images = block[IMAGE].take(pa.array(tried)) if len(skip) else block[IMAGE]
    pixels, readable = near_duplicates.grey((cell.as_py() for chunk in images.chunks for cell in chunk), shape)
    rows = tried[readable]
    return rows, image_digests(block[IMAGE].take(pa.array(rows, pa.int64()))), pixels


@ray.remote
def _compared(
    block: pa.Table, partition: int, shape: tuple[int, ...] | None, held_out: list[ray.ObjectRef], skip: np.ndarray
) -> pa.Table:
    return compare(block, partition, shape, ray.get(held_out), skip)


def compare(
    block: pa.Table,
    partition: int,
    shape: tuple[int, ...] | None,
    held_out: Sequence[HeldOutImages],
    skip: np.ndarray = _NONE,
) -> pa.Table:
    """The pairs of one training partition, without the rows `skip`, with all held-out images."""
    rows, digests, pixels = _decoded(block, shape, skip)
    others = pa.concat_tables([images.samples for images in held_out]).combine_chunks()
    other_digests = np.concatenate([images.digests for images in held_out])
    mine = near_duplicates.perceptual_hashes(pixels)
    found = [_identical(digests, other_digests)]
    for mirrored in (False, True):
        theirs = near_duplicates.concatenated([images.hashes[mirrored] for images in held_out])
        i, j, difference = near_duplicates.near_duplicate_pairs(mine, theirs)
        found.append((i, j, difference, np.full(len(i), mirrored)))
    i, j, difference, mirrored = (np.concatenate(column) for column in zip(*found, strict=True))
    identical = digests[i] == other_digests[j]
    kept = _closest(i, j, np.where(identical, -1.0, difference))
    i, j, difference, mirrored, identical = (column[kept] for column in (i, j, difference, mirrored, identical))
    taken, pairs = block.take(pa.array(rows[i], pa.int64())), others.take(pa.array(j))
    return pa.table(
        {
            PARTITION: pa.array(np.full(len(i), partition), pa.int32()),
            ROW: pa.array(rows[i], pa.int32()),
            SAMPLE_ID: taken[SAMPLE_ID],
            FILE: taken[FILE],
            **{name: pairs[name] for name in (SPLIT, OTHER_PARTITION, OTHER_ROW, OTHER_ID, OTHER_FILE)},
            SAME_LABEL: pa.array(taken[LABEL].to_numpy() == pairs[LABEL].to_numpy()),
            IDENTICAL: pa.array(identical),
            MIRRORED: pa.array(mirrored),
            DIFFERENCE: pa.array(difference, pa.float32()),
        }
    )


def _identical(mine: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A pair for each image whose bytes are on the other side, too; not all such pairs: blank images make many."""
    values, first_of_mine = np.unique(mine, return_index=True)
    other_values, first_of_others = np.unique(others, return_index=True)
    i, j = np.flatnonzero(np.isin(mine, others)), np.flatnonzero(np.isin(others, mine))
    i, j = (
        np.concatenate([i, first_of_mine[np.searchsorted(values, others[j])]]),
        np.concatenate([first_of_others[np.searchsorted(other_values, mine[i])], j]),
    )
    return i, j, np.zeros(len(i)), np.zeros(len(i), bool)


def _closest(i: np.ndarray, j: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """Positions, in order, of each training image's and each held-out image's first pair by rank."""
    order = np.lexsort((j, i, rank))
    _, of_mine = np.unique(i[order], return_index=True)
    _, of_theirs = np.unique(j[order], return_index=True)
    kept = order[np.union1d(of_mine, of_theirs)]
    return kept[np.lexsort((j[kept], i[kept]))]
