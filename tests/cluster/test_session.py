"""Ray's start, with a Ray that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ray

from posttrain.cluster.session import session
from posttrain.errors import StepError

SLOW = Exception("The current node timed out during startup.\nMore of it.")


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """A Ray that fails to start so many times; what is asked of it."""

    def failing(times: int) -> list[str]:
        asked: list[str] = []

        def init(**options: Any) -> None:
            asked.append("init")
            if asked.count("init") <= times:
                raise SLOW

        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", init)
        monkeypatch.setattr(ray, "shutdown", lambda: asked.append("shutdown"))
        return asked

    return failing


def test_a_ray_that_does_not_come_up_in_its_time_is_started_once_more(starts: Callable[[int], list[str]]) -> None:
    asked = starts(1)
    with session(num_cpus=1):
        assert asked == ["init", "shutdown", "init"]
    assert asked == ["init", "shutdown", "init", "shutdown"]


def test_one_that_fails_again_is_told_in_a_sentence(starts: Callable[[int], list[str]]) -> None:
    starts(2)
    with pytest.raises(StepError, match=r"not started on this machine \(The current node timed .*\); start the same"):
        session(num_cpus=1).__enter__()
