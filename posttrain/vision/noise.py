"""Label noise for measuring: which labels flip is a function of sample id, seed and, for one kind, the image."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from posttrain.errors import LabelRangeError
from posttrain.schema import stream_seed, uniform

_RATE_SPREAD = 0.1
"""Standard deviation of a sample's flip rate around the mean (Xia et al. 2020, Algorithm 2)."""
_SUM_STEP = 2.0**-20
"""What the weights of the images' values are multiples of."""
_SUM_VALUES = 2**24
"""Pixel values multiplied at once: 128 MiB as float64."""


def symmetric(labels: np.ndarray, ids: np.ndarray, *, classes: int, rate: float, seed: int) -> np.ndarray:
    """The labels, each replaced with probability `rate` by one of the other classes, all equally likely.

    Decided for each id (see `uniform`); a higher rate flips the same samples and more. The dtype stays.
    Raises LabelRangeError for a label outside 0..classes-1, ValueError for a rate that makes no sense.
    """
    _check(labels, ids, classes, rate)
    draw = uniform(ids, seed)
    flips = draw < rate
    # Given draw < rate, draw / rate is uniform again; the minimum guards against its rounding up to 1.
    step = 1 + np.minimum((draw[flips] / rate * (classes - 1)).astype(np.int64), classes - 2) if rate else 0
    noisy = labels.copy()
    noisy[flips] = (labels[flips] + step) % classes
    return noisy


def pair(labels: np.ndarray, ids: np.ndarray, *, classes: int, rate: float, seed: int) -> np.ndarray:
    """The labels, each replaced with probability `rate` by the next class (the last by the first).

    Decided for each id, the same ones as in `symmetric`; a higher rate flips the same samples and more. The
    dtype stays. Raises as `symmetric` does.
    """
    _check(labels, ids, classes, rate)
    flips = uniform(ids, seed) < rate
    noisy = labels.copy()
    noisy[flips] = (labels[flips] + 1) % classes
    return noisy


def from_matrix(labels: np.ndarray, ids: np.ndarray, *, matrix: np.ndarray, seed: int) -> np.ndarray:
    """The labels drawn anew from a transition matrix [classes, classes]: row y holds P(given label | true y).

    Decided for each id. The dtype stays. Raises LabelRangeError for a label outside the matrix, ValueError
    where the matrix is not square or a row is no distribution.
    """
    matrix = np.asarray(matrix, np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"the transition matrix has the shape {matrix.shape}; it has to be square")
    sums = matrix.sum(axis=1)
    # written so that NaN, which no comparison holds for, is no distribution either
    distributions = (matrix >= 0).all(axis=1) & (abs(sums - 1) <= 1e-6)
    if not distributions.all():
        row = int(np.argmin(distributions))
        raise ValueError(
            f"row {row} of the transition matrix is no distribution: its smallest value is {matrix[row].min():g} "
            f"and its sum {sums[row]:g}"
        )
    _check(labels, ids, len(matrix), 0.0)
    return _drawn(matrix[labels], uniform(ids, seed)).astype(labels.dtype)


def instance_dependent(
    labels: np.ndarray, ids: np.ndarray, pixels: np.ndarray, *, classes: int, rate: float, seed: int
) -> np.ndarray:
    """The labels, flipped to what the image itself suggests: drawn from `instance_chances`.

    Decided for each id and its image. The dtype stays. Raises as `symmetric` does, and ValueError for pixels
    that are not one uint8 image per label.
    """
    chances = instance_chances(labels, ids, pixels, classes=classes, rate=rate, seed=seed)
    return _drawn(chances, uniform(ids, seed)).astype(labels.dtype)


def instance_chances(
    labels: np.ndarray, ids: np.ndarray, pixels: np.ndarray, *, classes: int, rate: float, seed: int
) -> np.ndarray:
    """[n, classes] P(given label | true label, image), float64, of instance-dependent noise.

        q_i                     for c = y_i:  1 - q_i
        q_i softmax_c(x_i W_y)  for c != y_i: over these alone      (Xia et al. 2020, Algorithm 2)

    q_i, the sample's own flip rate, is normal around `rate` with a deviation of 0.1, cut to [0, 1]; the cut
    raises the mean of small rates (0.2055 at 0.2). A rate of 0 flips nothing. W_y [values, classes] is standard
    normal, one for each true class y. `pixels` uint8 [n, ...] are x_i, here scaled to -1..1. Bit by bit the
    same for a sample in any order and company. Holds one W_y at a time. Raises as `instance_dependent` does.
    """
    _check(labels, ids, classes, rate)
    if pixels.dtype != np.uint8 or len(pixels) != len(labels):
        raise ValueError(
            f"pixels {pixels.dtype} {pixels.shape} for {len(labels)} labels; one uint8 image each is needed"
        )
    chances = np.zeros((len(labels), classes))
    chances[np.arange(len(labels)), labels] = 1
    if not len(labels) or not rate:
        return chances
    flat = pixels.reshape(len(pixels), -1)
    flip_rate = _truncated_normal(uniform(ids, stream_seed("flip rate", seed)), rate, _RATE_SPREAD)
    rows_at_once = max(1, _SUM_VALUES // max(1, flat.shape[1]))
    for y, weights in enumerate(_weights(classes, flat.shape[1], seed)):
        of_class = np.flatnonzero(labels == y)
        for start in range(0, len(of_class), rows_at_once):
            rows = of_class[start : start + rows_at_once]
            # whole numbers times multiples of 2^-20: float64 adds these up without rounding (to 5 million values),
            # so that neither the order of the additions nor the rest of the block can tip a draw
            logits = (flat[rows] * 2.0 - 255) @ weights / 255
            logits[:, y] = -np.inf
            others = np.exp(logits - logits.max(axis=1, keepdims=True))
            chances[rows] = flip_rate[rows, None] * others / others.sum(axis=1, keepdims=True)
            chances[rows, y] = 1 - flip_rate[rows]
    return chances


def _weights(classes: int, values: int, seed: int) -> Iterator[np.ndarray]:
    """W_y [values, classes] of each true class, float64, in multiples of `_SUM_STEP`."""
    import torch  # seconds in every process that reads, and the other kinds do without

    generator = torch.Generator().manual_seed(stream_seed("instance noise", seed) % 2**63)
    for _ in range(classes):
        weights = torch.randn(values, classes, generator=generator).double().numpy()
        yield np.rint(weights / _SUM_STEP) * _SUM_STEP


def _check(labels: np.ndarray, ids: np.ndarray, classes: int, rate: float) -> None:
    if not 0 <= rate <= 1 or (rate > 0 and classes < 2):
        raise ValueError(f"rate {rate} with {classes} classes; 0 <= rate <= 1 and 2 classes are needed")
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(outside):
        raise LabelRangeError(
            f"label {labels[outside[0]]} at sample_id {ids[outside[0]]} lies outside the {classes} classes "
            f"(0..{classes - 1}); set data.classes or data.label?"
        )


def _drawn(chances: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """The class of each row at which the running sum of its chances passes the draw."""
    running = chances.cumsum(axis=1)
    # not 1 to the last bit: the draw is scaled instead of falling behind the last class
    return (draw[:, None] * running[:, -1:] >= running[:, :-1]).sum(axis=1)


def _truncated_normal(draw: np.ndarray, mean: float, deviation: float) -> np.ndarray:
    """Uniform draws as a normal that is cut to [0, 1], by its inverse distribution function."""
    import torch  # as in `_weights`

    def below(x: float) -> float:
        return 0.5 * (1 + math.erf((x - mean) / deviation / math.sqrt(2)))

    low, high = below(0.0), below(1.0)
    quantiles = torch.from_numpy(low + draw * (high - low)).clamp(1e-15, 1 - 1e-15)
    return (mean + deviation * torch.special.ndtri(quantiles).numpy()).clip(0.0, 1.0)
