"""Label noise for measuring: which labels flip is a function of sample id, seed and, for one kind, the image."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from posttrain.errors import LabelRangeError
from posttrain.schema import ImageSpec, stream_seed, uniform

_RATE_SPREAD = 0.1
"""Standard deviation of a sample's flip rate around the mean (Xia et al. 2020, Algorithm 2)."""
_SUM_STEP = 2.0**-20
"""The weights W_y are rounded to multiples of this."""
_SUM_VALUES = 2**24
"""Pixel values multiplied at once: 128 MiB as float64."""
_SEED_OFFSET = 2
"""Added to the seed of `LabelNoise`; any number that no other purpose adds."""


@dataclass(frozen=True)
class LabelNoise:
    """Labels of the training and validation data that are flipped on purpose, for measuring."""

    kind: Literal["symmetric", "pair", "instance", "matrix"]
    rate: float | None
    """None with kind matrix."""
    seed: int
    matrix: tuple[tuple[float, ...], ...] | None
    """Kind matrix: row y holds the chance of each given label where the class is y."""
    image: ImageSpec
    """How images are decoded, which kind instance needs."""


def noisy_labels(
    labels: np.ndarray, ids: np.ndarray, images: pa.Array | pa.ChunkedArray, noise: LabelNoise, classes: int
) -> np.ndarray:
    """The labels of a block with the noise; the true labels are the labels given here.

    An empty label (-1) stays, and with kind instance that of an unreadable image.
    """
    seed = noise.seed + _SEED_OFFSET
    noisy, given = labels.copy(), labels >= 0
    if noise.kind == "matrix":
        assert noise.matrix is not None, "the run file's check"
        noisy[given] = from_matrix(labels[given], ids[given], matrix=np.array(noise.matrix), seed=seed)
        return noisy
    assert noise.rate is not None, "the run file's check"
    if noise.kind == "instance":
        from posttrain.vision.images import decode_column  # torch: the other kinds do without

        spec = noise.image
        pixels, readable, _ = decode_column(
            images, channels=spec.channels, size=spec.size, shape=spec.shape, background=spec.background
        )
        decoded = given & readable
        noisy[decoded] = instance_dependent(
            labels[decoded], ids[decoded], pixels.numpy()[given[readable]], classes=classes, rate=noise.rate, seed=seed
        )
        return noisy
    flip = {"symmetric": symmetric, "pair": pair}[noise.kind]
    noisy[given] = flip(labels[given], ids[given], classes=classes, rate=noise.rate, seed=seed)
    return noisy


def symmetric(labels: np.ndarray, ids: np.ndarray, *, classes: int, rate: float, seed: int) -> np.ndarray:
    """The labels, each replaced with probability `rate` by one of the other classes, all equally likely.

    Decided for each id (see `uniform`); a higher rate flips the same samples and more. The dtype stays.
    Raises LabelRangeError for a label outside 0..classes-1, ValueError for a rate that makes no sense.
    """
    _check(labels, ids, classes, rate)
    chance = uniform(ids, seed)
    flips = chance < rate
    # Given chance < rate, chance / rate is uniform again; the minimum guards against its rounding up to 1.
    step = 1 + np.minimum((chance[flips] / rate * (classes - 1)).astype(np.int64), classes - 2) if rate else 0
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
    """Labels sampled from a transition matrix [classes, classes]: row y holds P(given label | true y).

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
    return _sampled(matrix[labels], uniform(ids, seed)).astype(labels.dtype)


def instance_dependent(
    labels: np.ndarray, ids: np.ndarray, pixels: np.ndarray, *, classes: int, rate: float, seed: int
) -> np.ndarray:
    """The labels, flipped to what the image itself suggests: sampled from `instance_chances`.

    Decided for each id and its image. The dtype stays. Raises as `symmetric` does, and ValueError for pixels
    that are not one uint8 image per label.
    """
    chances = instance_chances(labels, ids, pixels, classes=classes, rate=rate, seed=seed)
    return _sampled(chances, uniform(ids, seed)).astype(labels.dtype)


def instance_chances(
    labels: np.ndarray, ids: np.ndarray, pixels: np.ndarray, *, classes: int, rate: float, seed: int
) -> np.ndarray:
    """[n, classes] P(given label | true label, image), float64, of instance-dependent noise.

        q_i                     for c = y_i:  1 - q_i
        q_i softmax_c(x_i W_y)  for c != y_i: over these alone      (Xia et al. 2020, Algorithm 2)

    q_i, the sample's own flip rate, is normal around `rate` with a deviation of 0.1, cut to [0, 1]; the cut
    raises the mean of small rates (0.2055 at 0.2). A rate of 0 flips nothing. W_y [values, classes] is standard
    normal, one for each true class y. `pixels` uint8 [n, ...] are x_i, here scaled to -1..1. The same bits for a
    sample whatever the order and the other samples. Holds one W_y at a time. Raises as `instance_dependent` does.
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
            # so that neither the order of the additions nor the rest of the block can change a label
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


def _sampled(chances: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """The class of each row at which the running sum of its chances passes its uniform number."""
    running = chances.cumsum(axis=1)
    # the last sum is not 1 to the last bit: without the scaling, a number could lie behind the last class
    return (uniforms[:, None] * running[:, -1:] >= running[:, :-1]).sum(axis=1)


def _truncated_normal(uniforms: np.ndarray, mean: float, deviation: float) -> np.ndarray:
    """Samples of a normal that is cut to [0, 1], by its inverse distribution function."""
    import torch  # as in `_weights`

    def below(x: float) -> float:
        return 0.5 * (1 + math.erf((x - mean) / deviation / math.sqrt(2)))

    low, high = below(0.0), below(1.0)
    quantiles = torch.from_numpy(low + uniforms * (high - low)).clamp(1e-15, 1 - 1e-15)
    return (mean + deviation * torch.special.ndtri(quantiles).numpy()).clip(0.0, 1.0)
