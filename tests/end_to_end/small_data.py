"""Digits with wrong labels, on disk as users have them, what interrupts a run, and what one left behind."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

if TYPE_CHECKING:
    from torch import Tensor, nn


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


class Digits:
    """Digits with a fifth of the labels wrong, as arrays: train 0..899, validation 900..1199, test from 1200 on.

    `enlarged` times as many pixels on a side as their own 8.
    """

    def __init__(self, enlarged: int = 1) -> None:
        data = load_digits()
        assert not isinstance(data, tuple)
        generator = np.random.default_rng(0)
        order = generator.permutation(len(data.target))
        pixels = (data.images[order] * 255 / 16).round().astype(np.uint8)
        self.images = pixels.repeat(enlarged, axis=1).repeat(enlarged, axis=2)
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

    def write(self, folder: Path) -> None:
        """One folder of two Parquet files for each split."""
        for split in self.splits:
            (folder / split).mkdir()
            table = self.table(split)
            half = table.num_rows // 2
            pq.write_table(table.slice(0, half), folder / split / "a.parquet")
            pq.write_table(table.slice(half), folder / split / "b.parquet")

    def inputs(self, split: str) -> Tensor:
        """What a network with mean 0.5 and standard deviation 0.5 sees of a split."""
        import torch

        return (torch.from_numpy(self.images[list(self.splits[split])]).float()[:, None] / 255 - 0.5) / 0.5


def memorise(digits: Digits, model: nn.Module, path: Path, *, epochs: int) -> None:
    """Trains the model until it knows the given labels, wrong ones included, and writes its weights.

    `epochs` are enough here; another machine, whose sums round otherwise, may take more.
    """
    import torch

    inputs = digits.inputs("train")
    labels = torch.from_numpy(digits.given[list(digits.splits["train"])])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for epoch in range(3 * epochs):
        if epoch >= epochs and accuracy(model.eval(), inputs, labels) >= 0.98:
            break
        model.train()
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()
    assert accuracy(model.eval(), inputs, labels) >= 0.98
    torch.save(model.state_dict(), path)


def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    import torch

    with torch.no_grad():
        return float((model(inputs).argmax(dim=1) == labels).float().mean())


def as_built(run: str | os.PathLike[str]) -> nn.Module:
    """The model that a run leaves behind, built from its `model.yaml` and nothing else, in evaluation mode."""
    import yaml
    from safetensors.torch import load_file

    from posttrain.vision import models

    section = yaml.safe_load((Path(run) / "model.yaml").read_text())["model"]
    model = models.build(section["factory"], classes=10, arguments=section["arguments"])
    model.load_state_dict(load_file(section["weights"]))
    return model.eval()


@contextmanager
def interrupted_after(step: str, *, call: int) -> Iterator[None]:
    """A run in here is interrupted right after this call of a step of `posttrain.runs`, counted from 1."""
    module = import_module(f"posttrain.runs.{'commit' if step in ('tell_round', 'write_checkpoint') else step}")
    after = getattr(module, step)
    calls = 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        result = after(*arguments, **options)
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, step, interrupted)
        yield


def rounds(run: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The committed rounds as their `round.json` has them, from round 0 on."""
    return [json.loads(path.read_text()) for path in sorted((Path(run) / "rounds").glob("*/round.json"))]


def removed_ids(path: str | os.PathLike[str]) -> list[Any]:
    return pq.read_table(Path(path) / "removed.parquet")["sample_id"].to_pylist()


def relabelled(path: str | os.PathLike[str]) -> dict[Any, int]:
    """New label by sample id; empty where a run relabelled none."""
    file = Path(path) / "relabelled.parquet"
    if not file.exists():
        return {}
    table = pq.read_table(file)
    return dict(zip(table["sample_id"].to_pylist(), table["suggested_label"].to_pylist(), strict=True))


def assert_same_result(run: str | os.PathLike[str], other: str | os.PathLike[str]) -> None:
    """The same ids left in the same order, the same got the same labels, and the weights are bitwise equal."""
    assert removed_ids(run) == removed_ids(other)
    assert list(relabelled(run).items()) == list(relabelled(other).items())
    assert (Path(run) / "model.safetensors").read_bytes() == (Path(other) / "model.safetensors").read_bytes()


NETWORK = {"scope": "network", "augment": "crop", "learning_rate": 0.001}
"""A refine section that trains the whole network."""

BOTH = {**NETWORK, "scope": "both"}
"""A refine section that trains the whole network and ends with a new boundary."""
