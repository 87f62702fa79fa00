"""Data sets by name as Arrow tables {id, image (raw uint8), label}; class names and shape in the metadata."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from posttrain.errors import DataError

TorchvisionName = Literal["CIFAR10", "CIFAR100", "FashionMNIST", "MNIST"]


def digits(seed: int, test_share: float = 0.25) -> dict[str, pa.Table]:
    """scikit-learn's 1,797 digits of 8x8 pixels, {"train", "test"}; nothing is downloaded.

    `id` is the index in the original set; the seed chooses the test set.
    """
    from sklearn.datasets import load_digits  # takes a second, and only this data set needs it

    bunch: Any = load_digits()
    n = len(bunch.target)
    if not 0 < round(n * test_share) < n:
        raise ValueError(f"test_share {test_share} leaves one of the two sets empty; 0 < test_share < 1")
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    shuffled = np.random.default_rng(seed).permutation(n)
    parts = np.split(shuffled, [n - round(n * test_share)])
    names = [str(name) for name in bunch.target_names]
    return {
        split: _table(np.sort(ids), images[np.sort(ids)], bunch.target[np.sort(ids)], names)
        for split, ids in zip(("train", "test"), parts, strict=True)
    }


def torchvision_tables(name: TorchvisionName, root: str | Path) -> dict[str, pa.Table]:
    """A torchvision data set, {"train", "test"}, downloaded to `root` where it is not there yet.

    `id` counts through train and goes on in test, so that no id occurs in both.
    Raises DataError where it is neither there nor can be downloaded.
    """
    folder = Path(root).expanduser()
    train, test = (_loaded(name, folder, train=train) for train in (True, False))
    return {
        "train": _table(np.arange(len(train.data)), train.data, train.targets, train.classes),
        "test": _table(len(train.data) + np.arange(len(test.data)), test.data, test.targets, test.classes),
    }


def _loaded(name: str, folder: Path, *, train: bool) -> Any:
    import torchvision.datasets  # takes seconds, and the digits do without

    try:
        # torchvision reports its downloads with print, and standard output belongs to results
        with contextlib.redirect_stdout(sys.stderr):
            return getattr(torchvision.datasets, name)(folder, train=train, download=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a bad checksum a RuntimeError
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{name} is not in {folder} and could not be downloaded ({reason}); "
            "put its files there, or use data.source: parquet"
        ) from error


def _table(ids: np.ndarray, images: Any, labels: Any, class_names: Sequence[str]) -> pa.Table:
    pixels = np.ascontiguousarray(images, dtype=np.uint8)
    cell = pa.binary(pixels[0].nbytes)
    columns = {
        "id": pa.array(ids, pa.int64()),
        "image": pa.Array.from_buffers(cell, len(pixels), [None, pa.py_buffer(pixels)]),
        "label": pa.array(np.asarray(labels), pa.int32()),
    }
    metadata = {"class_names": json.dumps(list(class_names)), "image_shape": json.dumps(pixels.shape[1:])}
    return pa.table(columns).replace_schema_metadata(metadata)
