"""What a run says of the machine it embeds on."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from posttrain.report.progress import StepLog
from posttrain.runs import embed


def said_by(workers: Any) -> list[str]:
    """What is said of these workers, where they are asked twice."""
    stream = io.StringIO()
    run: Any = SimpleNamespace(workers=workers, progress=StepLog(Console(file=stream)))
    for _ in range(2):
        embed._say_gpus(run)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize(
    ("gpus", "said"),
    [
        (["NVIDIA H200", "NVIDIA H200"], ["  embed: on NVIDIA H200"]),
        (["NVIDIA L4", "NVIDIA H200", "NVIDIA L4"], ["  embed: on NVIDIA H200, NVIDIA L4"]),
        ([None], ["  embed: without a GPU, although Ray sees one: is this a torch for the CPU?"]),
        # no actor has started yet: the next time
        ([], []),
    ],
)
def test_the_gpus_that_embed_are_said_once(gpus: list[str | None], said: list[str]) -> None:
    assert said_by(SimpleNamespace(gpus_per_worker=1.0, gpus=lambda: gpus)) == said


def test_without_gpus_nothing_is_asked_and_nothing_said() -> None:
    assert said_by(SimpleNamespace(gpus_per_worker=0.0)) == []
