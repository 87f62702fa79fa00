"""Which samples take part, and under which label: a value that every step is given and none changes.

A sample is named by its partition and its row there. All of it is kept in flat sorted arrays, so that time and memory
are linear in the samples that were acted on, however many partitions they lie in.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from posttrain.schema import PARTITION, ROW

_ROW_BITS = 32
_NO_KEYS = np.empty(0, np.int64)


def _keys(partitions: np.ndarray | int, rows: np.ndarray) -> np.ndarray:
    """int64: partition * 2^32 + row."""
    return (np.asarray(partitions, np.int64) << _ROW_BITS) + np.asarray(rows, np.int64)


def _found(keys: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions in the sorted `among`, and whether each of the keys is really there."""
    at = np.searchsorted(among, keys)
    there = at < len(among)
    there[there] = among[at[there]] == keys[there]
    return at, there


@dataclass(frozen=True, eq=False)
class Rows:
    """A set of samples."""

    keys: np.ndarray = field(default_factory=lambda: _NO_KEYS)
    """int64, sorted and unique: partition * 2^32 + row."""

    @classmethod
    def of(cls, partitions: np.ndarray | int, rows: np.ndarray) -> Rows:
        """The samples at these places; a place may be given twice."""
        return cls(np.unique(_keys(partitions, rows)))

    @classmethod
    def of_table(cls, table: pa.Table) -> Rows:
        """The samples of a table with the columns `partition` and `row`."""
        return cls.of(table[PARTITION].to_numpy(), table[ROW].to_numpy())

    def __len__(self) -> int:
        return len(self.keys)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and np.array_equal(self.keys, other.keys)

    def __or__(self, other: Rows) -> Rows:
        return Rows(np.union1d(self.keys, other.keys)) if len(self) and len(other) else (self if len(self) else other)

    def __sub__(self, other: Rows) -> Rows:
        return Rows(np.setdiff1d(self.keys, other.keys, assume_unique=True))

    def in_partition(self, partition: int) -> np.ndarray:
        """The rows (int32, sorted) in one partition."""
        first, end = np.searchsorted(self.keys, [partition << _ROW_BITS, (partition + 1) << _ROW_BITS])
        return (self.keys[first:end] & (2**_ROW_BITS - 1)).astype(np.int32)

    def contains(self, partitions: np.ndarray | int, rows: np.ndarray) -> np.ndarray:
        """[rows] bool, of rows in one partition, or each in its own."""
        return _found(_keys(partitions, rows), self.keys)[1]

    def positions(self, partition: int, rows: np.ndarray) -> np.ndarray:
        """Where in the order of the set these rows of one partition stand; all of them are in it."""
        return _found(_keys(partition, rows), self.keys)[0]

    def by_partition(self) -> Iterator[tuple[int, np.ndarray]]:
        """(partition, its rows) for every partition with a sample of the set."""
        for partition in np.unique(self.keys >> _ROW_BITS).tolist():
            yield partition, self.in_partition(partition)


@dataclass(frozen=True, eq=False)
class NewLabels:
    """Samples that were relabelled, with their new labels."""

    rows: Rows = field(default_factory=Rows)
    labels: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """int32, in the order of `rows.keys`."""

    @classmethod
    def of(cls, partitions: np.ndarray | int, rows: np.ndarray, labels: np.ndarray) -> NewLabels:
        """The new labels of the samples at these places, each of which is given once."""
        keys = _keys(partitions, rows)
        order = np.argsort(keys)
        assert (np.diff(keys[order]) > 0).all(), "a sample has two new labels"
        return cls(Rows(keys[order]), labels[order].astype(np.int32))

    def __len__(self) -> int:
        return len(self.rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NewLabels) and self.rows == other.rows and np.array_equal(self.labels, other.labels)

    def __or__(self, other: NewLabels) -> NewLabels:
        """Those of both; no sample may be in both."""
        if not len(self) or not len(other):
            return self if len(self) else other
        keys = np.concatenate([self.rows.keys, other.rows.keys])
        return NewLabels.of(0, keys, np.concatenate([self.labels, other.labels]))

    def in_partition(self, partition: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows (sorted) in one partition and their new labels, both int32."""
        rows = self.rows.in_partition(partition)
        first = np.searchsorted(self.rows.keys, partition << _ROW_BITS)
        return rows, self.labels[first : first + len(rows)]

    def applied(self, partitions: np.ndarray | int, rows: np.ndarray, given: np.ndarray) -> np.ndarray:
        """The present labels [rows] of rows in one partition, or each in its own: `given` or the new ones."""
        at, there = _found(_keys(partitions, rows), self.rows.keys)
        labels = given.copy()
        labels[there] = self.labels[at[there]]
        return labels


@dataclass(frozen=True)
class Removal:
    """Samples that leave the live set, and others that stay in it under a new label."""

    removed: Rows = field(default_factory=Rows)
    relabelled: NewLabels = field(default_factory=NewLabels)

    @property
    def acted_on(self) -> Rows:
        """The samples that are removed or relabelled."""
        return self.removed | self.relabelled.rows


@dataclass(frozen=True)
class Live:
    """The samples of a set that take part, with their present labels; by default all of them, as given.

    The reasons why samples take no part are kept apart, for the counts: removed by this run, removed by previous runs
    of the same job, or quarantined (unreadable, or left out by the leakage guard).
    """

    samples: int
    """Of the whole set."""
    removed: Rows = field(default_factory=Rows)
    """By this run."""
    previously_removed: Rows = field(default_factory=Rows)
    """By previous runs of the same job."""
    quarantined: Rows = field(default_factory=Rows)
    relabelled: NewLabels = field(default_factory=NewLabels)
    """By this run, or by previous ones of the same job."""

    @functools.cached_property
    def excluded(self) -> Rows:
        """All that take no part."""
        return self.removed | self.previously_removed | self.quarantined

    @property
    def count(self) -> int:
        """Samples that take part."""
        return self.samples - len(self.excluded)

    @functools.cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that tell one set of live samples and labels from another."""
        digest = hashlib.sha256()
        for array in (self.excluded.keys, self.relabelled.rows.keys, self.relabelled.labels):
            digest.update(f"{len(array)}:".encode() + array.tobytes())
        return digest.hexdigest()[:16]

    def without(self, removal: Removal) -> Live:
        """What is live once the removal is made."""
        return replace(self, removed=self.removed | removal.removed, relabelled=self.relabelled | removal.relabelled)

    def quarantine(self, rows: Rows) -> Live:
        """What is live without these samples, which cannot be used."""
        return replace(self, quarantined=self.quarantined | rows) if len(rows) else self

    def as_given(self) -> Live:
        """What is live and still has the label that it was given."""
        return self.quarantine(self.relabelled.rows)

    def only(self, partition: int) -> Live:
        """What a process has to know that sees this partition alone."""
        relabelled = NewLabels.of(partition, *self.relabelled.in_partition(partition))
        return Live(self.samples, Rows.of(partition, self.excluded.in_partition(partition)), relabelled=relabelled)

    def mask(self, partitions: np.ndarray | int, rows: np.ndarray) -> np.ndarray:
        """[rows] bool: which of these rows, in one partition or each in its own, take part."""
        return ~self.excluded.contains(partitions, rows)

    def rows(self, partition: int, count: int) -> np.ndarray:
        """Those of a partition's `count` rows that take part, int64."""
        return np.flatnonzero(self.mask(partition, np.arange(count)))

    def labels(self, partitions: np.ndarray | int, rows: np.ndarray, given: np.ndarray) -> np.ndarray:
        """The present labels of these rows, whose given ones are `given`."""
        return self.relabelled.applied(partitions, rows, given)
