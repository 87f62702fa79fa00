"""Label noise for measuring: which labels flip is a function of sample id and seed alone."""

from __future__ import annotations

import numpy as np

from posttrain.errors import LabelRangeError
from posttrain.schema import uniform


def symmetric(labels: np.ndarray, ids: np.ndarray, *, classes: int, rate: float, seed: int) -> np.ndarray:
    """The labels, each replaced with probability `rate` by one of the other classes, all equally likely.

    Decided for each id (see `uniform`); a higher rate flips the same samples and more. The dtype stays.
    Raises LabelRangeError for a label outside 0..classes-1, ValueError for a rate that makes no sense.
    """
    if not 0 <= rate <= 1 or (rate > 0 and classes < 2):
        raise ValueError(f"rate {rate} with {classes} classes; 0 <= rate <= 1 and 2 classes are needed")
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(outside):
        raise LabelRangeError(
            f"label {labels[outside[0]]} at sample_id {ids[outside[0]]} lies outside the {classes} classes "
            f"(0..{classes - 1}); set data.classes or data.label?"
        )
    draw = uniform(ids, seed)
    flips = draw < rate
    # Given draw < rate, draw / rate is uniform again; the minimum guards against its rounding up to 1.
    step = 1 + np.minimum((draw[flips] / rate * (classes - 1)).astype(np.int64), classes - 2) if rate else 0
    noisy = labels.copy()
    noisy[flips] = (labels[flips] + step) % classes
    return noisy
