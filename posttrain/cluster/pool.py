"""A pool of actors that goes on when some of them die: what they were at is done again, and others take their place.

Ray itself would restart an actor a fixed number of times over its whole life, and would not say which call it died of.
Here there is no such number as long as work gets done: a death is held against the call that the process was at, and
only a call that ends one process after another is given up.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, ObjectLostError, OutOfMemoryError, RayActorError

from posttrain.cluster.reading import raise_cause
from posttrain.errors import StepError

DEATHS_OF_A_CALL = 5
"""Processes that a call may end before it is given up, where it cannot be divided."""

_FRUITLESS = 10
"""Processes, and three more per actor, that may die one after another with no call coming to its end."""

_DEATHS = (RayActorError, OutOfMemoryError, ObjectLostError)
"""What Ray raises of a call whose process has ended, or whose result went with a node."""

_LOOK_S = 10.0
"""Seconds between two looks at the nodes: the loss of one is not always the loss of an actor."""


@dataclass(frozen=True)
class Died:
    """The outcome of a call that ended one process after another."""

    why: str
    """What Ray knows of it, as a clause."""


@dataclass
class _Call:
    index: int
    make: Callable[[Any], Any]
    deaths: int = 0
    alone: bool = False
    """Whether a process died with it in hand: from then on it shares its actor with no other call, so that a further
    death is surely its own."""


@dataclass(eq=False)
class _Slot:
    """A place in the pool with the actor that has it now."""

    actor: Any
    birth: Any
    """Reference to the id of its node, there when the actor is ready."""
    node: str | None = None


class Pool:
    """`count` actors, which `make` makes (given whether they may reserve CPUs); they start at the first call.

    An actor has a method `ready`, which gives the id of its node. `tell` is told of what dies.
    """

    def __init__(self, make: Callable[[bool], Any], count: int) -> None:
        self._make, self._count = make, count
        self._slots: list[_Slot] = []
        self._fruitless = 0
        self._reserving = True
        self._gone, self._looked = _nodes_gone(), time.monotonic()
        self.tell: Callable[[str], None] = lambda text: None

    def start(self) -> None:
        """Start the actors without waiting for them."""
        if not self._slots:
            self._slots = [self._new() for _ in range(self._count)]

    def release(self) -> None:
        """End the actors. The next call starts new ones."""
        for slot in self._slots:
            _end(slot.actor)
        self._slots = []

    def ready(self) -> list[Any]:
        """The actors that are ready; waits for the first."""
        self.start()
        while not (found := [slot.actor for slot in self._slots if slot.node is not None]):
            self._await([slot.birth for slot in self._slots])
        return found

    def make_room(self) -> None:
        """Where a node was lost: end the actors; those that follow reserve no CPUs.

        The blocks that the node held have to be made again, by tasks that would wait for ever for CPUs that idle
        actors hold.
        """
        self._looked = time.monotonic()
        if self._reserving and _nodes_gone() - self._gone:
            self._reserving = False
            self.tell("a node was lost; going on with those that are left")
            self.release()

    def each(
        self, calls: Iterable[Callable[[Any], Any]], *, tolerated: int | None = None, waiting: int = 2
    ) -> Iterator[Any]:
        """Results of the calls (each given a free actor), in their order; at most `waiting` wait per actor.

        The look-ahead is bounded: results that wait for an earlier one never pile up by the number of samples. With
        `tolerated`, a call that ends so many processes gives `Died`; else StepError is raised for one that ends
        DEATHS_OF_A_CALL. What a call itself raises is raised.
        """
        self.start()
        following = iter(enumerate(calls))
        again: deque[_Call] = deque()
        flying: dict[Any, tuple[_Call, _Slot]] = {}
        found: dict[int, Any] = {}
        next_out, exhausted = 0, False
        while True:
            while (slot := self._free(flying, 1 if again else waiting)) is not None:
                call = again.popleft() if again else None
                if call is None and not exhausted and len(found) < 4 * self._count:
                    item = next(following, None)
                    exhausted = item is None
                    call = None if item is None else _Call(*item)
                if call is None:
                    break
                flying[call.make(slot.actor)] = (call, slot)
            while next_out in found:
                yield found.pop(next_out)
                next_out += 1
            if not flying and not again:
                if exhausted:
                    return
                if self._free(flying, waiting) is not None:
                    continue
            for reference in self._await([*flying, *(slot.birth for slot in self._slots if slot.node is None)]):
                if reference not in flying:
                    continue
                call, slot = flying[reference]
                try:
                    found[call.index] = ray.get(reference)
                    del flying[reference]
                    self._fruitless = 0
                except _DEATHS as error:
                    ended, lost = self._bury(slot, flying, error)
                    found |= ended
                    for other in lost:
                        if other.deaths < (tolerated or DEATHS_OF_A_CALL):
                            again.append(other)
                        elif tolerated:
                            found[other.index] = Died(cause(error))
                        else:
                            raise StepError(
                                f"the same piece of work ended {other.deaths} worker processes ({cause(error)}); "
                                "give workers more memory, then start the same command again to go on"
                            ) from None
                except Exception as error:
                    raise_cause(error)
            if self._reserving and time.monotonic() - self._looked >= _LOOK_S:
                self.make_room()
                if not self._slots:
                    self.start()
                    again.extend(call for call, _ in flying.values())
                    flying.clear()

    def ask(self, call: Callable[[Any], Any]) -> list[Any]:
        """The answers of the actors that are ready, in their order; of those that die meanwhile there is none."""
        answers = []
        for reference in [call(actor) for actor in self.ready()]:
            with contextlib.suppress(*_DEATHS):
                answers.append(ray.get(reference))
        return answers

    def _free(self, flying: dict[Any, tuple[_Call, _Slot]], waiting: int) -> _Slot | None:
        """The slot with the fewest calls, where one has room for another."""
        load = {id(slot): 0 for slot in self._slots}
        for call, slot in flying.values():
            load[id(slot)] = load.get(id(slot), 0) + (waiting if call.alone else 1)
        ready = [slot for slot in self._slots if slot.node is not None]
        least = min(ready, key=lambda slot: load[id(slot)], default=None)
        return least if least is not None and load[id(least)] < waiting else None

    def _await(self, references: list[Any]) -> list[Any]:
        """Those of the references that are there; none where it is time to look at the nodes."""
        done, _ = ray.wait(references, num_returns=1, timeout=_LOOK_S if self._reserving else None)
        births = {slot.birth: slot for slot in self._slots if slot.node is None}
        for reference in done:
            if (slot := births.get(reference)) is None:
                continue
            try:
                slot.node = ray.get(reference)
            except _DEATHS as error:
                if isinstance(error, RayActorError) and error.actor_init_failed:
                    raise_cause(error)
                self._replace(slot, error)
            except Exception as error:
                raise_cause(error)
        return done

    def _bury(
        self, slot: _Slot, flying: dict[Any, tuple[_Call, _Slot]], error: Exception
    ) -> tuple[dict[int, Any], list[_Call]]:
        """Takes all calls of a dead actor out of `flying`: what it still answered, and the calls to be made again."""
        mine = [reference for reference, (_, owner) in flying.items() if owner is slot]
        # those behind the one that it died of fail within moments
        ray.wait(mine, num_returns=len(mine), timeout=_LOOK_S)
        ended: dict[int, Any] = {}
        lost: list[_Call] = []
        for reference in mine:
            call, _ = flying.pop(reference)
            try:
                ended[call.index] = ray.get(reference, timeout=0)
            except (*_DEATHS, GetTimeoutError):
                lost.append(call)
            except Exception as raised:
                raise_cause(raised)
        # calls are carried out in their order: it was at the first that it did not answer
        if lost and slot.node not in _nodes_gone():
            lost[0].deaths += 1
            for call in lost:
                call.alone = True
        self._replace(slot, error)
        return ended, lost

    def _replace(self, slot: _Slot, error: Exception) -> None:
        if slot not in self._slots:
            return
        self._fruitless += 1
        if self._fruitless > _FRUITLESS + 3 * self._count:
            raise StepError(
                f"{self._fruitless} worker processes died one after another, and none had finished anything "
                f"({cause(error)}); mend that, then start the same command again to go on"
            )
        self.tell(f"a worker process was lost ({cause(error)}); another takes its place")
        _end(slot.actor)
        self._slots[self._slots.index(slot)] = self._new()

    def _new(self) -> _Slot:
        actor = self._make(self._reserving)
        return _Slot(actor, actor.ready.remote())


def cause(error: Exception) -> str:
    """Why a process died, as far as Ray knows it."""
    text = str(error)
    if isinstance(error, OutOfMemoryError) or "low on memory" in text:
        return "out of memory"
    if "node has died" in text or "node died" in text:
        return "its node was lost"
    return "killed, crashed, or out of memory"


def _nodes_gone() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if not node["Alive"]}


def _end(actor: Any) -> None:
    if isinstance(actor, ActorHandle):
        ray.kill(actor)
