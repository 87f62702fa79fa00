"""An object of this process, called the way an actor is: the worker, where there is no pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from posttrain.cluster.devices import torch_threads


class InProcessActor:
    """Calls go to an object that `make` makes in this process: at once, and with so many threads of torch.

    As with an actor, a method is called by its `remote`, which returns a reference to the result.
    """

    def __init__(self, make: Callable[[], object], threads: int) -> None:
        self._threads = threads
        with torch_threads(threads):
            self._object = make()

    def __getattr__(self, method: str) -> _Method:
        return _Method(getattr(self._object, method), self._threads)


@dataclass(frozen=True)
class _Method:
    call: Callable[..., Any]
    threads: int

    def remote(self, *arguments: Any) -> Any:
        # as Ray does: an argument that is a reference arrives as its value
        values = [ray.get(value) if isinstance(value, ray.ObjectRef) else value for value in arguments]
        with torch_threads(self.threads):
            return ray.put(self.call(*values))
