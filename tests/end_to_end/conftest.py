"""One Ray and one MLflow store for the whole session; small real data sets on disk."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from posttrain.config import RunFile


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    from posttrain.cluster.session import session

    with session(num_cpus=2, object_store_gb=0.5):
        yield


@pytest.fixture(scope="session")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def shared_workers(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pools, one per number of workers, kept over the tests: a new process takes seconds to import torch."""
    from posttrain.cluster import workers

    real = workers.Workers

    def kept(*, count: int | None, **options: Any) -> Any:
        if count not in _POOLS:
            _POOLS[count] = real(count=count, **options)
        return _POOLS[count]

    monkeypatch.setattr(workers, "Workers", kept)


_POOLS: dict[int | None, Any] = {}


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


class Digits:
    """Digits with a fifth of the labels wrong, as arrays: train 0..899, validation 900..1199, test from 1200 on."""

    def __init__(self) -> None:
        data = load_digits()
        generator = np.random.default_rng(0)
        order = generator.permutation(len(data.target))
        self.images = (data.images[order] * 255 / 16).round().astype(np.uint8)
        self.true = data.target[order].astype(np.int64)
        wrong = generator.random(len(order)) < 0.2
        self.given = np.where(wrong, (self.true + generator.integers(1, 10, len(order))) % 10, self.true)
        self.splits = {"train": range(0, 900), "validation": range(900, 1200), "test": range(1200, 1797)}

    def table(self, split: str, **columns: Any) -> pa.Table:
        rows = list(self.splits[split])
        labels = self.true if split == "test" else self.given
        table = {
            "id": pa.array(rows, pa.int64()),
            "image": pa.array([png(self.images[i]) for i in rows], pa.binary()),
            "label": pa.array(labels[rows]),
            "true": pa.array(self.true[rows]),
        }
        return pa.table({**table, **columns})


@pytest.fixture(scope="session")
def digits() -> Digits:
    return Digits()


@pytest.fixture(scope="session")
def digits_parquet(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train, validation and test as Parquet, and `weights.pt` of a network that has memorised the train labels."""
    folder = tmp_path_factory.mktemp("digits")
    for split in digits.splits:
        (folder / split).mkdir()
        table = digits.table(split)
        half = table.num_rows // 2
        pq.write_table(table.slice(0, half), folder / split / "a.parquet")
        pq.write_table(table.slice(half), folder / split / "b.parquet")
    memorise(digits, folder / "weights.pt")
    return folder


def memorise(digits: Digits, path: Path) -> None:
    import torch

    from posttrain.vision.models import mlp

    rows = list(digits.splits["train"])
    inputs = torch.from_numpy(digits.images[rows]).float()[:, None] / 255
    inputs = (inputs - 0.5) / 0.5
    labels = torch.from_numpy(digits.given[rows])
    torch.manual_seed(0)
    model = mlp(10)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(300):
        for batch in torch.randperm(len(rows)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()
    assert float((model(inputs).argmax(1) == labels).float().mean()) >= 0.98
    torch.save(model.state_dict(), path)


@pytest.fixture
def runfile(digits_parquet: Path, tmp_path: Path, mlflow_uri: str) -> Callable[..., dict[str, Any]]:
    """A run file (as nested mappings) on the digits in Parquet; keywords replace keys of its sections."""

    def make(**sections: dict[str, Any]) -> dict[str, Any]:
        raw: dict[str, Any] = {
            "run": {"path": str(tmp_path / "run")},
            "data": {
                "source": "parquet",
                **{split: str(digits_parquet / split) for split in ("train", "validation", "test")},
                "true_label": "true",
            },
            "model": {
                "factory": "posttrain.vision.models:mlp",
                "channels": 1,
                "image_size": 8,
                "weights": str(digits_parquet / "weights.pt"),
            },
            "removal": {"max_rounds": 3},
            "ray": {"workers": 2},
            "tracking": {"uri": mlflow_uri, "log_model": False},
        }
        for section, keys in sections.items():
            raw[section] = {**raw.get(section, {}), **keys}
        return raw

    return make


@pytest.fixture
def run(shared_workers: None, runfile: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Runs `posttrain clean` in this process; keywords replace keys of the run file's sections."""

    def clean(**sections: dict[str, Any]) -> dict[str, Any]:
        from pipelines.clean import clean

        return clean(RunFile.model_validate(runfile(**sections)), quiet=True)

    return clean


def removed_ids(path: str | os.PathLike[str]) -> list[Any]:
    return pq.read_table(Path(path) / "removed.parquet")["sample_id"].to_pylist()
