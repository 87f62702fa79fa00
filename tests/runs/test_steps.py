"""What a run says of the machine it computes on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from posttrain.runs.steps import CleaningRun


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
    lines: list[str] = []
    run: Any = SimpleNamespace(
        _gpus_told=False,
        workers=SimpleNamespace(gpus_per_worker=1.0, gpus=lambda: gpus),
        progress=SimpleNamespace(say=lines.append),
    )
    for _ in range(2):
        CleaningRun._tell_gpus(run)
    assert lines == said


def test_without_gpus_nothing_is_asked_and_nothing_said() -> None:
    run: Any = SimpleNamespace(_gpus_told=False, workers=SimpleNamespace(gpus_per_worker=0.0))
    CleaningRun._tell_gpus(run)
