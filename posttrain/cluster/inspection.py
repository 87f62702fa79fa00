"""Checks of partitions: counts and a digest of each, ids that occur twice, ids that two sets share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from posttrain.arrow_compute import pc
from posttrain.errors import DuplicateIdError
from posttrain.schema import FILE, LABEL, SAMPLE_ID


@dataclass(frozen=True)
class Inspection:
    """What the driver needs to know of a partition."""

    rows: int
    class_counts: np.ndarray
    digest: bytes
    """SHA-256 over ids and labels."""
    duplicate: tuple[Any, str, str] | None
    """(id, file, file) of a sample that occurs twice."""


def inspect(table: pa.Table, classes: int) -> Inspection:
    """Counts and digest of a partition, and the first id in it that occurs twice."""
    labels = table[LABEL].to_numpy()
    counts = np.bincount(labels[labels >= 0], minlength=classes)
    digest = hashlib.sha256()
    ids = table[SAMPLE_ID].to_pylist()
    for identity, label in zip(ids, labels, strict=True):
        digest.update(f"{identity!r}\t{label}\n".encode())
    duplicate = None
    if len(set(ids)) < len(ids):
        seen: dict[Any, int] = {}
        for at, identity in enumerate(ids):
            if identity in seen:
                first, second = table[FILE][seen[identity]].as_py(), table[FILE][at].as_py()
                duplicate = (identity, first, second)
                break
            seen[identity] = at
    return Inspection(table.num_rows, counts, digest.digest(), duplicate)


@ray.remote
def inspect_remotely(table: pa.Table, classes: int) -> Inspection:
    """`inspect` as a task."""
    return inspect(table, classes)


@ray.remote
def _only_ids(block: pa.Table) -> pa.Table:
    return block.select([SAMPLE_ID])


def _first_shared_id(
    training: pa.Table, others: list[list[ray.ObjectRef[pa.Table]]], other_names: list[str]
) -> tuple[Any, str] | None:
    """(id, split) of the first id of a training partition that is in another split, too."""
    ids = training[SAMPLE_ID].combine_chunks()
    for name, references in zip(other_names, others, strict=True):
        for reference in references:
            other = ray.get(reference)[SAMPLE_ID].combine_chunks()
            if other.type != ids.type:
                continue
            both = ids.filter(pc.is_in(ids, other))
            if len(both):
                return both[0].as_py(), name
    return None


def refuse_shared_ids(
    training: Sequence[ray.ObjectRef[pa.Table]],
    held_out: Mapping[str, Sequence[ray.ObjectRef[pa.Table]]],
    *,
    here: bool,
) -> None:
    """Raises DuplicateIdError where a training block shares an id with a block of a held-out set.

    `here`: look for shared ids in this process.
    """
    if not held_out:
        return
    names = list(held_out)
    if here:
        others = [list(blocks) for blocks in held_out.values()]
        found = [_first_shared_id(ray.get(block), others, names) for block in training]
    else:
        others = [[_only_ids.remote(block) for block in blocks] for blocks in held_out.values()]
        task = ray.remote(_first_shared_id)
        found = ray.get([task.remote(block, others, names) for block in training])
    for shared in found:
        if shared is not None:
            identity, name = shared
            raise DuplicateIdError(
                f"sample_id {identity!r} is in both the train and the {name} set; what is measured on must not be "
                "trained on: take it out of one of them, or, where ids begin anew in each set, set data.id_scope to set"
            )
