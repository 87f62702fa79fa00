"""CIFAR-10N, real images with labels that people gave; skipped where the data are absent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.data]


def test_cifar10n_is_read_whole_and_its_labels_are_wrong_as_often_as_its_authors_say(
    data_folder: Path, ray_session: None
) -> None:
    from posttrain.cluster import measuring, partitioning
    from posttrain.data.sources import ParquetSource, list_source
    from posttrain.live import Removal

    train = ParquetSource((str(data_folder / "cifar10n" / "train"),), "id", "image", "label_random1", "label_clean")
    test = ParquetSource((str(data_folder / "cifar10n" / "test"),), "id", "image", "label")
    splits = partitioning.read(
        {"train": train, "test": test},
        classes=list_source(train).classes or (),
        validation_share=0.1,
        noise=None,
        seed=0,
        ids_span_sets=False,
    )
    assert splits["train"].rows + splits["validation"].rows == 20_000
    assert splits["test"].rows == 5_000
    assert splits["validation"].rows == pytest.approx(2_000, abs=3 * 42)
    found = measuring.detection(splits["train"], Removal())
    assert found.wrong / splits["train"].rows == pytest.approx(0.171, abs=0.005)


def test_every_image_of_cifar10n_decodes_to_the_pixels_that_pillow_gives(data_folder: Path) -> None:
    import io

    from PIL import Image

    from posttrain.vision.images import decode_column

    column = pq.read_table(data_folder / "cifar10n" / "test" / "part-00000-of-00004.parquet")["image"]
    pixels, readable, _ = decode_column(column, channels=3, size=(32, 32))
    assert readable.all()
    for i in range(0, len(column), 100):
        with Image.open(io.BytesIO(column[i].as_py())) as image:
            expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        assert (pixels[i].numpy() == expected).all()
