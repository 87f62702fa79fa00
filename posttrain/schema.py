"""The columns that cross a boundary, and the order that all samples share.

A sample is a row `sample_id` (int64 or string), `image`, `label`. Samples are put into *partitions* by a hash of
their id: which partition a sample is in, and where in it, depends on its id and on the number of samples alone, so
that no result can depend on files, blocks or workers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas.util
import pyarrow as pa

SAMPLE_ID = "sample_id"
IMAGE = "image"
LABEL = "label"
FEATURES = "features"
TRUE_LABEL = "true_label"
FILE = "file"
ORDER = "order"
PARTITION = "partition"
ROW = "row"
DIGEST = "image_digest"
SELF_CONFIDENCE = "self_confidence"
"""Probability of the given label, leave-one-out and calibrated."""

NO_SELF_CONFIDENCE = pa.table(
    {PARTITION: pa.array([], pa.int32()), ROW: pa.array([], pa.int32()), SELF_CONFIDENCE: pa.array([], pa.float32())}
)
"""{partition, row, self_confidence} of no samples."""

SPLITS = ("train", "validation", "test")

Precision = Literal["float32", "bfloat16", "float16"]
"""In which number format a network's matrix products and convolutions are carried out."""

PARTITION_ROWS = 2048
"""Samples per partition, on average: a few megabytes of features, a tenth of a second of work."""

_WORD = 2**64 - 1
ORDER_BITS = 60
"""Order keys are below 2^60, so that the split fits above them in one int64."""


def order_key(ids: np.ndarray, seed: int = 0) -> np.ndarray:
    """A hash of each id (int64 or str), int64 in [0, 2^60); equal ids and seeds give equal numbers.

    Order, files and shards play no part: pandas' stable hash of the id, mixed with the seed by the finaliser
    of splitmix64 (Steele, Lea, Flood 2014).
    """
    # one width of integers, and objects for strings: pandas hashes int32 and int64 differently
    ids = ids.astype(np.int64) if ids.dtype.kind in "iu" else ids.astype(object)
    # pandas.util loads its names late, which hides their types
    hashed = pandas.util.hash_array(ids, categorize=False)  # pyright: ignore[reportCallIssue]
    seeded = _mixed(np.array([seed & _WORD], np.uint64))
    return (_mixed(hashed ^ seeded) >> np.uint64(64 - ORDER_BITS)).astype(np.int64)


def uniform(ids: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each id, float64: a function of (id, seed) alone."""
    return (order_key(ids, seed) >> (ORDER_BITS - 53)) * 2.0**-53


def stream_seed(stream: str, *numbers: int) -> int:
    """A seed for `uniform` that depends on its purpose: numbers of different streams are independent."""
    text = ":".join([stream, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def label_quality(mislabel_odds: np.ndarray) -> np.ndarray:
    """float64: the probability that each label is right, by the log odds that it is wrong."""
    # 1 / (1 + e^odds), without an overflow
    return np.exp(-np.logaddexp(0, mislabel_odds.astype(np.float64)))


def _mixed(words: np.ndarray) -> np.ndarray:
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def partition_count(samples: int) -> int:
    """How many partitions `samples` are put into: a function of their number alone."""
    return max(4, -(-samples // PARTITION_ROWS))


def partition_boundaries(partitions: int) -> list[int]:
    """The `partitions - 1` order keys at which one partition ends and the next begins."""
    return [(2**ORDER_BITS * i) // partitions for i in range(1, partitions)]


@dataclass(frozen=True)
class ImageSpec:
    """How a cell of the image column becomes the network's input."""

    channels: int
    size: tuple[int, int]
    """Height and width in pixels."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shape: tuple[int, ...] | None = None
    """(H, W) or (H, W, C) of cells that hold raw uint8 pixels instead of an encoded image."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Red, green and blue of what lies behind images with an alpha channel."""


@dataclass(frozen=True)
class ModelSpec:
    """What it takes to build the network anywhere; its weights travel apart."""

    factory: str
    arguments: dict[str, Any]
    classes: int
    head: str
    image: ImageSpec
    layers: tuple[str, ...]
    """Layers whose features are kept, the head's name for what goes into it."""
    width: int
    """Most features of a layer other than the head's."""


@dataclass(frozen=True)
class Round:
    """What a committed round did. Round 0 is the model as it came."""

    number: int
    live: int
    """Samples that take part after this round."""
    candidates: int
    removed: int
    relabelled: int
    metrics: dict[str, float]
    """`validation_accuracy` and more, of the model after this round."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By step."""
    ended: str = ""
    """Why no further round follows, where that was decided before this one."""

    @property
    def figures(self) -> dict[str, float]:
        """All that is known of the round, by name: counts, metrics, and the seconds of each step."""
        return {
            "live": self.live,
            "candidates": self.candidates,
            "removed": self.removed,
            "relabelled": self.relabelled,
            **self.metrics,
            **{f"seconds_{name.replace(' ', '_')}": value for name, value in self.seconds.items()},
        }
