"""How well wrong labels were found, where the true labels are known: measured after everything is decided."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray

from posttrain.cluster.partitioning import Split
from posttrain.cluster.tasks import results
from posttrain.live import Removal
from posttrain.schema import LABEL, TRUE_LABEL


@dataclass(frozen=True)
class Detection:
    """What was removed or relabelled, against the samples whose given label is wrong."""

    wrong: int
    acted_on: int
    """Samples removed or relabelled."""
    wrong_acted_on: int
    """Of these, how many had a wrong label."""
    relabelled: int
    relabelled_right: int
    """Relabelled samples whose new label is the true one."""

    @property
    def relabel_accuracy(self) -> float | None:
        return self.relabelled_right / self.relabelled if self.relabelled else None

    @property
    def precision(self) -> float | None:
        return self.wrong_acted_on / self.acted_on if self.acted_on else None

    @property
    def recall(self) -> float | None:
        return self.wrong_acted_on / self.wrong if self.wrong else None


@ray.remote
def _count(block: pa.Table, removed: np.ndarray, relabelled: np.ndarray, labels: np.ndarray) -> tuple[int, int, int]:
    wrong = is_wrong(block)
    right = block[TRUE_LABEL].to_numpy()[relabelled] == labels
    return int(wrong.sum()), int(wrong[removed].sum() + wrong[relabelled].sum()), int(right.sum())


@ray.remote
def _wrong_rows(block: pa.Table) -> np.ndarray:
    return is_wrong(block)


def is_wrong(block: pa.Table) -> np.ndarray:
    """[rows] bool: the given label is not the true one; False where either is missing."""
    given, true = block[LABEL].to_numpy(), block[TRUE_LABEL].to_numpy()
    return (given >= 0) & (true >= 0) & (given != true)


def detection(split: Split, removal: Removal) -> Detection:
    """Counts over all of the split's samples."""
    removed, relabelled = removal.removed, removal.relabelled
    counts = list(
        results(
            _count,
            [(p.block, removed.in_partition(p.index), *relabelled.in_partition(p.index)) for p in split.partitions],
        )
    )
    return Detection(
        sum(wrong for wrong, _, _ in counts),
        len(removed) + len(relabelled),
        sum(found for _, found, _ in counts),
        len(relabelled),
        sum(right for _, _, right in counts),
    )


def wrong_rows(split: Split) -> dict[int, np.ndarray]:
    """partition -> [rows] bool: the given label is wrong. For benchmarks."""
    found = results(_wrong_rows, [(p.block,) for p in split.partitions])
    return {p.index: wrong for p, wrong in zip(split.partitions, found, strict=True)}
