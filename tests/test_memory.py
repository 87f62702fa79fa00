"""What the driver holds does not grow with the number of samples."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np

from posttrain.influence.selection import Block, select

ROWS = 10_000


def peak_of_selecting(samples: int) -> int:
    """The most bytes that were taken at once while a round chose from so many samples, block by block."""

    def blocks() -> Iterator[Block]:
        for start in range(0, samples, ROWS):
            draw = np.random.default_rng(start)
            yield np.arange(start, start + ROWS), draw.integers(0, 10, ROWS), draw.random(ROWS, np.float32)

    tracemalloc.start()
    chosen = select(blocks, classes=10, at_most=1000, caps=np.full(10, 1000), threshold=0.0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert chosen.total == 1000
    return peak


def test_choosing_from_ten_times_the_samples_takes_no_more_memory() -> None:
    peak_of_selecting(ROWS)
    assert peak_of_selecting(100 * ROWS) < 1.1 * peak_of_selecting(10 * ROWS)
