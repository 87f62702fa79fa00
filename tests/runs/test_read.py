"""What is said of the data once they are read."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from posttrain.cluster import partitioning
from posttrain.cluster.partitioning import Split
from posttrain.config import load
from posttrain.report.progress import StepLog
from posttrain.runs.read import read


@pytest.mark.parametrize(
    ("samples", "setting", "warns"),
    [(47, "estimated", True), (50, "estimated", False), (47, "0.2", False)],
)
def test_too_few_validation_samples_are_named_before_the_work_begins(
    samples: int, setting: str, warns: bool, monkeypatch: pytest.MonkeyPatch
):
    def split(name: str, rows: int) -> Split:
        return Split(name, (SimpleNamespace(rows=rows),), np.array([rows - 1, 1]), "")  # pyright: ignore[reportArgumentType]

    splits = {"train": split("train", 453), "validation": split("validation", samples)}
    monkeypatch.setattr(partitioning, "read", lambda *_, **__: splits)
    inputs: Any = SimpleNamespace(
        sources={}, classes=("a", "b"), validation_share=0.1, noise=None, rows={"train": 453 + samples}, listing=""
    )
    said = io.StringIO()
    read(load(None, [f"removal.max_share={setting}"]), inputs, StepLog(Console(file=said)))
    found = said.getvalue()
    assert found.startswith("warning: there are 47 validation samples") == warns
    assert found.count("data.validation_share") == warns
