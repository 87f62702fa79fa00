"""Training images that are in a held-out set, too: the same bytes, or nearly the same picture, also mirrored.

Prints of the held-out images (a digest, a hash and a thumbnail each, some 300 bytes) go into the object store; every
training partition is compared with them where it is read. Of the training set nothing travels but what was found.
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
from posttrain.cluster.reading import Progress, Split, raise_cause
from posttrain.cluster.tasks import LOST, ended, results
from posttrain.schema import FILE, IMAGE, LABEL, PARTITION, ROW, SAMPLE_ID
from posttrain.store.features import image_digests
from posttrain.vision import near_duplicates
from posttrain.vision.near_duplicates import Prints

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
class Known:
    """The images of a held-out partition that can be read, as training images are compared with them."""

    samples: pa.Table
    """{split, other_partition, other_row, other_id, label, other_file}."""
    digests: np.ndarray
    """uint64, of the images' bytes."""
    prints: tuple[Prints, Prints]
    """As they are, and mirrored."""


_NONE = np.empty(0, np.int32)

FatalRow = tuple[str, int, dict[str, object]]
"""Split, partition, and a row of the quarantine of an image that ends the process which decodes it: {row, sample_id, file,
reason}."""


def find(
    splits: Mapping[str, Split],
    shape: tuple[int, ...] | None,
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[pa.Table, list[FatalRow]]:
    """Pairs of a training image and a held-out one that are the same or alike, in the order of partitions and rows.

    Of each image's pairs the closest is kept (of a held-out image's, the closest in each training partition): all that
    are concerned appear, without all their pairs. `shape`: of raw cells. Second, the images that end the process which
    decodes them; `say` is told that they are looked for. Raises StepError where processes end without such an image.
    """
    train = splits["train"]
    held_out = [
        (name, partition.index, partition.block)
        for name in ("validation", "test")
        if name in splits
        for partition in splits[name].partitions
    ]
    fatal: list[FatalRow] = []

    def without_fatal(block: ray.ObjectRef, split: str, partition: int) -> np.ndarray:
        say(f"  processes ended at the images of partition {partition} of {split}; looking for the one that does it")
        found = ray.get(_fatal.options(num_cpus=0).remote(block, shape))
        fatal.extend((split, partition, row) for row in found)
        return np.array([row[ROW] for row in found], np.int32)

    def prints_of(block: ray.ObjectRef, split: str, partition: int, skip: np.ndarray = _NONE) -> list[ray.ObjectRef]:
        # the second says whether it is done: the first is not wanted here
        return cast(Any, _printed.remote(block, shape, split, partition, skip))

    known = [prints_of(block, name, number) for name, number, block in held_out]
    # those that compare reserve no CPU: started earlier, they would only wait, each in a process of its own
    ray.wait([done for _, done in known], num_returns=len(known), fetch_local=False)
    printed = []
    try:
        for (name, number, block), (prints, done) in zip(held_out, known, strict=True):
            try:
                ray.get(done)
            except LOST:
                prints, done = prints_of(block, name, number, without_fatal(block, name, number))
                ray.get(done)
            printed.append(prints)
    except LOST as error:
        raise ended(error) from error
    except Exception as error:
        raise_cause(error)
    tables = []
    seen = 0
    calls = [(partition.block, partition.index, shape, printed, _NONE) for partition in train.partitions]

    def instead(call: tuple[Any, ...]) -> tuple[Any, ...]:
        block, partition, *same, _ = call
        return (block, partition, *same, without_fatal(block, "train", partition))

    for partition, found in zip(train.partitions, results(_compared, calls, instead=instead), strict=True):
        tables.append(found)
        seen += partition.rows
        progress(seen, train.rows)
    return pa.concat_tables(tables), fatal


@ray.remote(num_returns=2)
def _printed(
    block: pa.Table, shape: tuple[int, ...] | None, split: str, partition: int, skip: np.ndarray
) -> tuple[Known, None]:
    return described(block, shape, split, partition, skip), None


@ray.remote
def _fatal(block: pa.Table, shape: tuple[int, ...] | None) -> list[dict[str, object]]:
    """The quarantine's rows of the images that end the process which decodes them."""
    ends = crash_bisection.fatal(
        lambda rows: functools.partial(_readable, block.take(pa.array(rows)).select([IMAGE]), shape),
        np.arange(block.num_rows, dtype=np.int32),
        what="decoded",
        preload=[__name__],
    )
    return crash_bisection.fatal_rows(block, ends)


def described(
    block: pa.Table, shape: tuple[int, ...] | None, split: str, partition: int, skip: np.ndarray = _NONE
) -> Known:
    """What training partitions are compared with, of a held-out partition's readable images but those of the rows `skip`."""
    rows, digests, pixels = _readable(block, shape, skip)
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
    return Known(table, digests, (near_duplicates.prints(pixels), near_duplicates.prints(pixels[:, :, ::-1])))


def _readable(
    block: pa.Table, shape: tuple[int, ...] | None, skip: np.ndarray = _NONE
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tried = np.setdiff1d(np.arange(block.num_rows), skip)
    images = block[IMAGE].take(pa.array(tried)) if len(skip) else block[IMAGE]
    pixels, readable = near_duplicates.grey((cell.as_py() for chunk in images.chunks for cell in chunk), shape)
    rows = tried[readable]
    return rows, image_digests(block[IMAGE].take(pa.array(rows, pa.int64()))), pixels


@ray.remote
def _compared(
    block: pa.Table, partition: int, shape: tuple[int, ...] | None, known: list[ray.ObjectRef], skip: np.ndarray
) -> pa.Table:
    return compare(block, partition, shape, ray.get(known), skip)


def compare(
    block: pa.Table,
    partition: int,
    shape: tuple[int, ...] | None,
    known: Sequence[Known],
    skip: np.ndarray = _NONE,
) -> pa.Table:
    """The pairs of one training partition, but for the rows `skip`, with all held-out images."""
    rows, digests, pixels = _readable(block, shape, skip)
    others = pa.concat_tables([held_out.samples for held_out in known]).combine_chunks()
    other_digests = np.concatenate([held_out.digests for held_out in known])
    mine = near_duplicates.prints(pixels)
    found = [_identical(digests, other_digests)]
    for mirrored in (False, True):
        theirs = near_duplicates.together([held_out.prints[mirrored] for held_out in known])
        i, j, difference = near_duplicates.alike(mine, theirs)
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
    """A pair for each image of which the other side has the bytes: not all pairs, of which blank ones make many."""
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
