"""The selection of a round: which samples are acted on, found exactly from streamed scores in any order.

The rule: sort all candidates by (score descending, id ascending) and walk down; select a sample unless its class has
reached its cap; stop when `at_most` are selected. The walk is never made. A float32 maps to 32 bits in the same order,
so counting those bits digit by digit (radix selection, most significant digit first) finds the last score of every
class without holding a column of scores.

Why each class may be counted by itself: only its own samples use up its cap. With E the first `caps[c]` samples of
every class c, the walk selects the first `at_most` of E.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from posttrain.errors import StepError

Ids: TypeAlias = NDArray[Any]
"""[n] int64, or strings: ids that sort."""
Bits: TypeAlias = NDArray[np.uint32]
Counts: TypeAlias = NDArray[np.int64]
Mask: TypeAlias = NDArray[np.bool_]
Block: TypeAlias = tuple[Ids, NDArray[np.integer[Any]], NDArray[np.float32]]
"""(sample ids, labels, scores), each [n]."""

# 11 bits, not 16: 1,000 classes then count in 16 MB instead of 524 MB, for one more pass over the scores.
_DIGITS = ((21, 11), (10, 11), (0, 10))  # (shift, width in bits), most significant first
_SIGN = np.uint32(0x8000_0000)


def ordered_bits(scores: NDArray[np.float32]) -> Bits:
    """32 bits for each score that compare as the scores do; 0.0 and -0.0 give the same.

    Raises ValueError where a score is not a number: it has no place in an order.
    """
    # + 0.0: turns -0.0 into 0.0, which compares equal to it and must tie with it
    scores = np.asarray(scores, dtype=np.float32) + np.float32(0)
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {scores.size} scores are not a number (NaN)")
    bits = scores.view(np.uint32)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


_INFINITE = int(ordered_bits(np.array([np.inf], dtype=np.float32))[0])  # no score is above it


class Histograms:
    """How often each value of one digit of the score bits occurs in each class.

    `counts` [classes, 2^width]. Only bits above `floor` count, and, where `prefix` [classes] is given, only
    those whose leading bits are their class's prefix. Histograms of parts of the data add up with `+`.
    """

    def __init__(self, shift: int, width: int, *, floor: int, classes: int, prefix: Counts | None = None) -> None:
        self.shift, self.width, self.floor, self.classes, self.prefix = shift, width, floor, classes, prefix
        self.counts: Counts = np.zeros((classes, 1 << width), dtype=np.int64)

    def add(self, scores: NDArray[np.float32], labels: NDArray[np.integer[Any]]) -> None:
        """Counts a block: scores [n], labels [n]. Raises ValueError on NaN and on unknown labels."""
        labels = np.asarray(labels)
        if labels.size and not 0 <= labels.min() <= labels.max() < self.classes:
            raise ValueError(f"labels run from {labels.min()} to {labels.max()}, but there are {self.classes} classes")
        bits = ordered_bits(scores)
        counted = bits > self.floor
        if self.prefix is not None:
            counted &= (bits >> np.uint32(self.shift + self.width)) == self.prefix[labels]
        digits = (bits[counted] >> np.uint32(self.shift)) & np.uint32((1 << self.width) - 1)
        cells = (labels[counted].astype(np.int64) << self.width) | digits
        self.counts += np.bincount(cells, minlength=self.counts.size).reshape(self.counts.shape)

    def __add__(self, other: Histograms) -> Histograms:
        """The histograms of both parts together."""
        total = Histograms(self.shift, self.width, floor=self.floor, classes=self.classes, prefix=self.prefix)
        total.counts = self.counts + other.counts
        return total


@dataclass(frozen=True)
class Threshold:
    """Of a class: all scores above `bits` are selected, and of those equal to it the ids up to `last_id`."""

    bits: int
    last_id: int | str | None = None


@dataclass(frozen=True)
class Selection:
    """The `Threshold` of every class, and how many samples that selects."""

    thresholds: tuple[Threshold, ...]
    candidates: int
    """Samples that `select` chose from: their score lies above its `threshold`."""
    per_class: tuple[int, ...]
    """Selected samples of each class."""
    _bits: Bits = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_bits", np.array([threshold.bits for threshold in self.thresholds], dtype=np.uint32))

    @property
    def total(self) -> int:
        """Selected samples."""
        return sum(self.per_class)

    def mask(self, sample_ids: Ids, labels: NDArray[np.integer[Any]], scores: NDArray[np.float32]) -> Mask:
        """[n] bool: which samples of a block are selected."""
        bits, limits = ordered_bits(scores), self._bits[labels]
        selected = bits > limits
        tied = np.flatnonzero(bits == limits)
        for c in map(int, np.unique(labels[tied])):
            last_id = self.thresholds[c].last_id
            if last_id is not None:
                rows = tied[labels[tied] == c]
                selected[rows] = np.asarray(sample_ids)[rows] <= last_id
        return selected


def select(
    blocks: Callable[[], Iterable[Block]],
    *,
    classes: int,
    at_most: int,
    caps: NDArray[np.integer[Any]],
    threshold: float,
) -> Selection:
    """The samples that the rule above selects, the same for any order and any division into blocks.

    `blocks()` streams all samples and is called three times, a fourth time where only some of the tied are selected.
    Candidates score strictly above `threshold` (as float32; -inf: every sample but those at -inf). Class c
    gives at most `caps[c]`, all together `at_most`. Memory: a few arrays of classes x 2,048 counts, a block,
    and in the fourth pass the tied ids that are selected. Raises ValueError on NaN and on unknown labels,
    StepError where two passes do not see the same scores.
    """
    floor = int(ordered_bits(np.array([threshold], dtype=np.float32))[0])
    most = np.maximum(np.asarray(caps, dtype=np.int64), 0)
    if most.shape != (classes,):
        raise ValueError(f"caps has the shape {most.shape}, but there are {classes} classes")
    at_most = max(at_most, 0)
    candidates = 0
    prefix = np.zeros(classes, dtype=np.int64)  # leading digits of each class's threshold
    above = np.zeros(classes, dtype=np.int64)  # candidates whose leading digits lie above it
    tied = np.zeros(classes, dtype=np.int64)  # candidates whose leading digits are it
    own = np.zeros(classes, dtype=np.bool_)  # its cap sets the threshold, not the budget

    for level, (shift, width) in enumerate(_DIGITS):
        histograms = Histograms(shift, width, floor=floor, classes=classes, prefix=prefix if level else None)
        for _, labels, scores in blocks():
            histograms.add(scores, labels)
        counts = histograms.counts
        if level == 0:
            tied = counts.sum(axis=1)
            candidates = int(tied.sum())
            # No more than there are: then every class, and the budget, ends at a sample that exists
            most = np.minimum(most, tied)
            at_most = min(at_most, int(most.sum()))
        if (tied != counts.sum(axis=1)).any():
            raise StepError("the scores changed while the selection was being made; start the same command again")
        # at_least[c, j]: candidates of c whose digits so far are j or more
        at_least = above[:, None] + np.cumsum(counts[:, ::-1], axis=1)[:, ::-1]
        given = np.minimum(at_least[~own], most[~own, None]).sum(axis=0) + most[own].sum()
        of_budget = _last_reaching(given[None, :], np.array([at_most]))[0]
        of_cap = _last_reaching(at_least, most)
        own |= of_cap > of_budget
        digit = np.where(own, of_cap, of_budget)
        tied = counts[np.arange(classes), digit]
        above = at_least[np.arange(classes), digit] - tied
        prefix = (prefix << width) | digit

    room = np.minimum(tied, most - above)  # of the tied samples, those that the class may still give
    budget = at_most - int(most[own].sum()) - int(above[~own].sum())  # left for the tied of the other classes
    contested = ~own & (budget < room[~own].sum())
    room[contested] = np.minimum(room[contested], budget)
    lowest = _lowest_ids(blocks, prefix, np.where(contested | (room < tied), room, 0))
    if contested.any():
        room[contested] = _shares({c: lowest[c] for c in lowest if contested[c]}, budget, classes)[contested]
    thresholds = tuple(_threshold(int(prefix[c]), int(room[c]), int(tied[c]), lowest.get(c)) for c in range(classes))
    return Selection(thresholds, candidates, tuple(int(n) for n in above + room))


def _last_reaching(at_least: Counts, wanted: Counts) -> Counts:
    """The last column of each row (which decrease from left to right) that is still at least as large as `wanted`."""
    return (at_least >= wanted[:, None]).sum(axis=1) - 1


def _lowest_ids(blocks: Callable[[], Iterable[Block]], bits: Counts, wanted: Counts) -> dict[int, Ids]:
    """The `wanted[c]` lowest ids, ascending, among the samples of class c whose score bits are `bits[c]`."""
    found: dict[int, list[Ids]] = {int(c): [] for c in np.flatnonzero(wanted)}
    if not found:
        return {}
    for sample_ids, labels, scores in blocks():
        tied = np.flatnonzero((ordered_bits(scores) == bits[labels]) & (wanted[labels] > 0))
        for c in np.unique(labels[tied]).tolist():
            found[c].append(np.asarray(sample_ids)[tied[labels[tied] == c]])
            # Now and then, not at every block: the ids that are kept are sorted again each time
            if sum(map(len, found[c])) > 2 * wanted[c] + 65_536:
                found[c] = [np.sort(np.concatenate(found[c]))[: wanted[c]]]
    return {c: np.sort(np.concatenate(ids))[: wanted[c]] for c, ids in found.items()}


def _shares(lowest: dict[int, Ids], budget: int, classes: int) -> Counts:
    """How many of each class are among the `budget` lowest ids of all classes."""
    if not lowest:
        return np.zeros(classes, dtype=np.int64)
    first = np.argsort(np.concatenate(list(lowest.values())), kind="stable")[:budget]
    origin = np.repeat(np.array(list(lowest)), [len(ids) for ids in lowest.values()])
    return np.bincount(origin[first], minlength=classes)


def _threshold(bits: int, selected: int, tied: int, lowest: Ids | None) -> Threshold:
    """The threshold that selects all above `bits` and this many of the samples tied at it."""
    if selected == 0:
        return Threshold(min(bits, _INFINITE))
    if selected == tied or lowest is None:
        return Threshold(bits - 1)
    return Threshold(bits, lowest[selected - 1 : selected].tolist()[0])
