"""Values that travel to the actors once, through the object store."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import ray

T = TypeVar("T")

_numbers = itertools.count()


def new_key() -> str:
    """A key that no other value has."""
    return f"{os.getpid()}-{next(_numbers)}"


@dataclass(frozen=True)
class Shared(Generic[T]):
    """A reference to a value in the object store.

    Ray resolves a reference that is itself an argument before every call; one inside an object stays a reference, so
    that an actor can look up `key` in its cache first, and fetch the value only where it needs it.
    """

    reference: ray.ObjectRef[T]
    key: str
    """Under which actors cache what they made of the value."""

    def get(self) -> T:
        return cast(T, ray.get(self.reference))


def share(value: T, key: str | None = None) -> Shared[T]:
    """The value, put into the object store; without a `key` of its own it gets a new one."""
    return Shared(ray.put(value), key or new_key())
