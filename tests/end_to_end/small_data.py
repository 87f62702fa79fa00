"""Digits with wrong labels, on disk as users have them, and what a run left behind."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


class Digits:
    """Digits with a fifth of the labels wrong, as arrays: train 0..899, validation 900..1199, test from 1200 on."""

    def __init__(self) -> None:
        data = load_digits()
        assert not isinstance(data, tuple)
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


def removed_ids(path: str | os.PathLike[str]) -> list[Any]:
    return pq.read_table(Path(path) / "removed.parquet")["sample_id"].to_pylist()


def assert_same_result(run: str | os.PathLike[str], other: str | os.PathLike[str]) -> None:
    """The same ids left in the same order, and the weights are bitwise equal."""
    assert removed_ids(run) == removed_ids(other)
    assert (Path(run) / "model.safetensors").read_bytes() == (Path(other) / "model.safetensors").read_bytes()


NETWORK = {"scope": "network", "augment": "crop", "learning_rate": 0.001}
"""A refine section that trains the whole network."""
