"""A worker in the own process, where there is no pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import torch

from posttrain.cluster.worker import Worker


@contextmanager
def computing_threads(count: int) -> Iterator[None]:
    """torch computes with so many threads: sums come out bitwise the same only where their number is the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class InProcess:
    """A worker in this very process, called as if it were an actor: at once, and results come as references."""

    def __init__(self, threads: int, cache_bytes: int) -> None:
        self._threads = threads
        with computing_threads(threads):
            self._worker = Worker(threads, cache_bytes)

    def __getattr__(self, method: str) -> _Method:
        return _Method(getattr(self._worker, method), self._threads)


@dataclass(frozen=True)
class _Method:
    call: Callable[..., Any]
    threads: int

    def remote(self, *arguments: Any) -> Any:
        # as Ray does for an actor: references among the arguments arrive as what they refer to
        values = [ray.get(value) if isinstance(value, ray.ObjectRef) else value for value in arguments]
        with computing_threads(self.threads):
            return ray.put(self.call(*values))
