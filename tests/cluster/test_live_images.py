from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from posttrain.cluster.live_images import LiveImages
from posttrain.cluster.partitioning import Partition
from posttrain.errors import StepError
from posttrain.live import Live
from posttrain.schema import FILE, IMAGE, LABEL, SAMPLE_ID, ImageSpec

IMAGES = ImageSpec(1, (2, 2), (0.5,), (0.5,), (2, 2))


def live_images(samples: int, *, alone: bool) -> LiveImages:
    block = pa.table(
        {
            SAMPLE_ID: pa.array(range(samples), pa.int64()),
            IMAGE: pa.array([bytes(4)] * samples, pa.binary(4)),
            LABEL: pa.array(np.arange(samples) % 3, pa.int32()),
            FILE: ["a.parquet"] * samples,
        }
    )
    # what stands for the object store's reference is the block itself
    partition = Partition(0, samples, block)  # pyright: ignore[reportArgumentType]
    taken: Any = lambda block: block  # noqa: E731
    return LiveImages((partition,), Live(samples), IMAGES, seed=0, alone=alone, get=taken)


def sizes(images: LiveImages, steps: int) -> list[list[int]]:
    """Of the batches of two epochs."""
    return [[len(labels) for _, labels in images.batches(64, steps, epoch)] for epoch in range(2)]


@pytest.mark.parametrize(
    ("samples", "expected"),
    [(192, [64] * 4), (193, [64] * 4), (194, [64, 64, 64, 2]), (65, [64] * 4), (3, [3] * 4)],
)
def test_a_rank_among_others_takes_all_steps_whatever_it_holds(samples: int, expected: list[int]) -> None:
    # one that ended its epoch a step early would leave the others waiting in the exchange of gradients for ever
    assert sizes(live_images(samples, alone=False), 4) == [expected] * 2


def test_a_rank_among_others_without_two_samples_is_an_error_and_no_short_epoch() -> None:
    with pytest.raises(StepError, match="fewer than two samples"):
        sizes(live_images(1, alone=False), 1)


def test_alone_a_last_batch_of_one_is_left_out() -> None:
    assert sizes(live_images(193, alone=True), 4) == [[64] * 3] * 2
