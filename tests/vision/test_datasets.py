from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision.datasets
from sklearn.datasets import load_digits

from posttrain.errors import DataError
from posttrain.vision.datasets import digits, torchvision_tables
from posttrain.vision.images import decode_column


def pixels(table: pa.Table, channels: int = 1) -> np.ndarray:
    assert table.schema.metadata is not None
    shape = tuple(json.loads(table.schema.metadata[b"image_shape"]))
    found, readable, _ = decode_column(table["image"], channels=channels, size=shape[:2], shape=shape)
    assert readable.all()
    return found.numpy()


def test_the_digits_are_those_of_scikit_learn_each_in_one_set():
    tables = digits(seed=3)
    original: Any = load_digits()
    assert {name: len(table) for name, table in tables.items()} == {"train": 1348, "test": 449}
    both = pa.concat_tables(tables.values())
    assert sorted(both["id"].to_pylist()) == list(range(1797))
    ids = both["id"].to_numpy()
    assert (both["label"].to_numpy() == original.target[ids]).all()
    assert np.abs(pixels(both)[:, 0] / 255 * 16 - original.images[ids]).max() < 16 / 255
    assert pixels(both).max() == 255


def test_the_seed_alone_draws_the_digits_test_set():
    assert digits(seed=1)["test"].equals(digits(seed=1)["test"])
    shared = set(digits(seed=1)["test"]["id"].to_pylist()) & set(digits(seed=2)["test"]["id"].to_pylist())
    assert 60 < len(shared) < 170  # 112 are expected by chance


def test_tables_have_one_schema_and_survive_parquet(tmp_path: Path):
    table = digits(seed=0)["train"]
    assert table.schema.names == ["id", "image", "label"]
    assert table.schema.types == [pa.int64(), pa.binary(64), pa.int32()]
    pq.write_table(table, tmp_path / "a.parquet")
    again = pq.read_table(tmp_path / "a.parquet")
    assert again.equals(table, check_metadata=True)
    metadata = again.schema.metadata or {}
    assert json.loads(metadata[b"class_names"]) == [str(digit) for digit in range(10)]
    assert json.loads(metadata[b"image_shape"]) == [8, 8]


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_a_share_that_leaves_a_set_empty_is_refused(share: float):
    with pytest.raises(ValueError, match="leaves one of the two sets empty"):
        digits(seed=0, test_share=share)


def fake(colour: bool) -> type:
    class Fake:
        """As torchvision has them: CIFAR's data are arrays with lists of labels, MNIST's are tensors."""

        classes = ("cat", "dog")

        def __init__(self, root: Path, train: bool, download: bool) -> None:
            assert download
            n = 6 if train else 4
            data = torch.randint(0, 256, (n, 5, 4, 3) if colour else (n, 5, 4), dtype=torch.uint8)
            targets = torch.arange(n) % 2
            self.data: Any = data.numpy() if colour else data
            self.targets: Any = targets.tolist() if colour else targets
            made.append(self)

    made: list[Fake] = []
    Fake.made = made  # pyright: ignore[reportAttributeAccessIssue]
    return Fake


@pytest.mark.parametrize("name, colour", [("CIFAR10", True), ("MNIST", False)])
def test_a_torchvision_data_set_becomes_tables(name: Any, colour: bool, monkeypatch, tmp_path: Path):
    kind: Any = fake(colour)
    monkeypatch.setattr(torchvision.datasets, name, kind)
    tables = torchvision_tables(name, tmp_path)
    assert tables["train"]["id"].to_pylist() + tables["test"]["id"].to_pylist() == list(range(10))
    for table, original in zip(tables.values(), kind.made, strict=True):
        assert table["label"].to_pylist() == [i % 2 for i in range(len(table))]
        found = pixels(table, 3 if colour else 1)
        assert (np.moveaxis(found, 1, 3).squeeze() == np.asarray(original.data)).all()
        assert json.loads((table.schema.metadata or {})[b"class_names"]) == ["cat", "dog"]


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "FashionMNIST", "MNIST"])
def test_without_a_network_the_error_says_where_to_put_the_files(name: Any, monkeypatch, tmp_path: Path, capfd):
    def unreachable(*_: object, **__: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(DataError) as caught:
        torchvision_tables(name, tmp_path / "cache")
    message = str(caught.value)
    assert message.startswith(f"{name} is not in {tmp_path / 'cache'} and could not be downloaded")
    assert "data.source: parquet" in message and "\n" not in message
    assert capfd.readouterr().out == ""
